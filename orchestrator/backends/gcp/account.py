"""GCP beside SkyPilot: calls through Google's client library, and the machines of ours in a project.

SkyPilot creates machines. The library is the one that SkyPilot itself uses on GCP (`skypilot[gcp]`), imported at the
first call; it finds credentials and the project where Google's own tools do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.backends.base import BackendError
from orchestrator.backends.provider_account import (
    LEASE_LABEL,
    ProviderAccount,
    ProviderRefused,
    RefusalReason,
    all_pages,
    utc_now,
)

SERVICES: Mapping[str, tuple[str, str]] = {"compute": ("v1", "compute/v1/"), "cloudscheduler": ("v1", "")}
"""Version and path of each service that is asked."""
NUM_RETRIES = 3
"""Of a call that failed for a passing reason; the library waits in between."""
HTTP_NOT_FOUND, HTTP_FORBIDDEN, HTTP_UNAUTHORIZED = 404, 403, 401


FIXES: Mapping[RefusalReason, str] = {
    RefusalReason.CREDENTIALS: "run: gcloud auth application-default login",
    RefusalReason.EXPIRED: "renew them: gcloud auth application-default login",
    RefusalReason.DISABLED: "enable it: gcloud services enable {service}.googleapis.com --project {project}",
    RefusalReason.DENIED: (
        "give this user the roles cloudscheduler.admin, compute.viewer and iam.serviceAccountUser in the project"
    ),
    RefusalReason.NETWORK: "check this machine's network, then run the command again",
    RefusalReason.MISSING: "it may have ended meanwhile",
    RefusalReason.OTHER: "run the command again; if the error remains, leave GCP out with --clouds",
}


@dataclass(frozen=True, slots=True)
class GcpInstance:
    """One machine of ours, as Compute Engine shows it."""

    number: str
    """Its id, which no later machine gets; names are used again."""
    name: str
    zone: str
    service_account: str
    """The account that the machine may act as; empty for a machine without one."""
    lease: str
    """Its label `slm-lease`."""


class GcpAccount(ProviderAccount):
    """The machines of one project. May be used by several threads."""

    provider = "GCP"
    fixes = FIXES

    def __init__(
        self,
        credentials: Any = None,
        project: str = "",
        *,
        endpoint: str = "",
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`credentials`, `project`: by default those of the environment; `endpoint`: another server than Google's."""
        super().__init__(clock)
        self._credentials = credentials
        self._project = project
        self._endpoint = endpoint
        self._local = threading.local()  # the library's connections serve one thread each
        self._lock = threading.Lock()

    @property
    def project(self) -> str:
        """Raises ProviderRefused where the environment has no credentials or names no project."""
        self._require_credentials("auth.default")
        return self._project

    def ask(self, operation: str, request: Callable[[Any], Any]) -> dict[str, Any]:
        """The reply to one call: `operation` begins with its service, `request` makes it from the service's client.

        Raises:
            ProviderRefused: Sorted by what to do about it.
        """
        self._require_credentials(operation)
        import google.auth.exceptions as auth_errors
        import googleapiclient.errors
        import httplib2

        try:
            call = request(self._client(service_name(operation)))
            call.add_response_callback(self.learn_clock_offset)
            return dict(call.execute(num_retries=NUM_RETRIES) or {})
        except googleapiclient.errors.HttpError as error:
            status = int(error.resp.status)
            reason = refusal_reason(status, error.content.decode("utf-8", "replace"))
            raise self._refused(operation, reason, str(error.reason), code=str(status)) from error
        except auth_errors.TransportError as error:
            raise self._refused(operation, RefusalReason.NETWORK, str(error)) from error
        except auth_errors.GoogleAuthError as error:
            raise self._refused(operation, RefusalReason.EXPIRED, str(error)) from error
        except (OSError, httplib2.HttpLib2Error) as error:
            raise self._refused(operation, RefusalReason.NETWORK, str(error)) from error

    def pages(self, operation: str, request: Callable[[Any, str | None], Any]) -> Iterator[Mapping[str, Any]]:
        """Every page of a call that answers in pages; `request` also takes the token of the page. Raises as `ask`."""
        return all_pages(lambda token: self.ask(operation, lambda client: request(client, token)), "nextPageToken")

    def lease_instances(self, label: str, project: str) -> list[GcpInstance]:
        """Every machine with this label `slm-lease`, in whatever zone and state. Raises ProviderRefused."""
        wanted = f'labels.{LEASE_LABEL}="{label}"'
        pages = self.pages(
            "compute.instances.aggregatedList",
            lambda client, token: client.instances().aggregatedList(project=project, filter=wanted, pageToken=token),
        )
        zones = (zone for page in pages for zone in page.get("items", {}).values())
        return [_instance(raw) for zone in zones for raw in zone.get("instances", ())]

    def _refused(self, operation: str, reason: RefusalReason, detail: str, *, code: str = "") -> ProviderRefused:
        place = f"project {self._project or '(none)'}"
        names = {"service": service_name(operation), "project": self._project or "PROJECT"}
        return self.refused(operation, place, reason, detail, code=code, **names)

    def _require_credentials(self, operation: str) -> None:
        with self._lock:
            if self._credentials is not None and self._project:
                return
            try:
                import google.auth
                import googleapiclient  # noqa: F401 - both, or GCP cannot be asked
            except ImportError as error:
                message = "Google's client library is missing: pip install 'skypilot[gcp]'"
                raise BackendError(f"{operation}: {message}.") from error
            try:
                credentials, project = google.auth.default()
            except google.auth.exceptions.GoogleAuthError as error:
                raise self._refused(operation, RefusalReason.CREDENTIALS, str(error)) from error
            self._credentials = self._credentials or credentials
            self._project = self._project or project or ""
            if not self._project:
                detail = "the credentials name no project; set GOOGLE_CLOUD_PROJECT"
                raise self._refused(operation, RefusalReason.CREDENTIALS, detail)

    def _client(self, service: str) -> Any:
        clients = self._local.__dict__
        if service not in clients:
            from googleapiclient.discovery import build

            version, path = SERVICES[service]
            options = {"api_endpoint": f"{self._endpoint}/{path}"} if self._endpoint else None
            clients[service] = build(
                service,
                version,
                credentials=self._credentials,
                client_options=options,
                cache_discovery=False,
                static_discovery=True,
            )
        return clients[service]


def service_name(operation: str) -> str:
    """`compute` for `compute.regions.get`."""
    return operation.split(".", maxsplit=1)[0]


def refusal_reason(status: int, content: str) -> RefusalReason:
    """From the HTTP status and the reason in the body (google.rpc.ErrorInfo)."""
    if status == HTTP_NOT_FOUND:
        return RefusalReason.MISSING
    if status == HTTP_UNAUTHORIZED:
        return RefusalReason.EXPIRED
    if status != HTTP_FORBIDDEN:
        return RefusalReason.OTHER
    try:
        details = json.loads(content)["error"].get("details") or ()
        reasons = {detail.get("reason") for detail in details}
    except (ValueError, KeyError, AttributeError, TypeError):
        reasons = set()
    return RefusalReason.DISABLED if "SERVICE_DISABLED" in reasons else RefusalReason.DENIED


def _instance(raw: Mapping[str, Any]) -> GcpInstance:
    accounts = raw.get("serviceAccounts") or ()
    return GcpInstance(
        number=str(raw["id"]),
        name=str(raw["name"]),
        zone=str(raw["zone"]).rsplit("/", maxsplit=1)[-1],
        service_account=str(accounts[0]["email"]) if accounts else "",
        lease=str((raw.get("labels") or {}).get(LEASE_LABEL, "")),
    )

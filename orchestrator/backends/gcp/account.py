"""GCP beside SkyPilot: Google's own client library, and what it says in our words.

SkyPilot creates. The library is the one that SkyPilot itself uses on GCP (`skypilot[gcp]`), imported when the first
question is asked; it finds credentials and the project where Google's own tools do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from orchestrator.backends.base import BackendError

SERVICES: Mapping[str, tuple[str, str]] = {"compute": ("v1", "compute/v1/"), "cloudscheduler": ("v1", "")}
"""Version and path of each service that is asked."""
NUM_RETRIES = 3
"""Of a call that failed for a passing reason; the library waits in between."""
HTTP_NOT_FOUND, HTTP_FORBIDDEN, HTTP_UNAUTHORIZED = 404, 403, 401


class GcpTrouble(StrEnum):
    """Why GCP did not do it."""

    CREDENTIALS = "credentials"
    EXPIRED = "expired"
    DISABLED = "disabled"
    DENIED = "denied"
    NETWORK = "network"
    MISSING = "missing"
    OTHER = "other"


_FACTS: Mapping[GcpTrouble, str] = {
    GcpTrouble.CREDENTIALS: "there are no credentials for GCP",
    GcpTrouble.EXPIRED: "GCP does not accept the credentials any longer",
    GcpTrouble.DISABLED: "the service is switched off in this project",
    GcpTrouble.DENIED: "these GCP credentials may not do it",
    GcpTrouble.NETWORK: "GCP does not answer",
}
_WAYS_OUT: Mapping[GcpTrouble, str] = {
    GcpTrouble.CREDENTIALS: "run: gcloud auth application-default login",
    GcpTrouble.EXPIRED: "renew them: gcloud auth application-default login",
    GcpTrouble.DISABLED: "switch it on: gcloud services enable {service}.googleapis.com --project {project}",
    GcpTrouble.DENIED: (
        "give this user the roles cloudscheduler.admin, compute.viewer and iam.serviceAccountUser in the project"
    ),
    GcpTrouble.NETWORK: "look at this machine's network, then run the command again",
    GcpTrouble.MISSING: "it may have ended meanwhile",
    GcpTrouble.OTHER: "run the command again; if it stays, leave GCP out with --clouds",
}


class GcpRefused(BackendError):
    """One call that failed: which, in which project, why, and what to do about it."""

    def __init__(self, operation: str, project: str, trouble: GcpTrouble, detail: str) -> None:
        self.trouble = trouble
        fact = _FACTS.get(trouble, "GCP refused")
        way_out = _WAYS_OUT[trouble].format(service=operation.split(".", maxsplit=1)[0], project=project or "PROJECT")
        said = " ".join(detail.split())[:200]
        super().__init__(f"{operation} in project {project or '(none)'}: {fact} ({said}); {way_out}.")


@dataclass(frozen=True, slots=True)
class GcpInstance:
    """One machine of ours, as Compute Engine has it."""

    number: str
    """Its id, which no later machine gets; names are used again."""
    name: str
    zone: str
    service_account: str
    """What it may act as; empty for one without."""
    lease: str
    """Its label `slm-lease`."""


class GcpAccount:
    """Questions to one project. May be used by several threads."""

    def __init__(
        self,
        credentials: Any = None,
        project: str = "",
        *,
        endpoint: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`credentials`, `project`: by default those of the environment; `endpoint`: another server than Google's."""
        self._credentials = credentials
        self._project = project
        self._endpoint = endpoint
        self._clock = clock
        self._ahead = timedelta(0)
        """By how much GCP's clock was ahead of this machine's in the newest reply."""
        self._local = threading.local()  # the library's connections serve one thread each
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """GCP's time: what is set there must not depend on this machine's clock."""
        return self._clock() + self._ahead

    @property
    def project(self) -> str:
        """Raises GcpRefused where the environment has no credentials or names no project."""
        self._require_credentials("auth.default")
        return self._project

    def ask(self, operation: str, request: Callable[[Any], Any]) -> dict[str, Any]:
        """The reply to one call: `operation` begins with its service, `request` makes it from the service's client.

        Raises:
            GcpRefused: Sorted by what to do about it.
        """
        self._require_credentials(operation)
        import google.auth.exceptions as auth_errors
        import googleapiclient.errors
        import httplib2

        try:
            call = request(self._client(operation.split(".", maxsplit=1)[0]))
            call.add_response_callback(self._learn_time)
            return dict(call.execute(num_retries=NUM_RETRIES) or {})
        except googleapiclient.errors.HttpError as error:
            trouble = trouble_of(int(error.resp.status), error.content.decode("utf-8", "replace"))
            raise GcpRefused(operation, self._project, trouble, f"{error.resp.status}: {error.reason}") from error
        except auth_errors.TransportError as error:
            raise GcpRefused(operation, self._project, GcpTrouble.NETWORK, str(error)) from error
        except auth_errors.GoogleAuthError as error:
            raise GcpRefused(operation, self._project, GcpTrouble.EXPIRED, str(error)) from error
        except (OSError, httplib2.HttpLib2Error) as error:
            raise GcpRefused(operation, self._project, GcpTrouble.NETWORK, str(error)) from error

    def pages(self, operation: str, request: Callable[[Any, str | None], Any]) -> Iterator[dict[str, Any]]:
        """Every page of a call that has several; `request` also takes the token of the page. Raises as `ask`."""

        def of_page(token: str | None) -> Callable[[Any], Any]:
            return lambda client: request(client, token)

        token = None
        while True:
            page = self.ask(operation, of_page(token))
            yield page
            token = page.get("nextPageToken")
            if not token:
                return

    def of_lease(self, label: str, project: str) -> list[GcpInstance]:
        """Every machine with this label `slm-lease`, in whatever zone and state. Raises GcpRefused."""
        wanted = f'labels.slm-lease="{label}"'
        pages = self.pages(
            "compute.instances.aggregatedList",
            lambda client, token: client.instances().aggregatedList(project=project, filter=wanted, pageToken=token),
        )
        places = (place for page in pages for place in page.get("items", {}).values())
        return [instance_of(item) for place in places for item in place.get("instances", ())]

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
                raise GcpRefused(operation, self._project, GcpTrouble.CREDENTIALS, str(error)) from error
            self._credentials = self._credentials or credentials
            self._project = self._project or project or ""
            if not self._project:
                detail = "the credentials name no project; set GOOGLE_CLOUD_PROJECT"
                raise GcpRefused(operation, "", GcpTrouble.CREDENTIALS, detail)

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

    def _learn_time(self, reply: Any) -> None:
        said = reply.get("date")
        if said:
            self._ahead = parsedate_to_datetime(said) - self._clock()


def instance_of(item: Mapping[str, Any]) -> GcpInstance:
    accounts = item.get("serviceAccounts") or ()
    return GcpInstance(
        number=str(item["id"]),
        name=str(item["name"]),
        zone=str(item["zone"]).rsplit("/", maxsplit=1)[-1],
        service_account=str(accounts[0]["email"]) if accounts else "",
        lease=str((item.get("labels") or {}).get("slm-lease", "")),
    )


def trouble_of(status: int, content: str) -> GcpTrouble:
    """Sorted by HTTP status and by the reason in the body (google.rpc.ErrorInfo)."""
    if status == HTTP_NOT_FOUND:
        return GcpTrouble.MISSING
    if status == HTTP_UNAUTHORIZED:
        return GcpTrouble.EXPIRED
    if status != HTTP_FORBIDDEN:
        return GcpTrouble.OTHER
    try:
        details = json.loads(content)["error"].get("details") or ()
        reasons = {detail.get("reason") for detail in details}
    except (ValueError, KeyError, AttributeError, TypeError):
        reasons = set()
    return GcpTrouble.DISABLED if "SERVICE_DISABLED" in reasons else GcpTrouble.DENIED

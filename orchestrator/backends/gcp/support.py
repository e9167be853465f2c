"""What a lease on GCP needs beside SkyPilot: a time limit, quotas, and why a machine is gone.

A machine's maxRunDuration cannot be set here: SkyPilot's template has none, and instances.setScheduling wants a stopped
machine. So Cloud Scheduler deletes the machine: one job per machine calls instances.delete at a minute that can be
moved; it works while the guest hangs and no supervisor is left. The job acts as the machine's own service account,
which SkyPilot gives the permission to.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from cost.ledger.leases import Lease
from orchestrator.backends.base import BackendError
from orchestrator.backends.gcp.account import GcpAccount, GcpInstance
from orchestrator.backends.provider_account import ProviderRefused, RefusalReason
from orchestrator.backends.sky.task import label

LOCATION = "us-central1"
"""Where the jobs are: not every region has Cloud Scheduler, and a job can delete machines of any region."""
JOB_PREFIX = "slm-end-"
COMPUTE = "https://compute.googleapis.com/compute/v1"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
SECONDS_PER_MINUTE = 60
LEAST_SECONDS = 60.0
"""The shortest limit: a job for a minute that has begun would run a year later."""
LATE = timedelta(minutes=1)
MOST_RETRIES = 5
"""As many as Cloud Scheduler allows."""
QUOTAS: Mapping[str, str] = {
    "T4": "NVIDIA_T4_GPUS",
    "V100": "NVIDIA_V100_GPUS",
    "P100": "NVIDIA_P100_GPUS",
    "L4": "NVIDIA_L4_GPUS",
    "A100-40GB": "NVIDIA_A100_GPUS",
    "A100-80GB-SXM": "NVIDIA_A100_80GB_GPUS",
    "H100-SXM": "NVIDIA_H100_GPUS",
}
"""A region's quotas by accelerator; spot machines count against `PREEMPTIBLE_` and this. What a region does not list
has a quota elsewhere, which is met at the create."""
Record = Mapping[str, Any]


class GcpSupport:
    """The `CloudSupport` of one GCP project."""

    terminators = frozenset({"cloud-scheduler-delete"})
    reads_prices = False

    def __init__(self, account: GcpAccount | None = None) -> None:
        self.account = account or GcpAccount()
        self._may_schedule = False

    def refusal(self, lease: Lease) -> str | None:
        """Why no job could be made there, or why the project's quota does not allow the lease; None where it does."""
        if not self._may_schedule:
            parent = self._parent(self.account.project)
            try:
                self._jobs("list", lambda jobs: jobs.list(parent=parent, pageSize=1))
            except ProviderRefused as refused:
                if refused.reason in (RefusalReason.DISABLED, RefusalReason.DENIED):
                    return f"nothing would end a hung node: {refused}"
                raise
            self._may_schedule = True
        return self._quota_refusal(lease)

    def limit(self, record: Record, lease: Lease, seconds: float) -> None:
        """Delete the lease's nodes `seconds` from now, at the next full minute, unless called again.

        Raises:
            BackendError: Not every node has its limit.
        """
        project = self._project(record)
        for instance in self.instances(record, lease):
            self.schedule(project, instance, seconds)

    def usd_per_hour(self, record: Record, lease: Lease) -> Decimal | None:  # noqa: ARG002
        """None: Compute Engine does not tell what a machine costs."""
        return None

    def why_gone(self, record: Record, lease: Lease) -> str:
        """Which of the nodes GCP preempted; empty where it does not tell."""
        try:
            project = self._project(record)
            nodes = self.instances(record, lease)
            preempted = [node.name for node in nodes if self._was_preempted(project, node)]
        except BackendError:
            return ""
        return "; ".join(f"{name} was preempted by GCP (compute.instances.preempted)" for name in preempted)

    def release(self, record: Record, lease: Lease) -> None:
        """Delete the jobs of nodes that are gone; one that cannot be deleted would find no machine."""
        with contextlib.suppress(BackendError):
            parent = self._parent(self._project(record))
            mine = f"{JOB_PREFIX}{label(lease.lease_id)}-"
            for name in [name for name in self._all_jobs(parent) if name.rsplit("/", maxsplit=1)[-1].startswith(mine)]:
                with contextlib.suppress(ProviderRefused):
                    self._jobs("delete", lambda jobs, name=name: jobs.delete(name=name))

    def instances(self, record: Record, lease: Lease) -> list[GcpInstance]:
        """The lease's machines in any zone and state, by our label."""
        return self.account.lease_instances(label(lease.lease_id), self._project(record))

    # -- the job -----------------------------------------------------------------------------------

    def schedule(self, project: str, instance: GcpInstance, seconds: float) -> None:
        """Make the job, or move the existing one, and read when it will run.

        Raises:
            BackendError: The machine has no service account, or the job would not run in time.
        """
        if not instance.service_account:
            raise BackendError(
                f"{instance.name} in {instance.zone} has no service account that could end it; end it: slm stop"
            )
        at = ends_at(self.account.now(), seconds)
        job = scheduler_job(project, instance, self._name(project, instance), at)
        fields = ",".join(field for field in job if field != "name")
        try:
            reply = self._jobs("patch", lambda jobs: jobs.patch(name=job["name"], updateMask=fields, body=job))
        except ProviderRefused as refused:
            if refused.reason is not RefusalReason.MISSING:
                raise
            reply = self._jobs("create", lambda jobs: jobs.create(parent=self._parent(project), body=job))
        if reply.get("state") == "PAUSED":  # a user paused it; an update does not resume it
            reply = self._jobs("resume", lambda jobs: jobs.resume(name=job["name"], body={}))
        runs_at = reply.get("scheduleTime")
        if reply.get("state") != "ENABLED" or not runs_at or datetime.fromisoformat(runs_at) > at + LATE:
            shown = f"{reply.get('state')}, runs at {runs_at or 'no time'}"
            raise BackendError(
                f"{instance.name} in {instance.zone}: Cloud Scheduler does not end it at {at:%H:%M} UTC "
                f"as asked ({shown})"
            )

    def _name(self, project: str, instance: GcpInstance) -> str:
        return f"{self._parent(project)}/jobs/{JOB_PREFIX}{instance.lease}-{instance.number}"

    def _all_jobs(self, parent: str) -> list[str]:
        def request(client: Any, token: str | None) -> Any:
            return client.projects().locations().jobs().list(parent=parent, pageSize=500, pageToken=token)

        pages = self.account.pages("cloudscheduler.jobs.list", request)
        return [str(job["name"]) for page in pages for job in page.get("jobs", ())]

    def _jobs(self, what: str, request: Any) -> dict[str, Any]:
        return self.account.ask(
            f"cloudscheduler.jobs.{what}", lambda client: request(client.projects().locations().jobs())
        )

    def _parent(self, project: str) -> str:
        return f"projects/{project}/locations/{LOCATION}"

    # -- the project -----------------------------------------------------------------------

    def _project(self, record: Record) -> str:
        """Where SkyPilot rented, else the environment's."""
        return str((record.get("provider_config") or {}).get("project_id") or self.account.project)

    def _quota_refusal(self, lease: Lease) -> str | None:
        offer = lease.offer
        metric = QUOTAS.get(offer.accelerator)
        if metric is None or not offer.region:
            return None
        metric = f"PREEMPTIBLE_{metric}" if offer.spot else metric
        project = self.account.project
        region = self.account.ask(
            "compute.regions.get", lambda client: client.regions().get(project=project, region=offer.region)
        )
        wanted = lease.num_nodes * offer.gpus_per_node
        for quota in region.get("quotas", ()):
            free = quota["limit"] - quota["usage"]
            if quota["metric"] == metric and free < wanted:
                return (
                    f"GCP allows {quota['limit']:g} {metric} in {offer.region}, {quota['usage']:g} are used and "
                    f"{wanted} are needed; ask for more at IAM & Admin, Quotas, or leave GCP out with --clouds"
                )
        return None

    def _was_preempted(self, project: str, instance: GcpInstance) -> bool:
        wanted = f'(operationType="compute.instances.preempted") AND (targetId={instance.number})'
        found = self.account.ask(
            "compute.zoneOperations.list",
            lambda client: client.zoneOperations().list(project=project, zone=instance.zone, filter=wanted),
        )
        return bool(found.get("items"))


def ends_at(now: datetime, seconds: float) -> datetime:
    """The full minute at which a job runs that is due `seconds` from now; never earlier."""
    wanted = now.timestamp() + max(seconds, LEAST_SECONDS)
    return datetime.fromtimestamp(math.ceil(wanted / SECONDS_PER_MINUTE) * SECONDS_PER_MINUTE, UTC)


def scheduler_job(project: str, instance: GcpInstance, name: str, at: datetime) -> dict[str, Any]:
    """The job as Cloud Scheduler takes it (cloudscheduler v1, Job). It would run again a year later, without effect."""
    return {
        "name": name,
        "description": "deletes a node whose paid time is over",
        "schedule": f"{at.minute} {at.hour} {at.day} {at.month} *",
        "timeZone": "Etc/UTC",
        "attemptDeadline": "60s",
        "retryConfig": {"retryCount": MOST_RETRIES, "minBackoffDuration": "5s", "maxBackoffDuration": "60s"},
        "httpTarget": {
            "uri": f"{COMPUTE}/projects/{project}/zones/{instance.zone}/instances/{instance.number}",
            "httpMethod": "DELETE",
            "oauthToken": {"serviceAccountEmail": instance.service_account, "scope": SCOPE},
        },
    }

"""AWS beside SkyPilot: calls through boto3, the instances of ours in an account, and their termination.

SkyPilot creates instances; this module does what SkyPilot has no function for, or what must work on a machine whose
SkyPilot does not know the instances. An instance is ours when its label `slm-lease`, or without one its cluster's name,
begins with `slm-`. boto3 is imported at the first call, and finds credentials and endpoints where AWS's own tools do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cost.ledger.leases import LEASE_PREFIX
from orchestrator.backends.provider_account import (
    LEASE_LABEL,
    ProviderAccount,
    ProviderRefused,
    RefusalReason,
    all_pages,
    utc_now,
)
from orchestrator.backends.sky.names import name_without_user

CLUSTER_TAG = "skypilot-cluster-name"
"""Which SkyPilot sets on each instance (sky/provision/constants.py)."""
ALIVE = ("pending", "running", "shutting-down", "stopping", "stopped")
"""States in which an instance, or at least its disk, may still be billed; only `terminated` is gone."""
FIRST_REGION = "us-east-1"
"""Where AWS is asked for its regions when no region is configured."""
MOST_REGIONS_AT_ONCE = 8
VERIFY_TRIES = 40
VERIFY_PAUSE_SECONDS = 3.0
"""Between looks at an instance that is to end: two minutes in all, as long as a shutdown may take."""
VENDOR_FILE = Path("/sys/class/dmi/id/sys_vendor")

FIXES: Mapping[RefusalReason, str] = {
    RefusalReason.CREDENTIALS: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run: aws configure",
    RefusalReason.EXPIRED: "renew the credentials, for example with: aws sso login",
    RefusalReason.DENIED: "give this user the policy that is printed by: slm doctor --iam",
    RefusalReason.NETWORK: "check this machine's network and AWS_ENDPOINT_URL, then run the command again",
    RefusalReason.QUOTA: "ask AWS for a higher quota (Service Quotas, EC2), or leave AWS out with --clouds",
    RefusalReason.CAPACITY: "another zone or machine may have some; the next offer is tried",
    RefusalReason.MISSING: "it may have ended meanwhile",
    RefusalReason.UNSUPPORTED: "leave AWS out with --clouds",
    RefusalReason.OTHER: "run the command again; if the error remains, leave AWS out with --clouds",
}
_BY_CODE: Mapping[str, RefusalReason] = {
    "AuthFailure": RefusalReason.CREDENTIALS,
    "InvalidClientTokenId": RefusalReason.CREDENTIALS,
    "InvalidAccessKeyId": RefusalReason.CREDENTIALS,
    "UnrecognizedClientException": RefusalReason.CREDENTIALS,
    "SignatureDoesNotMatch": RefusalReason.CREDENTIALS,
    "InvalidSignatureException": RefusalReason.CREDENTIALS,
    "ExpiredToken": RefusalReason.EXPIRED,
    "ExpiredTokenException": RefusalReason.EXPIRED,
    "RequestExpired": RefusalReason.EXPIRED,
    "UnauthorizedOperation": RefusalReason.DENIED,
    "AccessDenied": RefusalReason.DENIED,
    "AccessDeniedException": RefusalReason.DENIED,
    "OptInRequired": RefusalReason.DENIED,
    "VcpuLimitExceeded": RefusalReason.QUOTA,
    "MaxSpotInstanceCountExceeded": RefusalReason.QUOTA,
    "InstanceLimitExceeded": RefusalReason.QUOTA,
    "InsufficientInstanceCapacity": RefusalReason.CAPACITY,
    "SpotMaxPriceTooLow": RefusalReason.CAPACITY,
    "InvalidInstanceID.NotFound": RefusalReason.MISSING,
    "ResourceNotFoundException": RefusalReason.MISSING,
    "NoSuchResourceException": RefusalReason.MISSING,
    "NoSuchEntity": RefusalReason.MISSING,
    "UnsupportedOperation": RefusalReason.UNSUPPORTED,
}


@dataclass(frozen=True, slots=True)
class Ec2Instance:
    """One instance of ours, as DescribeInstances shows it."""

    instance_id: str
    region: str
    zone: str
    instance_type: str
    is_spot: bool
    state: str
    state_reason: str
    """For example `Server.SpotInstanceTermination`; empty while it runs."""
    launched_at: datetime
    lease: str
    """The label `slm-lease`, else the cluster's name."""


class AwsAccount(ProviderAccount):
    """The EC2 instances of one account. May be used by several threads."""

    provider = "AWS"
    fixes = FIXES

    def __init__(
        self,
        session: Any = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        verify_tries: int = VERIFY_TRIES,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`session`: a boto3 session; by default one from the environment and AWS's files."""
        super().__init__(clock)
        self._session = session
        self._sleep = sleep
        self._verify_tries = verify_tries
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    # -- one call --------------------------------------------------------------------------------

    def has_credentials(self) -> bool:
        """Whether the environment, AWS's files or the role of an EC2 machine provide some; no other network call."""
        import botocore.session

        if self._session is not None:
            return self._session.get_credentials() is not None
        session = botocore.session.Session()
        if not _is_ec2():  # the question to the metadata service takes seconds where there is none
            session.get_component("credential_provider").remove("iam-role")
        try:
            return session.get_credentials() is not None
        except Exception:  # a broken profile gives none; the first call says what is wrong with it
            return False

    def ask(self, service: str, region: str, operation: str, **arguments: Any) -> Any:
        """The reply to one call.

        Raises:
            ProviderRefused: Sorted by what can be done about it.
        """
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            reply = getattr(self._client(service, region), operation)(**arguments)
        except (ClientError, BotoCoreError, ResponseParserError) as error:
            reason, code = refusal_reason(error)
            raise self.refused(f"{service}:{operation}", region, reason, str(error), code=code) from error
        self.learn_clock_offset(reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
        return reply

    def pages(self, service: str, region: str, operation: str, **arguments: Any) -> Iterator[Any]:
        """Every page of a call to EC2 that answers in pages.

        Raises:
            ProviderRefused: As `ask`.
        """

        def fetch(token: str | None) -> Any:
            page = {} if token is None else {"NextToken": token}
            return self.ask(service, region, operation, **arguments, **page)

        return all_pages(fetch, "NextToken")

    def _client(self, service: str, region: str) -> Any:
        with self._lock:  # a session makes one client at a time; clients themselves serve all threads
            if (service, region) not in self._clients:
                from botocore.config import Config

                config = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "max_attempts": 4})
                self._clients[service, region] = self._made_session().client(service, region_name=region, config=config)
            return self._clients[service, region]

    def _made_session(self) -> Any:
        if self._session is None:
            import boto3

            self._session = boto3.session.Session()
        return self._session

    # -- our instances ---------------------------------------------------------------------------

    def regions(self) -> list[str]:
        """Those that this account may use."""
        session = self._made_session()
        configured = session.region_name or FIRST_REGION
        names = [region["RegionName"] for region in self.ask("ec2", configured, "describe_regions")["Regions"]]
        partition = session.get_partition_for_region(configured)
        return sorted(name for name in names if session.get_partition_for_region(name) == partition)

    def instances(self, regions: Iterable[str] | None = None) -> list[Ec2Instance]:
        """Every instance of ours that is not terminated, in all regions unless some are named.

        Raises:
            ProviderRefused: One of the regions could not be listed.
        """
        names = sorted(self.regions() if regions is None else set(regions))
        with ThreadPoolExecutor(MOST_REGIONS_AT_ONCE) as pool:
            results = list(pool.map(self._alive_in, names))
        denied = [result for result in results if isinstance(result, ProviderRefused)]
        if denied and len(denied) == len(results):
            raise denied[0]
        return [found for result in results if not isinstance(result, ProviderRefused) for found in result]

    def _alive_in(self, region: str) -> list[Ec2Instance] | ProviderRefused:
        """A region that this user may not list has no instance of this user; organisations close regions that way."""
        try:
            return list(self._labelled(region, states=ALIVE))
        except ProviderRefused as refused:
            if refused.reason is RefusalReason.DENIED:
                return refused
            raise

    def cluster_instances(self, region: str, *names: str) -> list[Ec2Instance]:
        """Instances in any state whose lease or cluster's name is among `names`."""
        wanted = {name_without_user(name) for name in names} | set(names)
        return [found for found in self._labelled(region) if found.lease in wanted or found.lease.lower() in wanted]

    def describe(self, region: str, instance_ids: Sequence[str]) -> dict[str, Ec2Instance]:
        """By id; an instance that AWS no longer knows is missing."""
        if not instance_ids:
            return {}
        # By a filter, since a call that names an unknown id is refused as a whole.
        filters = [{"Name": "instance-id", "Values": list(instance_ids)}]
        return {found.instance_id: found for found in self._matching(region, filters)}

    def _labelled(self, region: str, states: Sequence[str] | None = None) -> Iterator[Ec2Instance]:
        filters = [{"Name": "tag-key", "Values": [LEASE_LABEL, CLUSTER_TAG]}]
        if states is not None:
            filters.append({"Name": "instance-state-name", "Values": list(states)})
        return (found for found in self._matching(region, filters) if found.lease.startswith(LEASE_PREFIX))

    def _matching(self, region: str, filters: Sequence[Mapping[str, Any]]) -> Iterator[Ec2Instance]:
        for page in self.pages("ec2", region, "describe_instances", Filters=list(filters)):
            for reservation in page["Reservations"]:
                for raw in reservation["Instances"]:
                    yield _instance(raw, region)

    # -- termination -----------------------------------------------------------------------------

    def terminate(self, region: str, instance_ids: Sequence[str]) -> list[str]:
        """Terminate, wait until AWS confirms it, and return the ids that remain; quiet where there are none."""
        left = self._living(region, instance_ids)
        if left:
            self._terminate_each(region, left)
        for _ in range(self._verify_tries):
            left = self._living(region, left)
            if not left:
                break
            self._sleep(VERIFY_PAUSE_SECONDS)
        return left

    def _terminate_each(self, region: str, instance_ids: Sequence[str]) -> None:
        """In one call, or one by one where AWS refuses the whole call because of one id."""
        try:
            self.ask("ec2", region, "terminate_instances", InstanceIds=list(instance_ids))
        except ProviderRefused as refused:
            if refused.reason is not RefusalReason.MISSING:
                raise
            if len(instance_ids) > 1:
                for instance_id in instance_ids:
                    self._terminate_each(region, [instance_id])

    def _living(self, region: str, instance_ids: Sequence[str]) -> list[str]:
        """Those that run or may run again; an instance that is shutting down is no longer billed or waited for."""
        found = self.describe(region, instance_ids).values()
        return [instance.instance_id for instance in found if instance.state not in ("terminated", "shutting-down")]


def refusal_reason(error: BaseException) -> tuple[RefusalReason, str]:
    """The reason and AWS's own code; from that code where there is one, else from the kind of exception."""
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _BY_CODE.get(code) or _by_status(status), code
    name = type(error).__name__
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError, known.ProfileNotFound)):
        return RefusalReason.CREDENTIALS, name
    if isinstance(error, (known.TokenRetrievalError, known.SSOError, known.UnauthorizedSSOTokenError)):
        return RefusalReason.EXPIRED, name
    if isinstance(error, (known.HTTPClientError, ResponseParserError)):  # a page of something between us and AWS
        return RefusalReason.NETWORK, name
    return RefusalReason.OTHER, name


def _by_status(status: int) -> RefusalReason:
    if status >= 500:
        return RefusalReason.NETWORK
    return RefusalReason.DENIED if status == 403 else RefusalReason.OTHER


def _instance(raw: Mapping[str, Any], region: str) -> Ec2Instance:
    tags = {tag["Key"]: tag["Value"] for tag in raw.get("Tags", ())}
    return Ec2Instance(
        instance_id=raw["InstanceId"],
        region=region,
        zone=raw.get("Placement", {}).get("AvailabilityZone", ""),
        instance_type=raw["InstanceType"],
        is_spot=raw.get("InstanceLifecycle") == "spot",
        state=raw["State"]["Name"],
        state_reason=(raw.get("StateReason") or {}).get("Code", ""),
        launched_at=raw["LaunchTime"],
        lease=tags.get(LEASE_LABEL) or name_without_user(tags.get(CLUSTER_TAG, "")),
    )


def _is_ec2() -> bool:
    try:
        return "amazon" in VENDOR_FILE.read_text(encoding="utf-8").lower()
    except OSError:
        return False

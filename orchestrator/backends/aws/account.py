"""AWS beside SkyPilot: its interface with boto3, what of ours is in an account, and the end of it.

SkyPilot creates; here is what it has no function for, or what must work on a machine whose SkyPilot knows nothing.
Ours is an instance whose label `slm-lease`, or without one its cluster's name, begins with `slm-`. boto3 is imported
when the first question is asked, and finds credentials and endpoints where AWS's own tools do.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.backends.base import BackendError

PREFIX = "slm-"
LEASE_TAG = "slm-lease"
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
USER_HASH = re.compile(r"-[0-9a-f]{8}$")
"""What SkyPilot appends to a cluster's name at AWS."""
VENDOR_FILE = Path("/sys/class/dmi/id/sys_vendor")


class AwsTrouble(StrEnum):
    """Why AWS did not do it."""

    CREDENTIALS = "credentials"
    EXPIRED = "expired"
    DENIED = "denied"
    NETWORK = "network"
    QUOTA = "quota"
    CAPACITY = "capacity"
    MISSING = "missing"
    UNSUPPORTED = "unsupported"
    OTHER = "other"


WAYS_OUT: Mapping[AwsTrouble, str] = {
    AwsTrouble.CREDENTIALS: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run: aws configure",
    AwsTrouble.EXPIRED: "renew the credentials, for example with: aws sso login",
    AwsTrouble.DENIED: "give this user the policy that is printed by: slm doctor --iam",
    AwsTrouble.NETWORK: "look at this machine's network and at AWS_ENDPOINT_URL, then run the command again",
    AwsTrouble.QUOTA: "ask AWS for a higher quota (Service Quotas, EC2), or leave AWS out with --clouds",
    AwsTrouble.CAPACITY: "another zone or machine may have some; the next offer is tried",
    AwsTrouble.MISSING: "it may have ended meanwhile",
    AwsTrouble.UNSUPPORTED: "leave AWS out with --clouds",
    AwsTrouble.OTHER: "run the command again; if it stays, leave AWS out with --clouds",
}
_BY_CODE: Mapping[str, AwsTrouble] = {
    "AuthFailure": AwsTrouble.CREDENTIALS,
    "InvalidClientTokenId": AwsTrouble.CREDENTIALS,
    "InvalidAccessKeyId": AwsTrouble.CREDENTIALS,
    "UnrecognizedClientException": AwsTrouble.CREDENTIALS,
    "SignatureDoesNotMatch": AwsTrouble.CREDENTIALS,
    "InvalidSignatureException": AwsTrouble.CREDENTIALS,
    "ExpiredToken": AwsTrouble.EXPIRED,
    "ExpiredTokenException": AwsTrouble.EXPIRED,
    "RequestExpired": AwsTrouble.EXPIRED,
    "UnauthorizedOperation": AwsTrouble.DENIED,
    "AccessDenied": AwsTrouble.DENIED,
    "AccessDeniedException": AwsTrouble.DENIED,
    "OptInRequired": AwsTrouble.DENIED,
    "VcpuLimitExceeded": AwsTrouble.QUOTA,
    "MaxSpotInstanceCountExceeded": AwsTrouble.QUOTA,
    "InstanceLimitExceeded": AwsTrouble.QUOTA,
    "InsufficientInstanceCapacity": AwsTrouble.CAPACITY,
    "SpotMaxPriceTooLow": AwsTrouble.CAPACITY,
    "InvalidInstanceID.NotFound": AwsTrouble.MISSING,
    "ResourceNotFoundException": AwsTrouble.MISSING,
    "NoSuchResourceException": AwsTrouble.MISSING,
    "NoSuchEntity": AwsTrouble.MISSING,
    "UnsupportedOperation": AwsTrouble.UNSUPPORTED,
}
_PLAIN_FACTS: Mapping[AwsTrouble, str] = {
    AwsTrouble.CREDENTIALS: "AWS does not accept the credentials",
    AwsTrouble.EXPIRED: "the AWS credentials have expired",
    AwsTrouble.DENIED: "these AWS credentials may not do it",
    AwsTrouble.NETWORK: "AWS does not answer",
}


class AwsRefused(BackendError):
    """One call that failed: which, where, why, and what to do about it."""

    def __init__(self, operation: str, region: str, trouble: AwsTrouble, code: str, detail: str) -> None:
        self.trouble = trouble
        self.code = code
        fact = _PLAIN_FACTS.get(trouble, "AWS refused")
        said = " ".join(detail.split())[:200]
        super().__init__(f"{operation} in {region}: {fact} ({code or 'no code'}: {said}); {WAYS_OUT[trouble]}.")


@dataclass(frozen=True, slots=True)
class Ec2Instance:
    """One instance of ours, as DescribeInstances has it."""

    instance_id: str
    region: str
    zone: str
    instance_type: str
    is_spot: bool
    state: str
    why: str
    """StateReason, for example `Server.SpotInstanceTermination`; empty while it runs."""
    launched_at: datetime
    lease: str
    """The label `slm-lease`, else the cluster's name."""


class AwsAccount:
    """Clients of one account, and the questions that name no lease. May be used by several threads."""

    def __init__(
        self,
        session: Any = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        verify_tries: int = VERIFY_TRIES,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`session`: a boto3 session; by default one as the environment and AWS's files say."""
        self._session = session
        self._sleep = sleep
        self._verify_tries = verify_tries
        self._clock = clock
        self._ahead = timedelta(0)
        """By how much AWS's clock was ahead of this machine's in the newest reply."""
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    # -- one call --------------------------------------------------------------------------------

    def has_credentials(self) -> bool:
        """Whether the environment, AWS's files, or the role of an EC2 machine give some; asks no network elsewhere."""
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

    def now(self) -> datetime:
        """AWS's time: what is set there must not depend on this machine's clock."""
        return self._clock() + self._ahead

    def ask(self, service: str, region: str, operation: str, **arguments: Any) -> Any:
        """The reply to one call.

        Raises:
            AwsRefused: Sorted by what to do about it.
        """
        with translated(f"{service}:{operation}", region):
            reply = getattr(self._client(service, region), operation)(**arguments)
            self._learn_time(reply)
            return reply

    def pages(self, service: str, region: str, operation: str, **arguments: Any) -> Iterator[Any]:
        """Every page of a call that has several.

        Raises:
            AwsRefused: As `ask`.
        """
        with translated(f"{service}:{operation}", region):
            for page in self._client(service, region).get_paginator(operation).paginate(**arguments):
                self._learn_time(page)
                yield page

    def _learn_time(self, reply: Any) -> None:
        said = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if said:
            self._ahead = parsedate_to_datetime(said) - self._clock()

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

    # -- what of ours is there -----------------------------------------------------------------------

    def regions(self) -> list[str]:
        """Those that this account may use."""
        session = self._made_session()
        configured = session.region_name or FIRST_REGION
        found = [item["RegionName"] for item in self.ask("ec2", configured, "describe_regions")["Regions"]]
        partition = session.get_partition_for_region(configured)
        return sorted(entry for entry in found if session.get_partition_for_region(entry) == partition)

    def instances(self, regions: Iterable[str] | None = None) -> list[Ec2Instance]:
        """Everything of ours that is not terminated, in all regions unless some are named.

        Raises:
            AwsRefused: One of them could not be looked at.
        """
        places = sorted(self.regions() if regions is None else set(regions))
        with ThreadPoolExecutor(MOST_REGIONS_AT_ONCE) as pool:
            seen = list(pool.map(self._alive_in, places))
        closed = [entry for entry in seen if isinstance(entry, AwsRefused)]
        if closed and len(closed) == len(seen):
            raise closed[0]
        return [item for several in seen if not isinstance(several, AwsRefused) for item in several]

    def _alive_in(self, region: str) -> list[Ec2Instance] | AwsRefused:
        """A region that this user may not even look at holds nothing of his; organisations close those they shun."""
        try:
            return list(self._in_region(region, states=ALIVE))
        except AwsRefused as refused:
            if refused.trouble is AwsTrouble.DENIED:
                return refused
            raise

    def of_cluster(self, region: str, *names: str) -> list[Ec2Instance]:
        """Instances in any state whose lease or cluster's name is one of `names`."""
        wanted = {USER_HASH.sub("", name) for name in names} | set(names)
        return [item for item in self._in_region(region) if item.lease in wanted or item.lease.lower() in wanted]

    def look_at(self, region: str, instance_ids: Sequence[str]) -> dict[str, Ec2Instance]:
        """By id; one that AWS no longer knows is missing."""
        found: dict[str, Ec2Instance] = {}
        filters = [{"Name": "instance-id", "Values": list(instance_ids)}]  # a filter, as an unknown id refuses the call
        for page in self.pages("ec2", region, "describe_instances", Filters=filters) if instance_ids else ():
            for reservation in page["Reservations"]:
                for raw in reservation["Instances"]:
                    found[raw["InstanceId"]] = _instance_of(raw, region, tags_of(raw))
        return found

    def _in_region(self, region: str, states: Sequence[str] | None = None) -> Iterator[Ec2Instance]:
        filters = [{"Name": "tag-key", "Values": [LEASE_TAG, CLUSTER_TAG]}]
        if states is not None:
            filters.append({"Name": "instance-state-name", "Values": list(states)})
        for page in self.pages("ec2", region, "describe_instances", Filters=filters):
            for reservation in page["Reservations"]:
                for raw in reservation["Instances"]:
                    tags = tags_of(raw)
                    if (tags.get(LEASE_TAG) or tags.get(CLUSTER_TAG, "")).startswith(PREFIX):
                        yield _instance_of(raw, region, tags)

    # -- the end of it --------------------------------------------------------------------------------

    def terminate(self, region: str, instance_ids: Sequence[str]) -> list[str]:
        """Terminate, look until AWS says that it is so, and return what is still there; quiet where nothing is."""
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
        """In one call, or one by one where AWS refuses all because of one."""
        try:
            self.ask("ec2", region, "terminate_instances", InstanceIds=list(instance_ids))
        except AwsRefused as refused:
            if refused.trouble is not AwsTrouble.MISSING or len(instance_ids) == 1:
                if refused.trouble is AwsTrouble.MISSING:
                    return
                raise
            for item in instance_ids:
                self._terminate_each(region, [item])

    def _living(self, region: str, instance_ids: Sequence[str]) -> list[str]:
        """Those that still run or may run again; one that is shutting down is billed no more, and is not waited for."""
        seen = self.look_at(region, instance_ids)
        return [name for name, what in seen.items() if what.state not in ("terminated", "shutting-down")]


class translated:  # noqa: N801 - read as a statement
    """Turns what botocore raises into an `AwsRefused`."""

    def __init__(self, operation: str, region: str) -> None:
        self._operation, self._region = operation, region

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if error is None:
            return
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        if isinstance(error, (ClientError, BotoCoreError, ResponseParserError)):
            trouble, code = trouble_of(error)
            raise AwsRefused(self._operation, self._region, trouble, code, str(error)) from error


def trouble_of(error: BaseException) -> tuple[AwsTrouble, str]:
    """By AWS's own code where there is one, else by the kind of exception."""
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _BY_CODE.get(code) or _by_status(status), code
    name = type(error).__name__
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError, known.ProfileNotFound)):
        return AwsTrouble.CREDENTIALS, name
    if isinstance(error, (known.TokenRetrievalError, known.SSOError, known.UnauthorizedSSOTokenError)):
        return AwsTrouble.EXPIRED, name
    if isinstance(error, (known.HTTPClientError, ResponseParserError)):  # a page of something between us and AWS
        return AwsTrouble.NETWORK, name
    return AwsTrouble.OTHER, name


def _by_status(status: int) -> AwsTrouble:
    if status >= 500:
        return AwsTrouble.NETWORK
    return AwsTrouble.DENIED if status == 403 else AwsTrouble.OTHER


def tags_of(raw: Mapping[str, Any]) -> dict[str, str]:
    """Of an instance as DescribeInstances has it."""
    return {item["Key"]: item["Value"] for item in raw.get("Tags", ())}


def _instance_of(raw: Mapping[str, Any], region: str, tags: Mapping[str, str]) -> Ec2Instance:
    return Ec2Instance(
        instance_id=raw["InstanceId"],
        region=region,
        zone=raw.get("Placement", {}).get("AvailabilityZone", ""),
        instance_type=raw["InstanceType"],
        is_spot=raw.get("InstanceLifecycle") == "spot",
        state=raw["State"]["Name"],
        why=(raw.get("StateReason") or {}).get("Code", ""),
        launched_at=raw["LaunchTime"],
        lease=tags.get(LEASE_TAG) or USER_HASH.sub("", tags.get(CLUSTER_TAG, "")),
    )


def _is_ec2() -> bool:
    try:
        return "amazon" in VENDOR_FILE.read_text(encoding="utf-8").lower()
    except OSError:
        return False

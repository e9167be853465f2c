"""EC2's spot prices now, and its quotas: how many vCPUs an account may run of a kind of machine.

A quota is no lack of capacity: waiting does not help, and it is known before anything is requested.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from orchestrator.backends.aws.account import AwsAccount
from orchestrator.backends.provider_account import ProviderRefused, RefusalReason

PRODUCT = "Linux/UNIX"
_FAMILY = re.compile(r"([a-z]+)(\d+)")
STANDARD = frozenset("acdhimrtz")


@dataclass(frozen=True, slots=True)
class VcpuQuota:
    """The quota of one region and kind of machines, in vCPUs."""

    code: str
    limit: int
    in_use: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.in_use)


class Ec2Market:
    """Prices and quotas of one account."""

    def __init__(self, account: AwsAccount) -> None:
        self._account = account
        self._vcpus: dict[tuple[str, str], int] = {}

    def spot_usd_per_hour(self, region: str, zone: str, instance_type: str) -> Decimal | None:
        """What a spot machine of this type costs in this zone now; None where AWS has no history of it.

        With a start and an end that are both now, AWS gives the newest change before.
        """
        moment = self._account.now()
        newest: tuple[datetime, Decimal] | None = None
        for page in self._account.pages(
            "ec2",
            region,
            "describe_spot_price_history",
            InstanceTypes=[instance_type],
            ProductDescriptions=[PRODUCT],
            AvailabilityZone=zone,
            StartTime=moment,
            EndTime=moment,
        ):
            for quote in page["SpotPriceHistory"]:
                is_this = quote["InstanceType"] == instance_type and quote["AvailabilityZone"] == zone
                if is_this and (newest is None or quote["Timestamp"] > newest[0]):
                    newest = (quote["Timestamp"], Decimal(quote["SpotPrice"]))
        return None if newest is None else newest[1]

    def vcpus(self, region: str, instance_type: str) -> int:
        """The vCPUs of one machine of this type."""
        if (region, instance_type) not in self._vcpus:
            found = self._account.ask("ec2", region, "describe_instance_types", InstanceTypes=[instance_type])
            self._vcpus[region, instance_type] = int(found["InstanceTypes"][0]["VCpuInfo"]["DefaultVCpus"])
        return self._vcpus[region, instance_type]

    def quota(self, region: str, instance_type: str, *, spot: bool) -> VcpuQuota | None:
        """The limit that machines of this type count against, and what runs against it; None where it is unknown."""
        code = quota_code(instance_type, spot=spot)
        if code is None:
            return None
        try:
            found = self._account.ask("service-quotas", region, "get_service_quota", ServiceCode="ec2", QuotaCode=code)
        except ProviderRefused as refused:
            if refused.reason is RefusalReason.MISSING:
                return None
            raise
        limit = int(found["Quota"]["Value"])
        same_kind = self._running(region, lambda kind, is_spot: is_spot == spot and quota_code(kind, spot=spot) == code)
        return VcpuQuota(code, limit, sum(self.vcpus(region, kind) for kind in same_kind) if limit else 0)

    def refusal(self, region: str, instance_type: str, *, spot: bool, num_nodes: int) -> str | None:
        """Why this account cannot run so many machines; None where it can, or where that is unknown."""
        try:
            quota = self.quota(region, instance_type, spot=spot)
            needed = num_nodes * self.vcpus(region, instance_type) if quota is not None else 0
        except ProviderRefused as refused:
            if refused.reason is RefusalReason.DENIED:  # the request for machines will tell
                return None
            raise
        if quota is None or needed <= quota.free:
            return None
        kind = "spot" if spot else "on-demand"
        used = f", of which {quota.in_use} are in use" if quota.in_use else ""
        return (
            f"aws {region}: {num_nodes} x {instance_type} need {needed} {kind} vCPUs, and this account's quota "
            f"{quota.code} is {quota.limit}{used}; ask for more in Service Quotas, or leave it out with --clouds or "
            "--gpus"
        )

    def _running(self, region: str, counts: Callable[[str, bool], bool]) -> list[str]:
        """Types of all machines of the account that count against a quota, whoever started them."""
        filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        return [
            raw["InstanceType"]
            for page in self._account.pages("ec2", region, "describe_instances", Filters=filters)
            for reservation in page["Reservations"]
            for raw in reservation["Instances"]
            if counts(raw["InstanceType"], raw.get("InstanceLifecycle") == "spot")
        ]


def quota_code(instance_type: str, *, spot: bool) -> str | None:
    """The code of the vCPU quota that a machine type counts against; None where it is unknown.

    Source: the list of EC2's quotas in Service Quotas (docs.aws.amazon.com general/latest/gr/ec2-service.html).
    """
    parts = _FAMILY.match(instance_type)
    if parts is None:
        return None
    family, generation = parts[1], int(parts[2])
    if family == "p":
        if not spot:
            return "L-417A185B"
        return {2: "L-7212CCBC", 3: "L-7212CCBC", 4: "L-7212CCBC", 5: "L-C4BD4855"}.get(generation)
    if family in ("g", "vt", "gr"):
        return "L-3819A6DF" if spot else "L-DB2E81BA"
    if family in STANDARD or (family[0] in STANDARD and family not in ("dl", "hpc", "inf", "mac", "trn")):
        return "L-34B43A08" if spot else "L-1216C47A"
    return None

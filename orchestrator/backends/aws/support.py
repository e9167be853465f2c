"""What a lease on AWS needs beside SkyPilot, and a backend that lists and terminates all our instances in an account.

A lease's record in the run store tells where its instances are (region, zone, instance type, ids, the cluster's name
at AWS); what it does not tell is found by our labels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from cost.ledger.leases import Lease, run_id_from_lease_id
from cost.market.offers import Offer
from orchestrator.backends.aws.account import AwsAccount, Ec2Instance
from orchestrator.backends.aws.spot_market import Ec2Market
from orchestrator.backends.aws.time_limit import Ec2Limit
from orchestrator.backends.base import BackendError, Instance, LeasePhase, LeaseState
from orchestrator.backends.provider_account import ProviderRefused
from orchestrator.backends.sky.task import label

PRICE_SECONDS = 60.0
"""How long a price is used before it is read again; AWS changes prices a few times a day."""
PREEMPTED = frozenset({"Server.SpotInstanceTermination", "Server.SpotInstanceShutdown", "Server.SpotInstanceStop"})
"""StateReason codes of an interruption (docs.aws.amazon.com AWSEC2 finding-an-interrupted-Spot-Instance)."""
Record = Mapping[str, Any]


class AwsSupport:
    """The `CloudSupport` of one AWS account."""

    terminators = frozenset({"eventbridge-terminate"})
    reads_prices = True

    def __init__(self, account: AwsAccount | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.account = account or AwsAccount()
        self.limits = Ec2Limit(self.account)
        self.market = Ec2Market(self.account)
        self._clock = clock
        self._prices: dict[tuple[str, str, str], tuple[float, Decimal | None]] = {}

    def refusal(self, lease: Lease) -> str | None:
        """Why this account's quota does not allow the lease; None where it does."""
        offer = lease.offer
        if not offer.instance_type:
            return None
        return self.market.refusal(offer.region, offer.instance_type, spot=offer.spot, num_nodes=lease.num_nodes)

    def limit(self, record: Record, lease: Lease, seconds: float) -> None:
        """Terminate the lease's nodes `seconds` from now unless called again.

        Raises:
            BackendError: Not every node has its limit.
        """
        living = [instance for instance in self.instances(record, lease) if instance.state in ("pending", "running")]
        self.limits.arm(lease_region(record, lease), living, seconds)

    def usd_per_hour(self, record: Record, lease: Lease) -> Decimal | None:
        """What one spot node costs now; None if AWS does not tell, and for on-demand, whose price does not change."""
        if not lease.offer.spot:
            return None
        region = lease_region(record, lease)
        zone = record.get("zone") or lease.offer.zone
        kind = record.get("instance_type") or lease.offer.instance_type
        if not zone or not kind:
            there = self.instances(record, lease)
            if not there:
                return None
            zone, kind = there[0].zone, there[0].instance_type
        key = (region, str(zone), str(kind))
        at, price = self._prices.get(key, (float("-inf"), None))
        if self._clock() - at >= PRICE_SECONDS:
            try:
                price = self.market.spot_usd_per_hour(*key)
            except ProviderRefused:
                return None  # an unconfirmed price is charged at its bound
            self._prices[key] = (self._clock(), price)
        return price

    def why_gone(self, record: Record, lease: Lease) -> str:
        """Why AWS ended the nodes; empty where it no longer tells."""
        try:
            ended = [
                instance
                for instance in self.instances(record, lease)
                if instance.state in ("shutting-down", "terminated")
            ]
        except BackendError:
            return ""
        return "; ".join(f"{instance.instance_id} {end_reason(instance)}" for instance in ended)

    def release(self, record: Record, lease: Lease) -> None:
        """Delete the schedules of nodes that are gone; one that cannot be deleted deletes itself after it has run."""
        with contextlib.suppress(BackendError):
            ids = [instance.instance_id for instance in self.instances(record, lease)] or recorded_ids(record)
            self.limits.release(lease_region(record, lease), ids)

    def instances(self, record: Record, lease: Lease) -> list[Ec2Instance]:
        """The lease's instances in any state: by id where the record has all ids, else by our labels."""
        region, ids = lease_region(record, lease), recorded_ids(record)
        if len(ids) >= lease.num_nodes:
            return list(self.account.describe(region, ids).values())
        names = {lease.lease_id, label(lease.lease_id), record.get("name_on_cloud") or lease.lease_id}
        return self.account.cluster_instances(region, *names)


class AwsInstances:
    """Every instance of ours in the account, as a backend that lists and terminates, and rents nothing.

    `known_leases`: of the ledger, read after the list; a label may be a shortened name, so they tell the whole one.
    `is_expected`: whether anything was rented here, so that a list that is refused is an error; otherwise the
    credentials are simply not meant for EC2.
    """

    name = "aws"

    def __init__(
        self,
        account: AwsAccount,
        *,
        known_leases: Callable[[], Sequence[str]] = lambda: (),
        is_expected: Callable[[], bool] = lambda: True,
    ) -> None:
        self._support = AwsSupport(account)
        self._account = account
        self._known_leases = known_leases
        self._is_expected = is_expected

    def offers(self) -> Sequence[Offer]:
        return ()

    def start(self, lease: Lease, command: Sequence[str]) -> None:  # noqa: ARG002
        raise BackendError(f"{lease.lease_id}: machines on AWS are rented through --backend sky.")

    def extend(self, lease: Lease, seconds: float) -> None:
        """Nothing: the backend that rents moves the limit."""

    def poll(self, lease: Lease) -> LeaseState:
        alive = self._lease_instances(lease.lease_id)
        if not alive:
            return LeaseState(LeasePhase.GONE)
        phase = LeasePhase.RUNNING if all(instance.state == "running" for instance in alive) else LeasePhase.STARTING
        return LeaseState(phase, tuple(range(len(alive))))

    def list_alive(self) -> Sequence[Instance]:
        alive = self._billed_instances()  # before the ledger is read, so that a lease written meanwhile is known
        leases = {label(known): known for known in self._known_leases()}
        by_name: dict[str, list[Ec2Instance]] = {}
        for found in alive:
            by_name.setdefault(leases.get(found.lease, found.lease), []).append(found)
        return [
            Instance(
                found.instance_id,
                name,
                run_id_from_lease_id(name),
                rank,
                self._usd_per_hour(found),
                found.launched_at,
            )
            for name, nodes in sorted(by_name.items())
            for rank, found in enumerate(sorted(nodes, key=lambda node: (node.launched_at, node.instance_id)))
        ]

    def stop(self, lease: Lease) -> None:
        alive = self._lease_instances(lease.lease_id)
        left: list[str] = []
        for region in sorted({instance.region for instance in alive}):
            ids = [instance.instance_id for instance in alive if instance.region == region]
            left += self._account.terminate(region, ids)
            with contextlib.suppress(BackendError):
                self._support.limits.release(region, ids)
        if left:
            raise BackendError(f"{lease.lease_id}: AWS still shows {', '.join(left)}.")

    def _billed_instances(self) -> list[Ec2Instance]:
        """All instances of ours that cost money.

        Raises:
            ProviderRefused: AWS did not list them, and there may be some.
        """
        try:
            return [instance for instance in self._account.instances() if instance.state != "shutting-down"]
        except ProviderRefused:
            if self._is_expected():
                raise
            return []

    def _lease_instances(self, lease_id: str) -> list[Ec2Instance]:
        names = {lease_id, label(lease_id)}
        return [found for found in self._billed_instances() if found.lease in names]

    def _usd_per_hour(self, instance: Ec2Instance) -> Decimal:
        """The price now; 0 where AWS does not tell, since what to terminate does not depend on it."""
        if not instance.is_spot:
            return Decimal(0)
        try:
            return self._support.market.spot_usd_per_hour(
                instance.region, instance.zone, instance.instance_type
            ) or Decimal(0)
        except ProviderRefused:
            return Decimal(0)


def end_reason(instance: Ec2Instance) -> str:
    """Why an instance ended, in words."""
    if was_preempted(instance):
        return f"was preempted by AWS ({instance.state_reason})"
    if instance.state_reason == "Client.InstanceInitiatedShutdown":
        return f"was powered off from inside ({instance.state_reason})"
    return f"was terminated ({instance.state_reason or 'AWS gives no reason'})"


def was_preempted(instance: Ec2Instance) -> bool:
    """Whether AWS interrupted it."""
    return instance.state_reason in PREEMPTED


def lease_region(record: Record, lease: Lease) -> str:
    """Where the lease's nodes are, or were asked for."""
    return str(record.get("region") or lease.offer.region)


def recorded_ids(record: Record) -> list[str]:
    """Instance ids that the record has."""
    names = [str(name) for name, *_ in record.get("instances") or ()]
    return [name for name in names if name.startswith("i-")]

"""Our ledger next to SkyPilot's own cost report, lease by lease; neither corrects the other.

SkyPilot multiplies the catalog's price by the time that it believes a cluster was up, on the machine that launched it.
Ours charges from the order to the confirmed end at the price that was read, so ours is expected to be higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import usd
from orchestrator.backends.base import BackendError
from orchestrator.backends.sky.names import cluster_name

SECONDS = 60.0
"""Longest wait for SkyPilot's report."""
OLDEST_DAYS = 365


class CallSkyPilot(Protocol):
    """As `SkyClient.call`."""

    def call(self, name: str, *, seconds: float, **arguments: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class LeaseCost:
    """`skypilot_usd` is None where SkyPilot on this machine does not know the cluster."""

    lease_id: str
    cluster: str
    charged_usd: Decimal
    skypilot_usd: Decimal | None

    @property
    def difference_usd(self) -> Decimal | None:
        """Ours less SkyPilot's."""
        return None if self.skypilot_usd is None else self.charged_usd - self.skypilot_usd


@dataclass(frozen=True, slots=True)
class Comparison:
    """`problem`: why SkyPilot did not answer; its amounts are then missing."""

    leases: tuple[LeaseCost, ...]
    problem: str = ""

    @property
    def both_usd(self) -> tuple[Decimal, Decimal]:
        """Ours and SkyPilot's, summed over the leases that both know."""
        known = [lease for lease in self.leases if lease.skypilot_usd is not None]
        theirs = sum((lease.skypilot_usd or Decimal(0) for lease in known), Decimal(0))
        return sum((lease.charged_usd for lease in known), Decimal(0)), theirs


def compare(accounts: Sequence[LeaseAccount], client: CallSkyPilot) -> Comparison:
    """Every lease of a run; one cluster may have been up several times."""
    names = {account.lease.lease_id: cluster_name(account.lease.lease_id) for account in accounts}
    problem, theirs = "", dict[str, Decimal]()
    try:
        reply = client.call("costs", seconds=SECONDS, clusters=sorted(names.values()), days=OLDEST_DAYS)
    except BackendError as error:
        problem = str(error)
    else:
        for cost in reply["costs"]:
            theirs[cost["cluster"]] = theirs.get(cost["cluster"], Decimal(0)) + Decimal(str(cost["usd"]))
    leases = [
        LeaseCost(lease_id, names[lease_id], usd(account.spent_micro_usd), theirs.get(names[lease_id]))
        for account in accounts
        for lease_id in (account.lease.lease_id,)
    ]
    return Comparison(tuple(leases), problem)

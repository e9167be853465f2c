"""The ledger's account of a lease and of an incidental cost, with their rows in SQLite.

Invariant: what an account has spent and holds follows from its own fields, so that an account can be copied from one
place to another and the ledger entries corrected to match it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

from cost.ledger.leases import FIRST_STAGE, Lease, cost_units, units_to_micro_usd, usd
from cost.market.offers import Offer

OPEN, SETTLED = "open", "settled"


@dataclass(frozen=True, slots=True)
class LeaseAccount:
    """The ledger's view of a lease. Times are billed milliseconds since 1970."""

    lease: Lease
    state: str
    num_nodes: int
    price_micro_usd: int
    worst_micro_usd: int
    latency_ms: int
    started_ms: int
    accrued_until_ms: int
    expires_ms: int
    ended_ms: int | None
    accrued_units: int
    outcome: str
    minimum_ms: int = 0
    """The shortest time that the provider bills for a node."""
    floor_ms: int = 0
    """The newest node is billed until this moment even if it ends earlier."""

    @property
    def is_open(self) -> bool:
        return self.state == OPEN

    @property
    def last_billed_ms(self) -> int:
        """The latest billable moment: when the slowest terminator ends it, or the shortest billed time ends."""
        return max(self.expires_ms + self.latency_ms, self.floor_ms)

    @property
    def spent_micro_usd(self) -> int:
        return units_to_micro_usd(self.accrued_units)

    @property
    def held_micro_usd(self) -> int:
        """What it can still cost: p̂ · nodes · (K + κ - t_r), zero once settled.

        Spent and held are rounded up together, so that moving from one to the other never raises their sum.
        """
        if not self.is_open:
            return 0
        future_units = cost_units(self.worst_micro_usd, self.num_nodes, self.last_billed_ms - self.accrued_until_ms)
        return units_to_micro_usd(self.accrued_units + future_units) - self.spent_micro_usd


@dataclass(frozen=True, slots=True)
class Line:
    """An incidental cost (storage, egress, the final download): estimated first, charged as it arises."""

    name: str
    reserved_micro_usd: int
    spent_micro_usd: int

    @property
    def held_micro_usd(self) -> int:
        return max(0, self.reserved_micro_usd - self.spent_micro_usd)


def merged(known: LeaseAccount, incoming: LeaseAccount, *, its_state_counts: bool) -> LeaseAccount:
    """Two accounts of one lease as one that covers both: the later expiry, the more nodes, the longer accrual.

    `its_state_counts`: `incoming` comes from a supervisor that took over after `known` was written.
    """
    if not incoming.is_open and (its_state_counts or known.is_open):
        return incoming
    if not known.is_open and not its_state_counts:
        return known
    further = max(known, incoming, key=lambda entry: (entry.accrued_until_ms, entry.accrued_units))
    return replace(
        incoming,
        num_nodes=max(known.num_nodes, incoming.num_nodes) if known.is_open else incoming.num_nodes,
        expires_ms=max(known.expires_ms, incoming.expires_ms),
        floor_ms=max(known.floor_ms, incoming.floor_ms),
        price_micro_usd=further.price_micro_usd,
        accrued_until_ms=further.accrued_until_ms,
        accrued_units=further.accrued_units,
    )


# -- rows ----------------------------------------------------------------------------------------------

COLUMNS = (
    "lease_id",
    "run_id",
    "attempt",
    "offer_json",
    "nodes_asked",
    "state",
    "num_nodes",
    "price_micro_usd",
    "worst_micro_usd",
    "latency_ms",
    "first_grant_seconds",
    "kill_latency_seconds",
    "started_ms",
    "accrued_until_ms",
    "expires_ms",
    "ended_ms",
    "accrued_units",
    "outcome",
    "minimum_ms",
    "floor_ms",
    "ttl_seconds",
    "stage",
)
_PUT = (
    f"INSERT INTO leases ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    f"ON CONFLICT (lease_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[5:])}"
)


def put(db: sqlite3.Connection, account: LeaseAccount) -> None:
    """Write the account, new or changed."""
    row = account_row(account)
    db.execute(_PUT, [row[name] for name in COLUMNS])


def account_row(account: LeaseAccount) -> dict[str, Any]:
    """The account as a row, which is also its form in the run store."""
    lease = account.lease
    return {
        "lease_id": lease.lease_id,
        "run_id": lease.run_id,
        "attempt": lease.attempt,
        "offer_json": offer_text(lease.offer),
        "nodes_asked": lease.num_nodes,
        "state": account.state,
        "num_nodes": account.num_nodes,
        "price_micro_usd": account.price_micro_usd,
        "worst_micro_usd": account.worst_micro_usd,
        "latency_ms": account.latency_ms,
        "first_grant_seconds": lease.first_grant_seconds,
        "kill_latency_seconds": lease.kill_latency_seconds,
        "started_ms": account.started_ms,
        "accrued_until_ms": account.accrued_until_ms,
        "expires_ms": account.expires_ms,
        "ended_ms": account.ended_ms,
        "accrued_units": account.accrued_units,
        "outcome": account.outcome,
        "minimum_ms": account.minimum_ms,
        "floor_ms": account.floor_ms,
        "ttl_seconds": lease.ttl_seconds,
        "stage": lease.stage,
    }


def account_from_row(row: Mapping[str, Any] | sqlite3.Row, *, fencing_token: int) -> LeaseAccount:
    """The account in a row, whose lease carries the `fencing_token` of whoever reads it."""
    lease = Lease(
        lease_id=row["lease_id"],
        run_id=row["run_id"],
        attempt=row["attempt"],
        offer=offer_from_json(row["offer_json"]),
        num_nodes=row["nodes_asked"],
        worst_usd_per_hour=usd(row["worst_micro_usd"]),
        first_grant_seconds=row["first_grant_seconds"],
        kill_latency_seconds=row["kill_latency_seconds"],
        fencing_token=fencing_token,
        minimum_billed_seconds=row["minimum_ms"] / 1000,
        ttl_seconds=row["ttl_seconds"],
        stage=row["stage"] if "stage" in row.keys() else FIRST_STAGE,  # noqa: SIM118 (a sqlite3.Row is no mapping)
    )
    return LeaseAccount(
        lease=lease,
        state=row["state"],
        num_nodes=row["num_nodes"],
        price_micro_usd=row["price_micro_usd"],
        worst_micro_usd=row["worst_micro_usd"],
        latency_ms=row["latency_ms"],
        started_ms=row["started_ms"],
        accrued_until_ms=row["accrued_until_ms"],
        expires_ms=row["expires_ms"],
        ended_ms=row["ended_ms"],
        accrued_units=row["accrued_units"],
        outcome=row["outcome"],
        minimum_ms=row["minimum_ms"],
        floor_ms=row["floor_ms"],
    )


@lru_cache(maxsize=256)
def offer_from_json(text: str) -> Offer:
    """Read an offer from its row in the ledger."""
    content = json.loads(text)
    for field in ("usd_per_hour", "on_demand_usd_per_hour"):
        content[field] = None if content[field] is None else Decimal(content[field])
    return Offer(**content)


@lru_cache(maxsize=256)
def offer_text(offer: Offer) -> str:
    """The row that stores an offer in the ledger."""
    return json.dumps(asdict(offer), default=str)

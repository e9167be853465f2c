"""Each layer of the promise taken out: the simulation must then report what it is there for.

A layer is broken in this process only. With it stand the faults against which it protects; with all layers in place the
same faults do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from unittest import mock

from cost.ledger.accounts import LeaseAccount
from cost.ledger.ledger import Ledger
from faults.machine import Machine, WatchedLedger
from orchestrator.runs.journal import StoreJournal
from orchestrator.runs.records import Runs
from orchestrator.supervisor import supervise
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.lease import sizing

TTL_SLACK_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Layer:
    """How to take it out, and the faults that show it."""

    take_out: Callable[[Machine], None]
    faults: tuple[str, ...]


def patch(target: object, name: str, value: object) -> None:
    """For the rest of this process; doing it again changes nothing."""
    mock.patch.object(target, name, value).start()


def reserve_nothing(_: Machine) -> None:
    reserve = Ledger.reserve

    def unreserved(self: Ledger, lease: Any, *, expires_ms: int, latency_ms: int, at_ms: int) -> LeaseAccount:
        del expires_ms, latency_ms
        return reserve(self, lease, expires_ms=at_ms, latency_ms=0, at_ms=at_ms)

    patch(WatchedLedger, "reserve", unreserved)
    patch(Grants, "pay_first_deadline", lambda self, lease: self._ledger.account(lease.lease_id))


def price_of_now(_: Machine) -> None:
    patch(sizing, "worst_price", lambda offer, _: offer.usd_per_hour)


def reserve_the_grant_only(machine: Machine) -> None:
    machine.cloud.ttl_slack = TTL_SLACK_SECONDS


def no_guard(machine: Machine) -> None:
    machine.cloud.guarded = False


def no_provider_limit(machine: Machine) -> None:
    machine.cloud.ttl_exists = False


def no_reconciler(_: Machine) -> None:
    patch(supervise, "end_unknown_instances", lambda *_, **__: [])


def settle_at_the_last_price(_: Machine) -> None:
    accrue = Ledger.accrue

    def at_last_price(self: Ledger, lease_id: str, *, at_ms: int, usd_per_hour: Decimal | None = None) -> LeaseAccount:
        known = Decimal(self.account(lease_id).price_micro_usd) / 1_000_000
        return accrue(self, lease_id, at_ms=at_ms, usd_per_hour=known if usd_per_hour is None else usd_per_hour)

    patch(WatchedLedger, "accrue", at_last_price)


def no_fencing(_: Machine) -> None:
    """Neither the ledger nor its copy in the run store keeps a supervisor out that lost the run."""
    patch(WatchedLedger, "_check_fencing_token", lambda _: None)
    patch(WatchedLedger, "_catch_up", lambda _: None)
    append = StoreJournal.append

    def at_the_end(self: StoreJournal, number: int, record: bytes) -> bool:
        while self.read(number) is not None:
            number += 1
        return append(self, number, record)

    patch(StoreJournal, "append", at_the_end)
    move = Runs.move

    def unfenced(self: Runs, run_id: str, state: Any, *, reason: str = "", fencing_token: int) -> None:
        del fencing_token
        move(self, run_id, state, reason=reason, fencing_token=self.get(run_id).fencing_token)

    patch(Runs, "move", unfenced)


def act_before_the_store(_: Machine) -> None:
    """Reservations reach the run store only when a lease is settled."""
    append = Ledger._append

    def late(self: Ledger, journal: Any, *, always: bool) -> None:
        if not self.open_accounts():
            append(self, journal, always=always)

    patch(WatchedLedger, "_append", late)


LAYERS: dict[str, Layer] = {
    "reserve before create": Layer(reserve_nothing, ("supervisor lost",)),
    "worst-case price": Layer(price_of_now, ("price peaks unseen",)),
    "TTL reservation": Layer(reserve_the_grant_only, ("guest hangs", "supervisor lost")),
    "guard": Layer(no_guard, ("provider timer fails", "supervisor lost")),
    "provider TTL": Layer(no_provider_limit, ("guest hangs", "supervisor lost")),
    "reconciler": Layer(no_reconciler, ("create late",)),
    "settle at p-hat": Layer(settle_at_the_last_price, ("price peaks unseen",)),
    "fencing": Layer(no_fencing, ("two machines",)),
    "run store first": Layer(act_before_the_store, ("supervisor moves",)),
}

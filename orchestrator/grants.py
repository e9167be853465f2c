"""Renewing the right to run: pay in the books first, then move the provider's limit, then answer the nodes.

A node asks with a numbered request that carries its own boot-time clock; the answer is a duration counted from that
moment, so neither clock skew nor a late reader can stretch it. What the books set aside ends later than any answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from cost.accounts import LeaseAccount
from cost.leases import MILLISECONDS_PER_HOUR, Lease, micro_usd
from cost.ledger import Balance, Ledger
from orchestrator.backends.base import Backend
from orchestrator.clock import Clock
from trainer.store import Store, StoreKeyMissing


@dataclass(frozen=True, slots=True)
class Terms:
    """How leases of one backend are paid; real seconds."""

    term_seconds: float = 30.0
    """How far ahead a renewal pays."""
    boot_allowance_seconds: float = 10.0
    """Longest time from the reservation to a node's boot, from which its first grant counts."""
    startup_seconds: float = 25.0
    """From boot to the first step, as assumed when the smallest useful lease is computed."""
    kill_latency_seconds: float = 5.0
    """kappa: how long the slowest killer assumed sound takes."""
    drain_seconds: float = 12.0
    """Longest time from asking for a checkpoint and a stop to the end of the node's command."""
    stop_grace_seconds: float = 45.0
    """How long a stop that somebody asked for may take before nodes are ended anyway."""
    stall_seconds: float = 240.0
    """Without a new step for so long, the cluster counts as broken."""
    grow_delay_seconds: float = 4.0
    """First wait before a lost node is rented again; doubles with every refusal."""
    confirm_seconds: float = 0.0
    """How long the provider's lists may lie or lag: only what is absent for so long counts as gone."""
    create_seconds: float = 0.0
    """How long after it was asked for a node may still come into being when nobody heard the reply."""
    price_gap_seconds: float = 120.0
    """Between two looks at a price no further apart, it was at most the higher of both; else it is unconfirmed."""
    reconcile_seconds: float = 300.0
    """How often everything that carries our name is compared with the books."""
    poll_seconds: float = 1.0
    accrue_seconds: float = 5.0
    """How often elapsed time becomes an entry of the books; what is not yet accrued stays set aside at p-hat."""
    renew_below: float = 0.7
    """Renew when less than this share of a term is left."""

    @property
    def smallest_seconds(self) -> float:
        """The shortest lease that can do anything: boot, start, save and stop, and be killed."""
        return self.boot_allowance_seconds + self.startup_seconds + self.drain_seconds + self.kill_latency_seconds


def affordable_until_ms(account: LeaseAccount, balance: Balance, *, num_nodes: int) -> int:
    """The latest expiry that the free budget pays for with `num_nodes`, in billed milliseconds."""
    available = micro_usd(balance.free_usd) + account.held_micro_usd
    future_ms = available * MILLISECONDS_PER_HOUR // (account.worst_micro_usd * num_nodes)
    return account.accrued_until_ms + future_ms - account.latency_ms


class Grants:
    """Keeps one lease's nodes alive for as long as the books allow."""

    def __init__(self, *, ledger: Ledger, backend: Backend, store: Store, clock: Clock, terms: Terms) -> None:
        self._ledger = ledger
        self._backend = backend
        self._store = store
        self._clock = clock
        self._terms = terms
        self._answered: dict[tuple[str, int], int] = {}
        self._noticed: set[tuple[str, int]] = set()

    def billed_ms(self, seconds: float) -> int:
        """Real seconds as billed milliseconds, rounded up."""
        return -int(-seconds * 1000 * self._clock.scale // 1)

    def renew(self, account: LeaseAccount) -> tuple[LeaseAccount, bool]:
        """Pay for another term if it is due; False when the money only reaches to the drain line.

        Near the end of the money the term shrinks, so that little stays unused.
        """
        if account.num_nodes == 0:
            return account, True
        now = self._clock.now_ms()
        limit = affordable_until_ms(account, self._ledger.balance(), num_nodes=account.num_nodes)
        reaches = limit - now > self.billed_ms(self._terms.drain_seconds)
        wanted = now + self.billed_ms(self._terms.term_seconds)
        due = account.expires_ms - now < self.billed_ms(self._terms.term_seconds * self._terms.renew_below)
        target = min(wanted, limit)
        if due and target > account.expires_ms:
            account = self._ledger.renew(account.lease.lease_id, expires_ms=target, at_ms=now)
            self.extend(account)
        return account, reaches

    def pay_first_deadline(self, lease: Lease) -> LeaseAccount:
        """Pay up to the first deadline of a node that is asked for at this moment.

        Raises:
            BudgetExceeded: It is not affordable.
            Fenced: Another supervisor holds the run and may have settled this lease.
        """
        now = self._clock.now_ms()
        expires_ms = now + self.first_deadline_ms(lease.first_grant_seconds)
        return self._ledger.renew(lease.lease_id, expires_ms=expires_ms, at_ms=now)

    def first_deadline_ms(self, first_grant_seconds: float) -> int:
        """Billed milliseconds from asking for a node to the end of its first grant, which counts from its boot."""
        return self.billed_ms(self._terms.boot_allowance_seconds + first_grant_seconds)

    def extend(self, account: LeaseAccount) -> None:
        """Move the provider's own limit to the end of what is paid."""
        self._backend.extend(account.lease, self._seconds_left(account))

    def answer(self, account: LeaseAccount, ranks: Iterable[int]) -> list[int]:
        """Answer each node's newest request with what is left of the paid time.

        Returns the ranks whose cloud has announced that it takes them, each once.
        """
        lease_id, noticed = account.lease.lease_id, []
        for rank in ranks:
            number, notice = self._request(lease_id, rank)
            if notice and (lease_id, rank) not in self._noticed:
                self._noticed.add((lease_id, rank))
                noticed.append(rank)
            elif not notice:
                self._noticed.discard((lease_id, rank))  # a rank that was rented again
            if number is None or number <= self._answered.get((lease_id, rank), -1):
                continue
            duration = self._seconds_left(account)
            if duration <= 0:
                continue
            grant = {"epoch": self._ledger.epoch, "number": number, "duration_seconds": duration}
            self._store.write(f"grants/{lease_id}/{rank}.json", json.dumps(grant).encode())
            self._answered[(lease_id, rank)] = number
        return noticed

    def _seconds_left(self, account: LeaseAccount) -> float:
        return (account.expires_ms - self._clock.now_ms()) / 1000 / self._clock.scale

    def _request(self, lease_id: str, rank: int) -> tuple[int | None, bool]:
        """Number of the newest request, and whether its node's end was announced."""
        try:
            request = json.loads(self._store.read(f"guard/{lease_id}/{rank}/request.json"))
            return int(request["number"]), bool(request.get("noticed"))
        except (StoreKeyMissing, ValueError, KeyError, TypeError):
            return None, False

"""Renewing the right to run: pay in the ledger first, then move the provider's limit, then answer the nodes.

A node asks with a numbered request that carries its own boot-time clock; the answer is a duration counted from that
moment, so neither clock skew nor a late reader can stretch it. What the ledger sets aside ends later than any answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import MILLISECONDS_PER_HOUR, Lease, micro_usd
from cost.ledger.ledger import Balance, Ledger
from orchestrator.backends.base import Backend, BackendError
from orchestrator.clock import Clock
from orchestrator.supervisor.lease_policy import Terms
from tasks import run_store_keys as keys
from tasks.run_store_records import Grant, GuardRequest
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer


def heard_ms(store: Store, accounts: Iterable[LeaseAccount]) -> int:
    """The newest moment at which a supervisor granted anything to these leases; 0 if none did.

    A ledger that was made from the run store holds no accruals, so this may be hours newer than its newest entry.
    """
    newest = 0
    for account in accounts:
        for rank in range(account.num_nodes):
            with suppress(StoreKeyMissing, RecordError):
                key = keys.grant(account.lease.lease_id, rank)
                newest = max(newest, Grant.parse(store.read(key), key).at_ms)
    return newest


def affordable_until_ms(account: LeaseAccount, balance: Balance, *, num_nodes: int) -> int:
    """The latest expiry that the free budget pays for with `num_nodes`, in billed milliseconds."""
    available = micro_usd(balance.free_usd) + account.held_micro_usd
    future_ms = available * MILLISECONDS_PER_HOUR // (account.worst_micro_usd * num_nodes)
    return account.accrued_until_ms + future_ms - account.latency_ms


PAY_TRIES = 5


class Grants:
    """Keeps one lease's nodes alive for as long as the ledger allows."""

    def __init__(self, *, ledger: Ledger, backend: Backend, store: Store, clock: Clock, terms: Terms) -> None:
        self._ledger = ledger
        self._backend = backend
        self._store = store
        self._clock = clock
        self._terms = terms
        self._answered: dict[tuple[str, int], int] = {}
        self._noticed: set[tuple[str, int]] = set()
        self._to_extend = False
        """Whether the provider has not yet heard of the newest renewal."""

    def billed_ms(self, seconds: float) -> int:
        """Real seconds as billed milliseconds, rounded up."""
        return -int(-seconds * 1000 * self._clock.scale // 1)

    def renew(self, account: LeaseAccount) -> tuple[LeaseAccount, bool]:
        """Pay for another term if it is due; False when time or money only reaches to the drain threshold.

        Near the end of the money the term shrinks, so that little stays unused. A limit that cannot be moved was paid
        for as a whole at its start.
        """
        if account.num_nodes == 0:
            return account, True
        now = self._clock.now_ms()
        drain_ms = self.billed_ms(self._terms.drain_seconds)
        if account.lease.ttl_seconds:
            return account, self.limit_ms(account) - now > drain_ms
        limit = affordable_until_ms(account, self._ledger.balance(), num_nodes=account.num_nodes)
        wanted = now + self.billed_ms(self._terms.term_seconds)
        due = account.expires_ms - now < self.billed_ms(self._terms.term_seconds * self._terms.renew_below)
        target = min(wanted, limit)
        if due and target > account.expires_ms:
            account = self._ledger.renew(account.lease.lease_id, expires_ms=target, at_ms=now)
            self._to_extend = True
        if self._to_extend:
            self.extend(account)
        return account, limit - now > drain_ms

    def limit_ms(self, account: LeaseAccount) -> int:
        """The earliest moment at which a fixed limit can end the nodes: as if they had been there when asked for.

        What is paid reaches further, to the end of a limit that begins as late as it may.
        """
        return account.expires_ms - self.billed_ms(self._terms.first_seconds(0.0))

    def pay_first_deadline(self, lease: Lease) -> LeaseAccount:
        """Pay up to the first deadline of a node that is asked for at this moment.

        The last look at the ledger, here and in the run store, is less than `call_seconds` ago when this returns.

        Raises:
            BudgetExceeded: It is not affordable.
            Fenced: Another supervisor holds the run and may have settled this lease.
            BackendError: Paying takes so long that what was paid for is over each time.
        """
        for _ in range(PAY_TRIES):
            began, now = self._clock.real_seconds(), self._clock.now_ms()
            account = self._ledger.renew(lease.lease_id, expires_ms=now + self.first_deadline_ms(lease), at_ms=now)
            self._ledger.require_mine()
            if self._clock.real_seconds() - began <= self._terms.call_seconds:
                return account
        raise BackendError(
            f"paying for {lease.lease_id} took longer than {self._terms.call_seconds:.0f} s {PAY_TRIES} times; "
            "the run store is too slow to rent on its word."
        )

    def first_deadline_ms(self, lease: Lease) -> int:
        """Billed milliseconds from paying for a node to the end of its first grant, or of its fixed limit."""
        return self.billed_ms(self._terms.first_seconds(max(lease.first_grant_seconds, lease.ttl_seconds)))

    def extend(self, account: LeaseAccount) -> None:
        """Move the provider's own limit to the end of what is paid; what fails is tried again with the next renewal.

        Raises:
            BackendError: The provider did not take it; the limit is where it was, or there.
        """
        self._to_extend = True
        if not account.lease.ttl_seconds:
            self._backend.extend(account.lease, self._seconds_left(account))
        self._to_extend = False

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
            if account.lease.ttl_seconds:  # paid to its end: a node that hears nothing more ends itself before
                duration = min(duration, self._terms.term_seconds)
            if duration <= 0:
                continue
            grant = Grant(
                fencing_token=self._ledger.fencing_token,
                number=number,
                duration_seconds=duration,
                at_ms=self._clock.now_ms(),  # for `heard_ms`
            )
            self._store.write(keys.grant(lease_id, rank), grant.to_bytes(Writer.SUPERVISOR))
            self._answered[(lease_id, rank)] = number
        return noticed

    def _seconds_left(self, account: LeaseAccount) -> float:
        return (account.expires_ms - self._clock.now_ms()) / 1000 / self._clock.scale

    def _request(self, lease_id: str, rank: int) -> tuple[int | None, bool]:
        """Number of the newest request, and whether its node's end was announced."""
        key = keys.guard_request(lease_id, rank)
        try:
            request = GuardRequest.parse(self._store.read(key), key)
        except (StoreKeyMissing, RecordError):
            return None, False
        return request.number, request.noticed

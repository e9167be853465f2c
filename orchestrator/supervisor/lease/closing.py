"""Closing a lease: end its nodes, wait until they are surely gone, then settle.

Gone is what the provider's lists no longer showed for `confirm_seconds`, or what is past the last terminator's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Cause
from orchestrator.backends.base import Backend, BackendError, LeasePhase, LeaseState
from orchestrator.clock import Clock
from orchestrator.supervisor.alarm import CapAlarm
from orchestrator.supervisor.lease_policy import Terms, TermsOf

CONFIRM_SECONDS = 5.0
"""Pause between tries to end a lease that the provider does not confirm as gone."""


@dataclass(slots=True)
class LeaseCloser:
    """Closes the leases of one run. `taken_over` alone changes what it remembers."""

    ledger: Ledger
    backend: Backend
    clock: Clock
    terms: TermsOf
    alarm: CapAlarm
    tell: Callable[..., None]
    _surely_over_at: dict[str, float] = field(default_factory=dict)
    """By lease that was taken over: real seconds at which, by our own clock alone, its last terminator has fired."""

    def taken_over(self, accounts: Iterable[LeaseAccount]) -> None:
        """An earlier supervisor opened these; from now on our own clock counts for them."""
        now = self.clock.real_seconds()
        for account in accounts:
            left_ms = account.expires_ms + account.latency_ms - account.accrued_until_ms
            self._surely_over_at[account.lease.lease_id] = now + left_ms / 1000 / self.clock.scale

    def close(self, account: LeaseAccount, cause: Cause, *, asked_at: float | None = None) -> None:
        """End the lease, wait until it is surely gone, then settle.

        Where a node was asked for at `asked_at` (real seconds) without a reply, the silence of the provider's lists
        counts only from when that can no longer take effect.
        """
        lease = account.lease
        terms = self.terms(lease.offer)
        silent_since: float | None = None
        earliest = 0.0 if asked_at is None else asked_at + terms.create_seconds
        while True:
            try:
                self.backend.stop(lease)
                state = self.backend.poll(lease)
            except BackendError as error:
                self.tell("warning", f"{lease.lease_id} could not be ended: {error}")
                silent_since = None
            else:
                self._charge_seen(lease, state, terms)
                if state.phase is not LeasePhase.GONE:
                    silent_since = None
                elif silent_since is None:
                    silent_since = max(self.clock.real_seconds(), earliest)
            real = self.clock.real_seconds()
            gone = silent_since is not None and real >= silent_since + terms.confirm_seconds
            if gone or self._surely_over(account):
                break
            self.clock.sleep(CONFIRM_SECONDS)
        now = self.clock.now_ms()
        settled = self.ledger.settle(lease.lease_id, ended_ms=now, at_ms=now, outcome=cause.value)
        self.alarm.look()
        balance = self.ledger.balance()
        message = f"{lease.lease_id} settled: {cause.value}; ${balance.spent_usd:.2f} of ${balance.cap_usd:.2f} spent"
        self.tell("settled", message, spent_micro_usd=settled.spent_micro_usd, cause=cause.value)

    def settle_unrented(self, account: LeaseAccount) -> None:
        """Nothing was rented, so nothing is owed."""
        self.ledger.settle(
            account.lease.lease_id,
            ended_ms=account.started_ms,
            at_ms=self.clock.now_ms(),
            outcome=Cause.NO_CAPACITY.value,
            rented=False,
        )

    def _charge_seen(self, lease: Lease, state: LeaseState, terms: Terms) -> None:
        """Charge up to now at the price that was read, if one was read not long ago; else the worst case stays due."""
        account = self.ledger.account(lease.lease_id)
        now_ms = self.clock.now_ms()
        gap_ms = terms.price_gap_seconds * 1000 * self.clock.scale
        if state.usd_per_hour is not None and now_ms - account.accrued_until_ms <= gap_ms:
            self.ledger.accrue(lease.lease_id, at_ms=now_ms, usd_per_hour=state.usd_per_hour)

    def _surely_over(self, account: LeaseAccount) -> bool:
        """Past the last terminator's time it cannot be alive, whatever the provider's interface says.

        Of a lease that was taken over only our own waiting counts: the wall clock may have jumped ahead.
        """
        over_at = self._surely_over_at.get(account.lease.lease_id)
        if over_at is not None and self.clock.real_seconds() <= over_at:
            return False
        return self.clock.now_ms() > account.expires_ms + account.latency_ms

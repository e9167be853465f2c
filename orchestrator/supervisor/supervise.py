"""The loop that keeps one run going within its cap: pay, rent, watch, settle, decide, again.

Invariant: every call that can cost money comes after a committed reservation, and nothing in here survives only in
memory: a supervisor killed at any instant is replaced by the next one, which settles or adopts what it finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from cost.errors import BudgetExceeded, SlmError
from cost.ledger.accounts import LeaseAccount
from cost.ledger.database import DatabaseError
from cost.ledger.leases import Lease, lease_id_for, usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import (
    BLOCK_MS,
    STOPS,
    Candidate,
    Cause,
    Decision,
    Relaunch,
    Rollover,
    Situation,
    Stop,
    StopReason,
    cheaper_elsewhere,
    decide,
    same_market,
)
from cost.market.offers import Offer
from cost.market.providers import Ttl
from orchestrator.backends.base import Backend, BackendError, LeasePhase, LeaseState, NoCapacity
from orchestrator.clock import Clock
from orchestrator.events import Emit, Event
from orchestrator.runs.records import Run, Runs, RunState
from orchestrator.supervisor.alarm import CapAlarm
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.incidentals import Extras
from orchestrator.supervisor.lease_policy import Terms, TermsOf, worst_price
from orchestrator.supervisor.lease_watch import StopSwitch, Watch
from orchestrator.supervisor.reconcile import end_unknown_instances
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError

WriteSpec = Callable[[Lease], None]
Candidates = Callable[[Decimal], list[Candidate]]

FINAL_STATES = {
    StopReason.FINISHED: RunState.SUCCEEDED,
    StopReason.ASKED: RunState.STOPPED,
    StopReason.BUDGET: RunState.OUT_OF_BUDGET,
    StopReason.BUG: RunState.FAILED,
    StopReason.GAVE_UP: RunState.FAILED,
}
RENT_SLACK_SECONDS = 5.0
"""What an otherwise exhausted budget keeps, so that it still pays when the rent comes so long after the reservation."""
WAIT_SECONDS = 1.0
"""How often a wait looks whether somebody asked to stop."""
STORE_RETRY_SECONDS = 10.0
"""Between two tries to rent while the run store is away."""
CONFIRM_SECONDS = 5.0
"""Pause between tries to end a lease that the provider does not confirm as gone."""


@dataclass(slots=True)
class Supervisor:
    """Everything one run's loop needs, passed in; `run()` returns the final state."""

    run_record: Run
    runs: Runs
    ledger: Ledger
    backend: Backend
    store: Store
    clock: Clock
    terms: TermsOf
    candidates: Candidates
    command: list[str]
    owner: str
    write_spec: WriteSpec
    emit: Emit
    switch: StopSwitch
    owners: Sequence[str] = ()
    """Names under which other machines have rented for this run."""
    extras: Extras | None = None
    """Costs that are no node's; None where there are none."""
    _blocked: dict[tuple[str, int], int] = field(default_factory=dict)
    _left_out: dict[str, str] = field(default_factory=dict)
    """Offers that refused for good, and why."""
    _failures: int = 0
    _waits: int = 0
    _last_step: int = -1
    _alarm: CapAlarm = field(init=False)
    _lost_at: float | None = None
    _store_away_since: float | None = None
    _surely_over_at: dict[str, float] = field(default_factory=dict)
    """By lease that was taken over: real seconds at which, by our own clock alone, its last terminator has fired."""

    def __post_init__(self) -> None:
        self._alarm = CapAlarm(self.ledger, self._tell)

    # -- the story -------------------------------------------------------------------------------

    def run(self) -> RunState:
        """Supervise until the run is finished, stopped, out of money or given up."""
        self._move(RunState.LAUNCHING, "")
        account = self._repair()
        decision = self._first() if account is None else self._watch_and_decide(account)
        while not isinstance(decision, Stop):
            if self._asked_to_stop():
                decision = Stop(StopReason.ASKED, "stopped as asked")
                break
            decision = self._rent(decision)
        self._end_lines(decision.reason)
        state = FINAL_STATES[decision.reason]
        self._move(state, decision.message)
        self.ledger.mirror()
        return state

    def _end_lines(self, reason: StopReason) -> None:
        """The last charge of what is no node's; what the estimates were too high by is free again."""
        now = self.clock.now_ms()
        try:
            if self.extras is not None:
                (self.extras.finish if reason is StopReason.FINISHED else self.extras.keep)(at_ms=now)
        except (BudgetExceeded, StoreError) as error:
            self._tell("warning", f"storage and transfers could not be charged to the end: {error}")
        self.ledger.close_lines(at_ms=now)

    def _first(self) -> Decision:
        """The first lease of this supervisor: the plan's order, nothing blocked."""
        return self._decide(Cause.PREEMPTED, "")

    def _rent(self, decision: Relaunch | Rollover) -> Decision:
        if isinstance(decision, Relaunch) and decision.delay_seconds:
            message = f"waiting {decision.delay_seconds:.0f} s at $0 before {decision.offer.offer_id}"
            self._tell("relaunch", message)
            if not self._wait(decision.delay_seconds):
                return Stop(StopReason.ASKED, "stopped as asked while waiting")
        try:
            account = self._open(decision)
        except BudgetExceeded as error:
            return Stop(StopReason.BUDGET, str(error))
        except StoreError as error:
            return self._wait_for_store(decision, error)
        grants = self._grants(account.lease)
        try:
            # Since the reservation this process may have stood still for any time, or lost the run.
            account = grants.pay_first_deadline(account.lease)
            self.backend.start(account.lease, self.command)
            grants.extend(account)  # arms the provider's limit where none could be set at the create
        except BudgetExceeded as error:
            self._settle_unrented(account)
            return Stop(StopReason.BUDGET, str(error))
        except StoreError as error:
            self._settle_unrented(account)
            return self._wait_for_store(decision, error)
        except NoCapacity as error:
            self._settle_unrented(account)
            if error.for_good:
                self._leave_out(account.lease.offer, str(error))
            return self._decide(Cause.NO_CAPACITY, str(error), account)
        except BackendError as error:
            self._close(account, Cause.BROKEN, asked_at=self.clock.real_seconds())
            return self._decide(Cause.BROKEN, str(error), account)
        self._store_away_since = None
        return self._watch_and_decide(account)

    def _wait_for_store(self, decision: Relaunch | Rollover, error: StoreError) -> Decision:
        """Without the run store nothing may be rented; wait at $0, and try the same again.

        Raises:
            StoreError: It was away for longer than the terms have patience for.
        """
        now = self.clock.real_seconds()
        if self._store_away_since is None:
            self._store_away_since = now
            self._tell("warning", f"nothing is rented while the run store is away: {error}")
        if now - self._store_away_since >= self.terms(decision.offer).store_patience_seconds:
            self._move(RunState.FAILED, str(error))
            raise error
        if not self._wait(STORE_RETRY_SECONDS):
            return Stop(StopReason.ASKED, "stopped as asked while the run store is away")
        return decision

    def _grants(self, lease: Lease) -> Grants:
        return Grants(
            ledger=self.ledger,
            backend=self.backend,
            store=self.store,
            clock=self.clock,
            terms=self.terms(lease.offer),
        )

    def _settle_unrented(self, account: LeaseAccount) -> None:
        """Nothing was rented, so nothing is owed."""
        self.ledger.settle(
            account.lease.lease_id,
            ended_ms=account.started_ms,
            at_ms=self.clock.now_ms(),
            outcome=Cause.NO_CAPACITY.value,
            rented=False,
        )

    def _watch_and_decide(self, account: LeaseAccount) -> Decision:
        watch = Watch(
            lease=account.lease,
            run_id=self.run_record.run_id,
            runs=self.runs,
            ledger=self.ledger,
            backend=self.backend,
            store=self.store,
            clock=self.clock,
            terms=self.terms(account.lease.offer),
            grants=self._grants(account.lease),
            switch=self.switch,
            command=self.command,
            tell=self._tell,
            on_running=lambda: self._move(RunState.RUNNING, ""),
            reconcile=self._end_strangers,
            alarm=self._alarm,
            reconsider=lambda price, left: self._cheaper(account.lease, price, left),
            extras=self.extras,
            lost_at=self._lost_at,
        )
        try:
            cause, detail = watch.until_it_ends()
        except DatabaseError as error:
            self._end_without_ledger(account, error)
            raise
        self._lost_at = self.clock.real_seconds()
        if cause in (Cause.ASKED, Cause.CAP):
            self._move(RunState.STOPPING, detail)
        account = self.ledger.account(account.lease.lease_id)
        self._close(account, cause, asked_at=watch.asked_at)
        if watch.step is not None and watch.step > self._last_step:
            self._last_step = watch.step
            self._failures = self._waits = 0
        return self._decide(cause, detail, account)

    # -- steps -----------------------------------------------------------------------------------

    def _repair(self) -> LeaseAccount | None:
        """Settle what an earlier supervisor left behind, end what nobody knows, adopt a lease that still lives."""
        open_accounts = self.ledger.open_accounts()
        now = self.clock.real_seconds()
        for account in open_accounts:
            left_ms = account.expires_ms + account.latency_ms - account.accrued_until_ms
            self._surely_over_at[account.lease.lease_id] = now + left_ms / 1000 / self.clock.scale
        self._end_strangers()
        adopted: LeaseAccount | None = None
        for account in reversed(open_accounts):
            state = self._poll(account.lease)
            usable = state.phase in (LeasePhase.RUNNING, LeasePhase.STARTING) and 0 in state.alive_ranks
            if adopted is None and usable and self._armed(account):
                adopted = account
                self._tell("start", f"took over {account.lease.lease_id}, {len(state.alive_ranks)} nodes alive")
            else:
                self._close(account, Cause.EXPIRED, asked_at=None if self._all_came(account.lease) else now)
        return adopted

    def _all_came(self, lease: Lease) -> bool:
        """Whether nothing of a lease can still come into being: each node has spoken, and it never grows again."""
        awaited = [keys.guard_request(lease.lease_id, rank) for rank in range(lease.num_nodes)]
        try:
            spoke = set(self.store.list(keys.guard_folders(lease.lease_id)))
        except StoreError:
            return False
        return bool(lease.ttl_seconds) and spoke.issuperset(awaited)

    def _armed(self, account: LeaseAccount) -> bool:
        """Set the provider's limit of what was taken over: whoever rented it may have ended before it did."""
        try:
            self._grants(account.lease).extend(account)
        except BackendError as error:
            self._tell("warning", f"the time limit of {account.lease.lease_id} could not be set: {error}")
            return False
        return True

    def _end_strangers(self) -> None:
        for message in end_unknown_instances(
            self.backend,
            self.ledger.open_leases_of_all_runs(),
            owner=self.owner,
            run_id=self.run_record.run_id,
            owners=self.owners,
        ):
            self._tell("warning", message)

    def _open(self, decision: Relaunch | Rollover) -> LeaseAccount:
        """Write the intent and set its cost aside; the first term or the fixed limit shrinks to what is affordable."""
        for account in self.ledger.open_accounts():  # one whose record was stored while its reply was lost
            self._close(account, Cause.BROKEN, asked_at=self.clock.real_seconds())
        attempt = 1 + max((account.lease.attempt for account in self.ledger.accounts()), default=0)
        offer, num_nodes = decision.offer, decision.num_nodes
        terms = self.terms(offer)
        worst = worst_price(offer, terms.price_bound)
        fixed = terms.first_seconds(terms.kill_latency_seconds) + RENT_SLACK_SECONDS
        hourly, once = self._beside(offer, num_nodes)
        free = self.ledger.balance().free_usd - once
        affordable = seconds_for(free, worst * num_nodes + hourly, self.clock.scale) - fixed
        ttl = min(terms.fixed_ttl_seconds, affordable) if terms.ttl is Ttl.FIXED else 0.0
        if terms.balance_usd is not None:  # paid to the last cent of it: what a hung node would use up
            ttl = seconds_for(self._balance_left(offer, terms), worst * num_nodes, self.clock.scale)
        term = min(max(terms.term_seconds, terms.startup_seconds + terms.drain_seconds), affordable)
        lease = Lease(
            lease_id=lease_id_for(self.owner, self.run_record.run_id, attempt),
            run_id=self.run_record.run_id,
            attempt=attempt,
            offer=offer,
            num_nodes=num_nodes,
            worst_usd_per_hour=worst,
            first_grant_seconds=max(min(term, ttl) if ttl else term, 1.0),
            kill_latency_seconds=terms.kill_latency_seconds,
            fencing_token=self.ledger.fencing_token,
            minimum_billed_seconds=terms.minimum_billed_seconds,
            ttl_seconds=max(ttl, 1.0) if ttl else 0.0,
        )
        now, grants = self.clock.now_ms(), self._grants(lease)
        account = self.ledger.reserve(
            lease,
            expires_ms=now + grants.first_deadline_ms(lease),
            latency_ms=grants.billed_ms(terms.kill_latency_seconds),
            at_ms=now,
        )
        if attempt > 1:
            self._move(RunState.RECOVERING, "")
        try:
            if self.extras is not None:
                self.extras.keep(at_ms=now)
            self.write_spec(lease)
        except (StoreError, BudgetExceeded):
            self._settle_unrented(account)
            raise
        price = f"${offer.usd_per_hour:.2f}/h each"
        self._tell("start", f"renting {num_nodes} x {offer.offer_id} at {price} as {lease.lease_id}")
        return account

    def _beside(self, offer: Offer, num_nodes: int) -> tuple[Decimal, Decimal]:
        """A lease's disks and transfers: dollars per billed hour, and those that are due once and not yet held."""
        if self.extras is None:
            return Decimal(0), Decimal(0)
        once = Decimal(0) if self.ledger.accounts() else self.extras.download(offer)
        return self.extras.rates(offer).usd_per_hour(num_nodes), once

    def _balance_left(self, offer: Offer, terms: Terms) -> Decimal:
        """What is left on the prepaid account of that cloud, from which only this run pays."""
        spent = sum(
            account.spent_micro_usd for account in self.ledger.accounts() if account.lease.offer.cloud == offer.cloud
        )
        return max(Decimal(0), (terms.balance_usd or Decimal(0)) - usd(spent))

    def _leave_out(self, offer: Offer, reason: str) -> None:
        """Waiting does not help there: it is not asked again by this supervisor, and that is told."""
        self._left_out[offer.offer_id] = reason
        self._tell("warning", f"{offer.offer_id} is left out: {reason}")

    def _candidates(self, remaining_usd: Decimal) -> list[Candidate]:
        """Candidates with all that renting them sets aside: of a prepaid account everything that is left on it."""
        found = []
        for candidate in self.candidates(remaining_usd):
            if candidate.offer.offer_id in self._left_out:
                continue
            terms = self.terms(candidate.offer)
            if terms.balance_usd is None:
                found.append(candidate)
                continue
            left = self._balance_left(candidate.offer, terms)
            hours = Decimal(terms.first_seconds(terms.kill_latency_seconds) * self.clock.scale) / 3600
            beyond = worst_price(candidate.offer, terms.price_bound) * candidate.num_nodes * hours
            if left >= candidate.needed_usd:  # else the account is too empty for a lease that is of use
                found.append(replace(candidate, needed_usd=left + beyond))
        return found

    def _cheaper(self, lease: Lease, usd_per_hour: Decimal, share_left: float) -> str | None:
        """Which offer finishes the run for less than this lease at that price."""
        terms = self.terms(lease.offer)
        candidates = self._candidates(self.ledger.balance().free_usd)
        same_size = [candidate for candidate in candidates if candidate.num_nodes == lease.num_nodes]
        current = next((candidate for candidate in same_size if candidate.offer == lease.offer), None)
        now = self.clock.now_ms()
        free = [candidate for candidate in same_size if self._blocked.get(candidate.key, 0) <= now]
        if current is None:
            return None
        hours = (terms.boot_allowance_seconds + terms.startup_seconds) * self.clock.scale / 3600
        found = cheaper_elsewhere(current, free, usd_per_hour=usd_per_hour, share_left=share_left, restart_hours=hours)
        return None if found is None else found.offer.offer_id

    def _close(self, account: LeaseAccount, cause: Cause, *, asked_at: float | None = None) -> None:
        """End the lease, wait until it is surely gone, then settle.

        Gone is what the provider's lists no longer showed for `confirm_seconds`. Where a node was asked for at
        `asked_at` (real seconds) and no reply came, the silence begins only when that can no longer take effect.
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
                self._tell("warning", f"{lease.lease_id} could not be ended: {error}")
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
        self._alarm.look()
        balance = self.ledger.balance()
        message = f"{lease.lease_id} settled: {cause.value}; ${balance.spent_usd:.2f} of ${balance.cap_usd:.2f} spent"
        self._tell("settled", message, spent_micro_usd=settled.spent_micro_usd, cause=cause.value)

    def _charge_seen(self, lease: Lease, state: LeaseState, terms: Terms) -> None:
        """Charge up to now at the price that was read, if it was also read not long ago; else p-hat stays due."""
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

    def _end_without_ledger(self, account: LeaseAccount, error: SlmError) -> None:
        """The run store or the ledger fails: nothing more can be granted, so end the nodes while we still can."""
        with contextlib.suppress(BackendError):
            self.backend.stop(account.lease)
        with contextlib.suppress(DatabaseError):  # where even this fails, the next supervisor settles
            # As the ledger stands now: by the account of its start, its last terminator would seem long past.
            self._close(self.ledger.account(account.lease.lease_id), Cause.BROKEN)
            self._move(RunState.FAILED, str(error))

    def _decide(self, cause: Cause, detail: str, account: LeaseAccount | None = None) -> Decision:
        run_id = self.run_record.run_id
        if account is not None:
            offer_id, until = account.lease.offer.offer_id, self.clock.now_ms() + BLOCK_MS
            if cause is Cause.NO_CAPACITY:
                self._blocked[(offer_id, account.lease.num_nodes)] = until
            if cause in (Cause.PREEMPTED, Cause.TOO_DEAR, Cause.DEARER):
                self._blocked |= {(offer_id, count): until for count in range(1, account.lease.num_nodes + 1)}
            if cause is Cause.PREEMPTED:
                self.runs.count(run_id, preemptions=1)
                there = self._candidates(self.ledger.balance().free_usd)
                self._blocked |= {
                    candidate.key: until for candidate in there if same_market(account.lease.offer, candidate.offer)
                }
            if cause in (Cause.BROKEN, Cause.EXPIRED):
                self._failures += 1
                self.runs.count(run_id, failures=1)
            # A preemption after new steps has set it to 0 before: one that brought nothing counts as a refusal does.
            self._waits = self._waits + 1 if cause in (Cause.NO_CAPACITY, Cause.PREEMPTED) else 0
        remaining = self.ledger.balance().free_usd
        if self._left_out and not self._candidates(remaining) and cause not in STOPS:
            return Stop(StopReason.GAVE_UP, f"nothing can be rented: {'; '.join(self._left_out.values())}")
        decision = decide(
            Situation(
                cause=cause,
                candidates=self._candidates(remaining),
                remaining_usd=remaining,
                now_ms=self.clock.now_ms(),
                blocked_until_ms=self._blocked,
                failures_without_progress=self._failures,
                waits_in_a_row=self._waits,
                detail=detail,
            )
        )
        if account is not None and not isinstance(decision, Stop):
            self._move(RunState.RECOVERING, cause.value)
            self._tell("relaunch", f"{cause.value}: {detail or 'the lease ended'}; next {decision.offer.offer_id}")
        return decision

    # -- small things ----------------------------------------------------------------------------

    def _poll(self, lease: Lease) -> LeaseState:
        try:
            return self.backend.poll(lease)
        except BackendError as error:
            self._tell("warning", f"cannot see {lease.lease_id}: {error}")
            return LeaseState(LeasePhase.STARTING)

    def _wait(self, seconds: float) -> bool:
        """Sleep at $0; False when somebody asked to stop meanwhile."""
        until = self.clock.real_seconds() + seconds
        while self.clock.real_seconds() < until:
            if self._asked_to_stop():
                return False
            self.clock.sleep(min(WAIT_SECONDS, until - self.clock.real_seconds()))
        return True

    def _asked_to_stop(self) -> bool:
        return bool(self.switch.level) or self.runs.stop_requested(self.run_record.run_id)

    def _move(self, state: RunState, reason: str) -> None:
        self.runs.move(self.run_record.run_id, state, reason=reason, fencing_token=self.ledger.fencing_token)
        self._tell(
            "state",
            f"{state.value.lower().replace('_', ' ')}{': ' + reason if reason else ''}",
            state=state,
            run_id=self.run_record.run_id,
        )

    def _tell(self, kind: str, message: str, **data: Any) -> None:
        self.emit(Event(kind, message, datetime.now(UTC), data))


def seconds_for(amount_usd: Decimal, usd_per_hour: Decimal, scale: float) -> float:
    """How many real seconds the money pays for, where `scale` billed seconds pass in each."""
    return float(amount_usd / usd_per_hour) * 3600 / scale

"""The loop that keeps one stage of a run going within the cap: pay, rent, watch, settle, decide, again.

`orchestrator.supervisor.stages` leads from one stage to the next.

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
from cost.ledger.leases import FIRST_STAGE, Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import (
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
)
from cost.market.offers import Offer
from orchestrator.backends.base import Backend, BackendError, LeasePhase, LeaseState, NoCapacity
from orchestrator.clock import Clock
from orchestrator.events import Emit, Event
from orchestrator.runs.records import Run, Runs, RunState
from orchestrator.supervisor.alarm import CapAlarm
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.incidentals import Incidentals
from orchestrator.supervisor.lease.closing import LeaseCloser
from orchestrator.supervisor.lease.sizing import LeaseSizing
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.lease.training import Training
from orchestrator.supervisor.lease_policy import TermsOf
from orchestrator.supervisor.lease_watch import LeaseWatch
from orchestrator.supervisor.offer_blocks import OfferBlocks
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
FAILURES = (Cause.BROKEN, Cause.EXPIRED)
"""Ends of a lease that count as failures of the run."""
WAIT_SECONDS = 1.0
"""How often a wait checks whether a stop was requested."""
STORE_RETRY_SECONDS = 10.0
"""Between two tries to rent while the run store is away."""


@dataclass(slots=True)
class Streak:
    """What went wrong in a row, without new steps in between. Only its own methods change it."""

    failures: int = 0
    waits: int = 0
    """For capacity; a preemption that brought no new step counts as a refusal does."""
    _newest_step: int = -1

    def ended(self, cause: Cause) -> None:
        """A lease ended."""
        if cause in FAILURES:
            self.failures += 1
        self.waits = self.waits + 1 if cause in (Cause.NO_CAPACITY, Cause.PREEMPTED) else 0

    def reached(self, step: int | None) -> None:
        """A lease got so far."""
        if step is not None and step > self._newest_step:
            self._newest_step = step
            self.failures = self.waits = 0


@dataclass(slots=True)
class Supervisor:
    """Everything that the loop of one stage needs, passed in.

    `run()` returns the final state of a run of this stage alone; else the next stage's follows its `until_stop()`.
    """

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
    incidentals: Incidentals | None = None
    """Costs beside those of nodes; None where there are none."""
    stage: str = FIRST_STAGE
    """Its leases work for this stage."""
    stage_store: Store | None = None
    """The run store as the stage sees it, with its progress and failures; None: the run store itself."""
    _alarm: CapAlarm = field(init=False)
    _closer: LeaseCloser = field(init=False)
    _sizing: LeaseSizing = field(init=False)
    _blocks: OfferBlocks = field(default_factory=OfferBlocks)
    _streak: Streak = field(default_factory=Streak)
    _lost_at: float | None = None
    """When the lease before was lost, for telling how long recovery took; real seconds."""
    _store_away_since: float | None = None
    """When the run store was first found out of reach since the last rent; real seconds."""

    def __post_init__(self) -> None:
        self._alarm = CapAlarm(self.ledger, self._tell)
        self._closer = LeaseCloser(self.ledger, self.backend, self.clock, self.terms, self._alarm, self._tell)
        self._sizing = LeaseSizing(
            self.run_record.run_id, self.owner, self.ledger, self.clock, self.terms, self.incidentals
        )

    # -- from the first lease to the end ---------------------------------------------------------

    def run(self) -> RunState:
        """Supervise until the run is finished, stopped, out of money or given up."""
        return self.conclude(self.until_stop())

    def until_stop(self) -> Stop:
        """Keep the stage going until it is finished, stopped, out of money or given up; then no node is left."""
        self._move(RunState.LAUNCHING, "")
        account = self._repair()
        decision = self._first() if account is None else self._watch_and_decide(account)
        while not isinstance(decision, Stop):
            if self._asked_to_stop():
                return Stop(StopReason.ASKED, "stopped as asked")
            decision = self._rent(decision)
        return decision

    def settle_all(self) -> None:
        """End every lease that an earlier supervisor left behind, where no stage is left that would use one."""
        self._move(RunState.LAUNCHING, "")
        self._repair(adopts=False)

    def conclude(self, stop: Stop) -> RunState:
        """The end of the run; returns its final state."""
        self._end_lines(stop.reason)
        state = FINAL_STATES[stop.reason]
        self._move(state, stop.message)
        self.ledger.mirror()
        return state

    def _end_lines(self, reason: StopReason) -> None:
        """The last charge of incidental costs; what was reserved for more of them is free again."""
        now = self.clock.now_ms()
        try:
            if self.incidentals is not None:
                (self.incidentals.finish if reason is StopReason.FINISHED else self.incidentals.keep)(at_ms=now)
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
            # Since the reservation this process may have been suspended for any time, or lost the run.
            account = grants.pay_first_deadline(account.lease)
            self.backend.start(account.lease, self.command)
            grants.extend(account)  # sets the provider's limit where none could be set when nodes were created
        except BudgetExceeded as error:
            self._closer.settle_unrented(account)
            return Stop(StopReason.BUDGET, str(error))
        except StoreError as error:
            self._closer.settle_unrented(account)
            return self._wait_for_store(decision, error)
        except NoCapacity as error:
            self._closer.settle_unrented(account)
            if error.for_good:
                self._refuse(account.lease.offer, str(error))
            return self._decide(Cause.NO_CAPACITY, str(error), account)
        except BackendError as error:
            self._closer.close(account, Cause.BROKEN, asked_at=self.clock.real_seconds())
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

    def _refuse(self, offer: Offer, reason: str) -> None:
        self._blocks.refuse(offer, reason)
        self._tell("warning", f"{offer.offer_id} is left out: {reason}")

    def _grants(self, lease: Lease) -> Grants:
        return Grants(
            ledger=self.ledger,
            backend=self.backend,
            store=self.store,
            clock=self.clock,
            terms=self.terms(lease.offer),
        )

    def _watch_and_decide(self, account: LeaseAccount) -> Decision:
        training = Training(self.stage_store or self.store, self.clock, lost_at=self._lost_at)
        watch = LeaseWatch(
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
            reconcile=self._end_orphans,
            alarm=self._alarm,
            reconsider=lambda price, left: self._cheaper(account.lease, price, left),
            incidentals=self.incidentals,
            training=training,
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
        self._closer.close(account, cause, asked_at=watch.regrowth.unanswered_at)
        self._streak.reached(training.step)
        return self._decide(cause, detail, account)

    # -- repairing, opening, deciding ------------------------------------------------------------

    def _repair(self, *, adopts: bool = True) -> LeaseAccount | None:
        """Settle what an earlier supervisor left behind, end orphans, adopt a lease that is still alive.

        The lease of another stage is settled: that stage has ended, else its own supervisor would be at work.
        """
        open_accounts = self.ledger.open_accounts()
        now = self.clock.real_seconds()
        self._closer.taken_over(open_accounts)
        self._end_orphans()
        adopted: LeaseAccount | None = None
        for account in reversed(open_accounts):
            state = self._poll(account.lease)
            usable = state.phase in (LeasePhase.RUNNING, LeasePhase.STARTING) and 0 in state.alive_ranks
            is_ours = account.lease.stage == self.stage
            if adopts and adopted is None and is_ours and usable and self._set_limit(account):
                adopted = account
                self._tell("start", f"took over {account.lease.lease_id}, {len(state.alive_ranks)} nodes alive")
            else:
                cause = Cause.EXPIRED if adopts and is_ours else Cause.FINISHED
                self._closer.close(account, cause, asked_at=None if self._all_appeared(account.lease) else now)
        return adopted

    def _all_appeared(self, lease: Lease) -> bool:
        """Whether no node of a lease can still appear: each has sent a request, and it never grows again."""
        awaited = [keys.guard_request(lease.lease_id, rank) for rank in range(lease.num_nodes)]
        try:
            received = set(self.store.list(keys.guard_folders(lease.lease_id)))
        except StoreError:
            return False
        return bool(lease.ttl_seconds) and received.issuperset(awaited)

    def _set_limit(self, account: LeaseAccount) -> bool:
        """Set the provider's limit of what was taken over: the supervisor that rented it may not have got so far."""
        try:
            self._grants(account.lease).extend(account)
        except BackendError as error:
            self._tell("warning", f"the time limit of {account.lease.lease_id} could not be set: {error}")
            return False
        return True

    def _end_orphans(self) -> None:
        for message in end_unknown_instances(
            self.backend,
            self.ledger.open_leases_of_all_runs(),
            owner=self.owner,
            run_id=self.run_record.run_id,
            owners=self.owners,
        ):
            self._tell("warning", message)

    def _open(self, decision: Relaunch | Rollover) -> LeaseAccount:
        """Write the intent and reserve its cost."""
        for account in self.ledger.open_accounts():  # one whose record was stored while its reply was lost
            self._closer.close(account, Cause.BROKEN, asked_at=self.clock.real_seconds())
        lease = replace(self._sizing.new_lease(decision.offer, decision.num_nodes), stage=self.stage)
        now, grants = self.clock.now_ms(), self._grants(lease)
        account = self.ledger.reserve(
            lease,
            expires_ms=now + grants.first_deadline_ms(lease),
            latency_ms=grants.billed_ms(lease.kill_latency_seconds),
            at_ms=now,
        )
        if lease.attempt > 1:
            self._move(RunState.RECOVERING, "")
        try:
            if self.incidentals is not None:
                self.incidentals.keep(at_ms=now)
            self.write_spec(lease)
        except (StoreError, BudgetExceeded):
            self._closer.settle_unrented(account)
            raise
        price = f"${lease.offer.usd_per_hour:.2f}/h each"
        self._tell("start", f"renting {lease.num_nodes} x {lease.offer.offer_id} at {price} as {lease.lease_id}")
        return account

    def _candidates(self) -> list[Candidate]:
        """What may be rented now or later, with all that renting it reserves."""
        candidates = self.candidates(self.ledger.balance().free_usd)
        return self._sizing.with_prepaid_accounts(self._blocks.not_refused(candidates))

    def _cheaper(self, lease: Lease, usd_per_hour: Decimal, share_left: float) -> str | None:
        """Which offer finishes the run for less than this lease at that price."""
        terms = self.terms(lease.offer)
        same_size = [candidate for candidate in self._candidates() if candidate.num_nodes == lease.num_nodes]
        current = next((candidate for candidate in same_size if candidate.offer == lease.offer), None)
        free = self._blocks.free(same_size, now_ms=self.clock.now_ms())
        if current is None:
            return None
        hours = (terms.boot_allowance_seconds + terms.startup_seconds) * self.clock.scale / 3600
        found = cheaper_elsewhere(current, free, usd_per_hour=usd_per_hour, share_left=share_left, restart_hours=hours)
        return None if found is None else found.offer.offer_id

    def _end_without_ledger(self, account: LeaseAccount, error: SlmError) -> None:
        """The run store or the ledger fails: nothing more can be granted, so end the nodes while we still can."""
        with contextlib.suppress(BackendError):
            self.backend.stop(account.lease)
        with contextlib.suppress(DatabaseError):  # where even this fails, the next supervisor settles
            # As the ledger stands now: by the account of its start, its last terminator would have fired long ago.
            self._closer.close(self.ledger.account(account.lease.lease_id), Cause.BROKEN)
            self._move(RunState.FAILED, str(error))

    def _decide(self, cause: Cause, detail: str, account: LeaseAccount | None = None) -> Decision:
        if account is not None:
            self._count(cause, account.lease)
        candidates = self._candidates()
        if self._blocks.refusals and not candidates and cause not in STOPS:
            return Stop(StopReason.GAVE_UP, f"nothing can be rented: {'; '.join(self._blocks.refusals.values())}")
        decision = decide(
            Situation(
                cause=cause,
                candidates=candidates,
                remaining_usd=self.ledger.balance().free_usd,
                now_ms=self.clock.now_ms(),
                blocked_until_ms=self._blocks.until_ms,
                failures_without_progress=self._streak.failures,
                waits_in_a_row=self._streak.waits,
                detail=detail,
            )
        )
        if account is not None and not isinstance(decision, Stop):
            self._move(RunState.RECOVERING, cause.value)
            self._tell("relaunch", f"{cause.value}: {detail or 'the lease ended'}; next {decision.offer.offer_id}")
        return decision

    def _count(self, cause: Cause, lease: Lease) -> None:
        """Take in how a lease ended."""
        if cause is Cause.PREEMPTED:
            self.runs.count(self.run_record.run_id, preemptions=1)
        if cause in FAILURES:
            self.runs.count(self.run_record.run_id, failures=1)
        self._streak.ended(cause)
        near = self._candidates() if cause is Cause.PREEMPTED else []
        self._blocks.block(cause, lease, near, now_ms=self.clock.now_ms())

    # -- helpers ---------------------------------------------------------------------------------

    def _poll(self, lease: Lease) -> LeaseState:
        try:
            return self.backend.poll(lease)
        except BackendError as error:
            self._tell("warning", f"cannot see {lease.lease_id}: {error}")
            return LeaseState(LeasePhase.STARTING)

    def _wait(self, seconds: float) -> bool:
        """Sleep at no cost; False if a stop was requested meanwhile."""
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
        self.emit(Event(kind, message, datetime.now(UTC), {"stage": self.stage, **data}))

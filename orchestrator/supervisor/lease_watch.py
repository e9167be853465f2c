"""Watching one lease from its start, or its adoption, to its end.

Each turn: poll, accrue, report progress, ask the run to stop where it must, renew and answer, rent a lost node again.
What is remembered from turn to turn stands in the states of `orchestrator.supervisor.lease`, each of which is changed
by its own methods alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal

from cost.errors import BudgetExceeded
from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import Lease, micro_usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Cause
from orchestrator.backends.base import Backend, BackendError, LeasePhase, LeaseState
from orchestrator.clock import Clock
from orchestrator.runs.records import Runs
from orchestrator.supervisor.alarm import CapAlarm
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.incidentals import Incidentals
from orchestrator.supervisor.lease.accrual import Accrual
from orchestrator.supervisor.lease.census import Census
from orchestrator.supervisor.lease.outage import Outage
from orchestrator.supervisor.lease.regrow import Regrowth
from orchestrator.supervisor.lease.stopping import Stopping, StopSwitch
from orchestrator.supervisor.lease.training import Training
from orchestrator.supervisor.lease_policy import Terms
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError

Ending = tuple[Cause, str]
"""Why a lease ended or must be ended, and the detail of it."""


@dataclass(slots=True)
class LeaseWatch:
    """One lease under watch."""

    lease: Lease
    run_id: str
    runs: Runs
    ledger: Ledger
    backend: Backend
    store: Store
    clock: Clock
    terms: Terms
    grants: Grants
    switch: StopSwitch
    command: list[str]
    tell: Callable[..., None]
    on_running: Callable[[], None]
    reconcile: Callable[[], None]
    alarm: CapAlarm
    reconsider: Callable[[Decimal, float], str | None]
    """At that price and with that share of the run left: which offer is cheaper now, or None."""
    incidentals: Incidentals | None
    training: Training
    census: Census = field(init=False)
    accrual: Accrual = field(init=False)
    stopping: Stopping = field(init=False)
    regrowth: Regrowth = field(init=False)
    provider_outage: Outage = field(default_factory=Outage)
    store_outage: Outage = field(default_factory=Outage)
    considered_usd: Decimal = field(init=False)
    """The highest price per node-hour at which moving to another offer was considered."""
    reconcile_at: float = field(init=False)
    """When orphans are looked for next; real seconds."""
    incidentals_at: float = 0.0
    """When incidental costs are charged next; real seconds."""

    def __post_init__(self) -> None:
        self.census = Census(self.lease.num_nodes, self.clock, self.terms)
        self.accrual = Accrual(self.lease.lease_id, self.ledger, self.clock, self.terms, self.grants)
        self.stopping = Stopping(self.lease.lease_id, self.store, self.clock, self.terms, self.tell)
        self.regrowth = Regrowth(
            lease=self.lease,
            ledger=self.ledger,
            backend=self.backend,
            clock=self.clock,
            terms=self.terms,
            grants=self.grants,
            census=self.census,
            accrual=self.accrual,
            command=self.command,
            tell=self.tell,
        )
        self.considered_usd = self.lease.offer.usd_per_hour
        self.reconcile_at = self.clock.real_seconds() + self.terms.reconcile_seconds

    def until_it_ends(self) -> Ending:
        """Block until the lease has ended or must be ended; the caller closes it."""
        self.census.await_nodes()
        self.training.take_up()
        self.stopping.take_up()
        while True:
            ending = self._turn()
            if ending is not None:
                self.accrual.charge_to_newest_price()
                return ending
            self.clock.sleep(self.terms.poll_seconds)

    def _turn(self) -> Ending | None:
        try:
            state = self.backend.poll(self.lease)
        except BackendError as error:
            return self._out_of_sight(error)
        self.provider_outage.ends()
        account = self.accrual.charge(state.usd_per_hour)
        self.alarm.look()
        if state.usd_per_hour is not None and micro_usd(state.usd_per_hour) > account.worst_micro_usd:
            price, worst = state.usd_per_hour, account.lease.worst_usd_per_hour
            return Cause.TOO_DEAR, f"a node costs ${price:.2f}/h now, above its worst-case price of ${worst:.2f}/h"
        with self._store_may_be_away():
            self._report_progress(account)
        ending = self._ending(state, account)
        if ending is not None:
            return ending
        try:
            account = self._count_nodes(state, account)
        except BudgetExceeded as error:
            return Cause.CAP, f"more nodes live than are paid for: {error}"
        except StoreError as error:
            return Cause.BROKEN, f"more nodes live than are paid for, and no more can be paid for: {error}"
        with self._store_may_be_away():
            self._stop_if_asked()
            self._leave_if_dearer(state)
        if self.switch.level >= 2 or self.stopping.is_overdue:
            return self._asked_ending() or (Cause.ASKED, "ended at once, as asked")
        with self._store_may_be_away():
            self._keep_alive(account, state)
        if self.clock.real_seconds() >= self.reconcile_at:
            self.reconcile_at = self.clock.real_seconds() + self.terms.reconcile_seconds
            self.reconcile()
        return None

    def _out_of_sight(self, error: BackendError) -> Ending | None:
        """The provider does not answer: grant nothing. After the last terminator's time the lease is over too."""
        if self.provider_outage.begins():
            self.tell("warning", f"cannot see {self.lease.lease_id}: {error}")
        account = self.ledger.account(self.lease.lease_id)
        if self.clock.now_ms() > account.expires_ms + account.latency_ms:
            return Cause.EXPIRED, f"not seen since its paid time ended: {error}"
        return None

    @contextmanager
    def _store_may_be_away(self) -> Iterator[None]:
        """While the run store cannot be reached nothing is granted, and the nodes' paid time runs out by itself."""
        try:
            yield
        except StoreError as error:
            if self.store_outage.begins():
                self.tell("warning", f"nothing is granted while the run store is away: {error}")
        else:
            self.store_outage.ends()

    def _report_progress(self, account: LeaseAccount) -> None:
        report = self.training.news()
        if report is None:
            return
        if report.recovery_seconds is not None:
            message = f"training again at step {report.step} after {report.recovery_seconds:.1f} s"
            self.tell("recovered", message, step=report.step)
        for reason in report.skipped_checkpoints:
            self.tell("warning", f"a damaged checkpoint was passed over for the one before: {reason}")
        if report.is_first:
            self.on_running()
        balance = self.ledger.balance()
        self.tell(
            "progress",
            f"step {report.step}",
            progress=report.content,
            spent_usd=balance.spent_usd,
            held_usd=balance.held_usd,
            cap_usd=balance.cap_usd,
            num_nodes=account.num_nodes,
            preemptions=self.runs.get(self.run_id).preemptions,
        )

    # -- how it ended ----------------------------------------------------------------------------

    def _ending(self, state: LeaseState, account: LeaseAccount) -> Ending | None:
        if state.phase is LeasePhase.ENDED:
            return self._ending_of_command(state.exit_code)
        started = bool(self.census.alive) or state.phase is LeasePhase.GONE
        head_gone = state.phase is LeasePhase.GONE or (state.phase is LeasePhase.RUNNING and 0 not in state.alive_ranks)
        if started and head_gone:
            if self.stopping.request is not None:
                return self._asked_ending()
            if self.lease.ttl_seconds and self.clock.now_ms() >= self.grants.limit_ms(account):
                return Cause.TTL, "the provider's time limit ended it"
            if self.clock.now_ms() >= account.expires_ms:
                return Cause.EXPIRED, "its grant ran out"
            return Cause.PREEMPTED, state.detail or "the provider took its first node"
        if self.clock.real_seconds() - self.training.newest_at > self.terms.stall_seconds:
            return Cause.BROKEN, f"no new step for {self.terms.stall_seconds:.0f} s"
        return None

    def _ending_of_command(self, exit_code: int | None) -> Ending:
        """The node's command has ended by itself."""
        if exit_code == keys.EXIT_FINISHED:
            return Cause.FINISHED, "training is complete"
        if exit_code == keys.EXIT_BUG:
            return Cause.BUG, self._from_store(self.training.newest_failure, "training failed twice at one step")
        asked = self._asked_ending()
        if asked is not None:
            return asked
        if exit_code == keys.EXIT_NOTICE:
            return Cause.PREEMPTED, "the cloud announced that it takes the first node; the last step is saved"
        words = self._from_store(lambda: self.training.last_words(self.store, self.lease.lease_id), "")
        return Cause.BROKEN, f"the node's command ended with exit code {exit_code}{words}"

    def _asked_ending(self) -> Ending | None:
        """The ending that the training loop was asked for."""
        request = self.stopping.request
        return None if request is None else (request.cause, request.detail)

    def _from_store(self, read: Callable[[], str], otherwise: str) -> str:
        """What the run store has to say, or less if it is away: a lease that ended is settled all the same."""
        try:
            return read()
        except StoreError:
            return otherwise

    # -- nodes -----------------------------------------------------------------------------------

    def _count_nodes(self, state: LeaseState, account: LeaseAccount) -> LeaseAccount:
        """Release what was reserved for a lost node, and plan to rent it again; pay for one that appeared after all.

        Raises:
            BudgetExceeded: More nodes live than the cap can pay for.
        """
        self.census.see(state.alive_ranks)
        if len(self.census.alive) > account.num_nodes:
            account = self.accrual.resize(len(self.census.alive))
        lost = self.census.drop_lost(state.alive_ranks, num_paid=account.num_nodes)
        if not lost:
            return account
        num_left = len(self.census.alive)
        account = self.accrual.resize(max(1, num_left))
        self.runs.count(self.run_id, preemptions=len(lost))
        names = ", ".join(str(rank) for rank in lost)
        self.tell("lost", f"node {names} of {self.lease.lease_id} is gone, {num_left} left", ranks=lost)
        self.training.interrupted()
        self.regrowth.plan()
        return account

    def _keep_alive(self, account: LeaseAccount, state: LeaseState) -> None:
        """Pay for more time, answer the nodes, rent lost ones again; at the drain threshold ask for a stop."""
        try:
            account, lasts = self.grants.renew(account)
        except BackendError as error:
            # Paid for, but the provider's limit stands where it was: it ends the nodes earlier than the ledger says.
            self.tell("warning", f"the time limit of {self.lease.lease_id} could not be moved: {error}")
            return
        lasts = self._charge_incidentals() and lasts
        if not lasts and self.stopping.request is None:
            if self.lease.ttl_seconds:
                self.stopping.ask(Cause.TTL, "the provider's time limit is near")
            else:
                free = self.ledger.balance().free_usd
                self.stopping.ask(Cause.CAP, f"${free:.2f} of the cap is unreserved: the drain threshold is reached")
        for rank in self.grants.answer(account, state.alive_ranks):
            self.tell("notice", f"the cloud will take node {rank} of {self.lease.lease_id}", rank=rank)
        if self.stopping.request is None:
            self.regrowth.ask_if_due(account)

    def _charge_incidentals(self) -> bool:
        """Charge storage and transfers from time to time; False when the cap covers no more of them."""
        if self.incidentals is None or self.clock.real_seconds() < self.incidentals_at:
            return True
        self.incidentals_at = self.clock.real_seconds() + self.terms.accrue_seconds
        try:
            self.incidentals.keep(at_ms=self.clock.now_ms())
        except BudgetExceeded:
            return False
        return True

    # -- stopping --------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        if self.stopping.request is None and (self.switch.level or self.runs.stop_requested(self.run_id)):
            self.stopping.ask(Cause.ASKED, "stopped as asked")

    def _leave_if_dearer(self, state: LeaseState) -> None:
        """When the price has risen, see whether another offer finishes the run for less."""
        price = state.usd_per_hour
        if price is None or price <= self.considered_usd or self.training.step is None:
            return
        if self.stopping.request is not None:
            return
        self.considered_usd = price
        share_left = self.training.share_left()
        elsewhere = self.reconsider(price, share_left) if share_left is not None else None
        if elsewhere is not None:
            self.stopping.ask(Cause.DEARER, f"a node costs ${price:.2f}/h now; {elsewhere} finishes the run for less")

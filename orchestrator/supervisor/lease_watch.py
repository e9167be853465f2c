"""Watching one lease from its start, or its adoption, to its end.

Each turn: see, accrue, tell, ask the run to stop where it must, renew and answer, rent a lost node again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cost.errors import BudgetExceeded
from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import Lease, micro_usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Cause
from orchestrator.backends.base import Backend, BackendError, LeasePhase, LeaseState, NoCapacity
from orchestrator.clock import Clock
from orchestrator.runs.records import Runs
from orchestrator.supervisor.alarm import CapAlarm
from orchestrator.supervisor.grants import Grants, affordable_until_ms
from orchestrator.supervisor.incidentals import Extras
from orchestrator.supervisor.lease_policy import Terms
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer, unwrap, wrap


@dataclass(slots=True)
class StopSwitch:
    """Ctrl-C and `slm stop`: level 1 asks for a checkpoint and a stop, level 2 ends the nodes at once."""

    level: int = 0

    def press(self) -> None:
        self.level += 1


@dataclass(slots=True)
class Watch:
    """One lease under watch. `step` is the newest step that the trainer reported."""

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
    extras: Extras | None = None
    step: int | None = None
    _stopping: Cause | None = None
    _stop_detail: str = ""
    _stop_asked_at: float = 0.0
    _running: bool = False
    asked_at: float | None = None
    """When nodes were asked for without a reply; real seconds."""
    _seen: set[int] = field(default_factory=set)
    _absent_since: dict[int, float] = field(default_factory=dict)
    _priced: tuple[int, Decimal] | None = None
    """The newest look at the price: billed milliseconds, dollars per node-hour."""
    _reconcile_at: float = 0.0
    _awaited_until: float = 0.0
    _last_new_step_at: float = 0.0
    _grow_at: float | None = None
    _grow_tries: int = 0
    lost_at: float | None = None
    """When the lease before this one was lost, for telling how long recovery took."""
    _incarnation: int = -1
    _unseen_since: float | None = None
    _store_away: bool = False
    _extras_at: float = 0.0
    _considered_usd: Decimal = Decimal(0)
    """The highest price at which moving was considered."""

    def until_it_ends(self) -> tuple[Cause, str]:
        """Block until the lease has ended or must be ended; the caller closes it."""
        self._last_new_step_at = self.clock.real_seconds()
        self._await_nodes()
        self._considered_usd = self.lease.offer.usd_per_hour
        self._reconcile_at = self.clock.real_seconds() + self.terms.reconcile_seconds
        self._take_up()
        while True:
            ended = self._turn()
            if ended is not None:
                self._charge_to_last_look()
                return ended
            self.clock.sleep(self.terms.poll_seconds)

    def _turn(self) -> tuple[Cause, str] | None:
        try:
            state = self.backend.poll(self.lease)
        except BackendError as error:
            return self._unseen(error)
        self._unseen_since = None
        account = self._accrue(state)
        self.alarm.look()
        if state.usd_per_hour is not None and micro_usd(state.usd_per_hour) > account.worst_micro_usd:
            price, worst = state.usd_per_hour, account.lease.worst_usd_per_hour
            return Cause.TOO_DEAR, f"a node costs ${price:.2f}/h now, above its worst-case price of ${worst:.2f}/h"
        with self._store_may_be_away():
            self._read_progress(account)
        ended = self._ended(state, account)
        if ended is not None:
            return ended
        try:
            account = self._count_nodes(state, account)
        except BudgetExceeded as error:
            return Cause.CAP, f"more nodes live than are paid for: {error}"
        except StoreError as error:
            return Cause.BROKEN, f"more nodes live than are paid for, and no more can be paid for: {error}"
        with self._store_may_be_away():
            self._ask_to_stop_if_told()
            self._leave_if_dearer(state)
        if self.switch.level >= 2 or self._grace_is_over():
            return self._stopping or Cause.ASKED, self._stop_detail or "ended at once, as asked"
        with self._store_may_be_away():
            self._keep_alive(account, state)
        if self.clock.real_seconds() >= self._reconcile_at:
            self._reconcile_at = self.clock.real_seconds() + self.terms.reconcile_seconds
            self.reconcile()
        return None

    def _keep_alive(self, account: LeaseAccount, state: LeaseState) -> None:
        """Pay for more time, tell the nodes, rent lost ones again; at the drain line ask for a stop."""
        try:
            account, reaches = self.grants.renew(account)
        except BackendError as error:
            # Paid for, but the provider's limit stands where it was: it ends the nodes earlier than the ledger says.
            self.tell("warning", f"the time limit of {self.lease.lease_id} could not be moved: {error}")
            return
        reaches = self._keep_extras() and reaches
        if not reaches and self._stopping is None:
            if self.lease.ttl_seconds:
                self._ask(Cause.TTL, "the provider's time limit is near")
            else:
                free = self.ledger.balance().free_usd
                self._ask(Cause.CAP, f"${free:.2f} of the cap is unreserved: the drain threshold is reached")
        for rank in self.grants.answer(account, state.alive_ranks):
            self.tell("notice", f"the cloud will take node {rank} of {self.lease.lease_id}", rank=rank)
        self._grow(account)

    def _keep_extras(self) -> bool:
        """Charge storage and transfers now and then; False when the cap covers no more of them."""
        if self.extras is None or self.clock.real_seconds() < self._extras_at:
            return True
        self._extras_at = self.clock.real_seconds() + self.terms.accrue_seconds
        try:
            self.extras.keep(at_ms=self.clock.now_ms())
        except BudgetExceeded:
            return False
        return True

    @contextmanager
    def _store_may_be_away(self) -> Iterator[None]:
        """While the run store cannot be reached nothing is granted, and the nodes' paid time runs out by itself."""
        try:
            yield
        except StoreError as error:
            if not self._store_away:
                self.tell("warning", f"nothing is granted while the run store is away: {error}")
            self._store_away = True
        else:
            self._store_away = False

    def _accrue(self, state: LeaseState) -> LeaseAccount:
        """Charge elapsed time now and then; at once when the price has changed, or was not seen for long."""
        lease_id, now_ms, price = self.lease.lease_id, self.clock.now_ms(), state.usd_per_hour
        account = self.ledger.account(lease_id)
        if price is None:
            return account
        last_ms = account.started_ms if self._priced is None else self._priced[0]
        if now_ms - last_ms > self.grants.billed_ms(self.terms.price_gap_seconds):
            self._charge_to_last_look()
            account = self.ledger.accrue(lease_id, at_ms=now_ms)
        self._priced = (now_ms, price)
        changed = micro_usd(price) != account.price_micro_usd
        if not changed and now_ms - account.accrued_until_ms < self.grants.billed_ms(self.terms.accrue_seconds):
            return account
        return self.ledger.accrue(lease_id, at_ms=now_ms, usd_per_hour=price)

    def _charge_to_last_look(self) -> None:
        """What is certain is charged at its price, so that only the rest counts at p-hat."""
        if self._priced is not None:
            self.ledger.accrue(self.lease.lease_id, at_ms=self._priced[0], usd_per_hour=self._priced[1])

    def _resize(self, num_nodes: int) -> LeaseAccount:
        self._charge_to_last_look()
        return self.ledger.resize(self.lease.lease_id, num_nodes=num_nodes, at_ms=self.clock.now_ms())

    # -- seeing ----------------------------------------------------------------------------------

    def _unseen(self, error: BackendError) -> tuple[Cause, str] | None:
        """The provider does not answer: grant nothing; when the last terminator's time is over, the lease is too."""
        if self._unseen_since is None:
            self._unseen_since = self.clock.real_seconds()
            self.tell("warning", f"cannot see {self.lease.lease_id}: {error}")
        account = self.ledger.account(self.lease.lease_id)
        if self.clock.now_ms() > account.expires_ms + account.latency_ms:
            return Cause.EXPIRED, f"not seen since its paid time ended: {error}"
        return None

    def _ended(self, state: LeaseState, account: LeaseAccount) -> tuple[Cause, str] | None:
        if state.phase is LeasePhase.ENDED:
            return self._ended_by_itself(state.exit_code)
        started = bool(self._seen) or state.phase is LeasePhase.GONE
        head_gone = state.phase is LeasePhase.GONE or (state.phase is LeasePhase.RUNNING and 0 not in state.alive_ranks)
        if started and head_gone:
            if self._stopping is not None:
                return self._stopping, self._stop_detail
            if self.lease.ttl_seconds and self.clock.now_ms() >= self.grants.limit_ms(account):
                return Cause.TTL, "the provider's time limit ended it"
            if self.clock.now_ms() >= account.expires_ms:
                return Cause.EXPIRED, "its grant ran out"
            return Cause.PREEMPTED, state.detail or "the provider took its first node"
        if self.clock.real_seconds() - self._last_new_step_at > self.terms.stall_seconds:
            return Cause.BROKEN, f"no new step for {self.terms.stall_seconds:.0f} s"
        return None

    def _ended_by_itself(self, exit_code: int | None) -> tuple[Cause, str]:
        if exit_code == keys.EXIT_FINISHED:
            return Cause.FINISHED, "training is complete"
        if exit_code == keys.EXIT_STOPPED and self._stopping is not None:
            return self._stopping, self._stop_detail
        if exit_code == keys.EXIT_BUG:
            return Cause.BUG, self._from_store(self._newest_failure, "training failed twice at one step")
        if self._stopping is not None:
            return self._stopping, self._stop_detail
        if exit_code == keys.EXIT_NOTICE:
            return Cause.PREEMPTED, "the cloud announced that it takes the first node; the last step is saved"
        words = self._from_store(self._last_words, "")
        return Cause.BROKEN, f"the node's command ended with exit code {exit_code}{words}"

    def _from_store(self, read: Callable[[], str], otherwise: str) -> str:
        """What the run store has to say, or less if it is away: a lease that ended is settled all the same."""
        try:
            return read()
        except StoreError:
            return otherwise

    def _last_words(self) -> str:
        """The last line of the first node's log, since it often says why."""
        try:
            lines = self.store.read(keys.node_log(self.lease.lease_id, 0)).decode(errors="replace").splitlines()
        except StoreKeyMissing:
            return ""
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" after: {words[:200]}" if words else ""

    def _newest_failure(self) -> str:
        failures = self.store.list(keys.FAILURES)
        if not failures:
            return "training failed twice at one step, without a record of why"
        failure = unwrap(self.store.read(failures[-1]), failures[-1])
        return f"training failed twice at step {failure.get('step')}: {failure.get('message')}"

    def _count_nodes(self, state: LeaseState, account: LeaseAccount) -> LeaseAccount:
        """Release what a lost node had set aside, and plan to rent it again; pay for one that came after all.

        Raises:
            BudgetExceeded: More nodes live than the cap can pay for.
        """
        alive, now = set(state.alive_ranks), self.clock.real_seconds()
        self._seen |= alive
        if len(self._seen) > account.num_nodes:
            account = self._resize(len(self._seen))
        lost = self._absent_for_long(alive)
        self._seen -= set(lost)
        overdue = account.num_nodes > len(self._seen) and now > self._awaited_until
        if not lost and overdue:
            lost = sorted(set(range(self.lease.num_nodes)) - self._seen)  # paid for, and never seen alive
        if not lost:
            return account
        account = self._resize(max(1, len(self._seen)))
        self.runs.count(self.run_id, preemptions=len(lost))
        names = ", ".join(str(rank) for rank in lost)
        self.tell("lost", f"node {names} of {self.lease.lease_id} is gone, {len(self._seen)} left", ranks=lost)
        self.lost_at = now
        self._grow_at, self._grow_tries = now + self.terms.grow_delay_seconds, 0
        return account

    def _absent_for_long(self, alive: set[int]) -> list[int]:
        """Nodes that no list has shown for `confirm_seconds`; a list that lies once proves nothing."""
        now = self.clock.real_seconds()
        self._absent_since = {rank: self._absent_since.get(rank, now) for rank in self._seen - alive}
        return sorted(rank for rank, since in self._absent_since.items() if now - since >= self.terms.confirm_seconds)

    def _await_nodes(self) -> None:
        """Until when a node that was asked for may stay unseen, and keeps what is set aside for it."""
        allowed = max(self.terms.boot_allowance_seconds, self.terms.create_seconds) + self.terms.confirm_seconds
        self._awaited_until = self.clock.real_seconds() + allowed

    def _take_up(self) -> None:
        """Begin where the run stands: its newest step, and a stop that an earlier supervisor has asked for."""
        progress = self._progress()
        if progress is not None:
            self.step, self._incarnation = progress.get("step"), int(progress.get("incarnation", -1))
        asked = self._json(keys.control(self.lease.lease_id))
        if asked is not None and asked.get("command") == "stop":
            self._stopping, self._stop_detail = Cause(asked["reason"]), "asked before this supervisor took over"
            self._stop_asked_at = self.clock.real_seconds()

    def _progress(self) -> dict[str, Any] | None:
        return self._json(keys.PROGRESS)

    def _json(self, key: str) -> dict[str, Any] | None:
        try:
            return unwrap(self.store.read(key), key)
        except (StoreKeyMissing, RecordError):
            return None

    def _read_progress(self, account: LeaseAccount) -> None:
        progress = self._progress()
        if progress is None:
            return
        step, incarnation = progress.get("step"), int(progress.get("incarnation", -1))
        if (step, incarnation) == (self.step, self._incarnation):
            return
        now = self.clock.real_seconds()
        if incarnation != self._incarnation and self.lost_at is not None:
            self.tell("recovered", f"training again at step {step} after {now - self.lost_at:.1f} s", step=step)
            self.lost_at = None
        if incarnation != self._incarnation:
            self._tell_skipped_checkpoints(incarnation)
        self._incarnation, self.step, self._last_new_step_at = incarnation, step, now
        if not self._running:
            self._running = True
            self.on_running()
        balance = self.ledger.balance()
        self.tell(
            "progress",
            f"step {step}",
            progress=progress,
            spent_usd=balance.spent_usd,
            held_usd=balance.held_usd,
            cap_usd=balance.cap_usd,
            num_nodes=account.num_nodes,
            preemptions=self.runs.get(self.run_id).preemptions,
        )

    def _tell_skipped_checkpoints(self, incarnation: int) -> None:
        """Say which damaged checkpoints the workers passed over when they began."""
        for reason in (self._json(keys.incarnation(incarnation)) or {}).get("skipped", []):
            self.tell("warning", f"a damaged checkpoint was passed over for the one before: {reason}")

    # -- stopping --------------------------------------------------------------------------------

    def _ask_to_stop_if_told(self) -> None:
        if self._stopping is None and (self.switch.level or self.runs.stop_requested(self.run_id)):
            self._ask(Cause.ASKED, "stopped as asked")

    def _ask(self, cause: Cause, detail: str) -> None:
        """Ask the training loop for a checkpoint and its end; the lease goes on until it has done so."""
        message = {"command": "stop", "number": 1, "reason": cause.value}
        self.store.write(keys.control(self.lease.lease_id), wrap(message, Writer.SUPERVISOR))
        self._stopping, self._stop_detail = cause, detail
        self._stop_asked_at = self.clock.real_seconds()
        self.tell("warning", f"asking for a checkpoint and a stop: {detail}")

    def _leave_if_dearer(self, state: LeaseState) -> None:
        """When the price has risen, see whether another offer finishes the run for less."""
        price = state.usd_per_hour
        if price is None or price <= self._considered_usd or self.step is None or self._stopping is not None:
            return
        self._considered_usd = price
        steps = (self._progress() or {}).get("num_steps")
        elsewhere = self.reconsider(price, 1 - self.step / steps) if steps else None
        if elsewhere is not None:
            self._ask(Cause.DEARER, f"a node costs ${price:.2f}/h now; {elsewhere} finishes the run for less")

    def _grace_is_over(self) -> bool:
        waited = self.clock.real_seconds() - self._stop_asked_at
        return self._stopping is not None and waited > self.terms.stop_grace_seconds

    # -- growing back ----------------------------------------------------------------------------

    def _grow(self, account: LeaseAccount) -> None:
        """Rent lost nodes again under a reservation of its own, when it is worth it and there is capacity."""
        now = self.clock.real_seconds()
        if self._grow_at is None or now < self._grow_at or self._stopping is not None:
            return
        if self.lease.ttl_seconds:  # a node's limit would stand behind the others', and cannot be moved
            self._grow_at = None
            return
        wanted = self.lease.num_nodes
        if len(self._seen) >= wanted:
            self._grow_at = None
            return
        limit = affordable_until_ms(account, self.ledger.balance(), num_nodes=wanted)
        if limit - self.clock.now_ms() < self.grants.billed_ms(self.terms.smallest_seconds):
            self._grow_at = None
            self.tell("warning", f"not growing back to {wanted} nodes: too little money is left")
            return
        try:
            self._rent_missing(account, wanted)
        except BudgetExceeded:
            self._grow_at = None
        except NoCapacity as error:
            if self.clock.real_seconds() > self._awaited_until:  # else an earlier try may still bring a node
                self._resize(len(self._seen))
            self._grow_tries += 1
            self._grow_at = now + min(60.0, self.terms.grow_delay_seconds * 2**self._grow_tries)
            if self._grow_tries == 1:
                self.tell("warning", f"no node to grow back with yet: {error}")
        except BackendError as error:
            self._grow_at = now + 60.0  # maybe alive: it stays paid for until the provider lists it or not
            self.asked_at = self.clock.real_seconds()
            self._await_nodes()
            self.tell("warning", f"growing back: {error}")
        else:
            self._grow_at = None
            self._await_nodes()
            self.tell("grown", f"rented again, {wanted} nodes in {self.lease.lease_id}", num_nodes=wanted)

    def _rent_missing(self, account: LeaseAccount, wanted: int) -> None:
        """Pay for all nodes up to the new node's own first deadline, then ask for it."""
        self._resize(wanted)
        try:
            account = self.grants.pay_first_deadline(self.lease)
            self.grants.extend(account)  # the others' limit moves too: their next renewal is due only later now
            account = self.grants.pay_first_deadline(self.lease)  # again: the call before may have taken any time
        except BudgetExceeded:
            self._resize(len(self._seen))
            raise
        self.backend.start(self.lease, self.command)
        self.grants.extend(account)  # arms the new node where no limit could be set at its create

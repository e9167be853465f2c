"""Renting the lost nodes of a lease again, under a reservation of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost.errors import BudgetExceeded
from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from orchestrator.backends.base import Backend, BackendError, NoCapacity
from orchestrator.clock import Clock
from orchestrator.supervisor.grants import Grants, affordable_until_ms
from orchestrator.supervisor.lease.accrual import Accrual
from orchestrator.supervisor.lease.census import Census
from orchestrator.supervisor.lease_policy import Terms

LONGEST_PAUSE_SECONDS = 60.0


@dataclass(slots=True)
class Regrowth:
    """When lost nodes are asked for again. Only its own methods change it; times are real seconds."""

    lease: Lease
    ledger: Ledger
    backend: Backend
    clock: Clock
    terms: Terms
    grants: Grants
    census: Census
    accrual: Accrual
    command: list[str]
    tell: Callable[..., None]
    due_at: float | None = None
    """When to ask for nodes; None: there is nothing to ask for."""
    refusals: int = 0
    """Since the last loss, for want of capacity."""
    unanswered_at: float | None = None
    """When nodes were asked for without a reply."""

    def plan(self) -> None:
        """Nodes were lost just now."""
        self.due_at, self.refusals = self.clock.real_seconds() + self.terms.grow_delay_seconds, 0

    def ask_if_due(self, account: LeaseAccount) -> None:
        """Rent the lost nodes again, if it is time to, worth it, and there is capacity.

        Raises:
            StoreError: The run store does not answer, so nothing can be reserved.
        """
        now = self.clock.real_seconds()
        if self.due_at is None or now < self.due_at:
            return
        # A node's fixed limit would end later than the others', and cannot be moved.
        if self.lease.ttl_seconds or self.census.is_whole:
            self.due_at = None
            return
        wanted = self.lease.num_nodes
        limit = affordable_until_ms(account, self.ledger.balance(), num_nodes=wanted)
        if limit - self.clock.now_ms() < self.grants.billed_ms(self.terms.smallest_seconds):
            self.due_at = None
            self.tell("warning", f"not growing back to {wanted} nodes: too little money is left")
            return
        try:
            self._rent()
        except BudgetExceeded:
            self.due_at = None
        except NoCapacity as error:
            if not self.census.may_still_come:  # else an earlier try may still bring a node
                self.accrual.resize(len(self.census.alive))
            self.refusals += 1
            self.due_at = now + min(LONGEST_PAUSE_SECONDS, self.terms.grow_delay_seconds * 2**self.refusals)
            if self.refusals == 1:
                self.tell("warning", f"no node to grow back with yet: {error}")
        except BackendError as error:
            # They may be alive, and stay paid for until the provider has listed them or can no longer do so.
            self.due_at = now + LONGEST_PAUSE_SECONDS
            self.unanswered_at = self.clock.real_seconds()
            self.census.await_nodes()
            self.tell("warning", f"growing back: {error}")
        else:
            self.due_at = None
            self.census.await_nodes()
            self.tell("grown", f"rented again, {wanted} nodes in {self.lease.lease_id}", num_nodes=wanted)

    def _rent(self) -> None:
        """Pay for all nodes up to the new node's own first deadline, then ask for it."""
        self.accrual.resize(self.lease.num_nodes)
        try:
            account = self.grants.pay_first_deadline(self.lease)
            self.grants.extend(account)  # the others' limit moves too: their next renewal is due only later now
            account = self.grants.pay_first_deadline(self.lease)  # again: the call before may have taken any time
        except BudgetExceeded:
            self.accrual.resize(len(self.census.alive))
            raise
        self.backend.start(self.lease, self.command)
        self.grants.extend(account)  # sets the new node's limit where none could be set when it was created

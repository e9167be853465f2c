"""A cloud in memory that follows a script: for tests and simulations, under the same contract as the others.

It keeps a bill of its own, from the true moments of start and end, that no other code reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from cost.ledger.leases import Lease
from cost.market.offers import Offer
from orchestrator.backends.base import BackendError, Instance, LeasePhase, LeaseState, NoCapacity
from orchestrator.clock import Clock, utc

HOUR_MS = 3_600_000


@dataclass(slots=True)
class FakeNode:
    """One rented node; `deadline` is the provider's time limit in the clock's real seconds."""

    lease: Lease
    rank: int
    started_ms: int
    deadline: float
    ended_ms: int | None = None


@dataclass(slots=True)
class FakeBackend:
    """Rents nothing. `on_start` is called after each start, so that a test can script what follows."""

    clock: Clock
    quotes: Sequence[Offer] = ()
    capacity: int = 1_000
    on_start: Callable[[FakeBackend, Lease], None] | None = None
    name: str = "fake"
    fail_next: int = 0
    """So many of the next calls raise BackendError, after having done what they were asked."""
    hidden: set[int] = field(default_factory=set)
    """Ranks that live and are not listed."""
    deaf_to_stop: bool = False
    usd_per_hour: Decimal | None = None
    """The price as read back, where it is not the offer's."""
    starts: list[Lease] = field(default_factory=list)
    commands: list[tuple[str, ...]] = field(default_factory=list)
    _nodes: list[FakeNode] = field(default_factory=list)
    _exit_codes: dict[str, int] = field(default_factory=dict)

    # -- the contract ----------------------------------------------------------------------------

    def offers(self) -> Sequence[Offer]:
        return self.quotes

    def start(self, lease: Lease, command: Sequence[str]) -> None:
        self._expire()
        have = {node.rank for node in self._alive(lease.lease_id)}
        missing = [rank for rank in range(lease.num_nodes) if rank not in have]
        if not missing:
            return
        alive = sum(1 for node in self._nodes if node.ended_ms is None)
        if alive + len(missing) > self.capacity:
            raise NoCapacity(f"{lease.offer.offer_id}: {self.capacity - alive} nodes free, {len(missing)} requested")
        deadline = self.clock.real_seconds() + (lease.ttl_seconds or lease.first_grant_seconds)
        self._nodes += [FakeNode(lease, rank, self.clock.now_ms(), deadline) for rank in missing]
        self._exit_codes.pop(lease.lease_id, None)
        self.starts.append(lease)
        self.commands.append(tuple(command))
        self._maybe_fail()
        if self.on_start is not None:
            self.on_start(self, lease)

    def poll(self, lease: Lease) -> LeaseState:
        self._maybe_fail()
        self._expire()
        alive = [node for node in self._alive(lease.lease_id) if node.rank not in self.hidden]
        if not alive:
            return LeaseState(LeasePhase.GONE)
        exit_code = self._exit_codes.get(lease.lease_id)
        phase = LeasePhase.RUNNING if exit_code is None else LeasePhase.ENDED
        ranks = tuple(sorted(node.rank for node in alive))
        return LeaseState(phase, ranks, exit_code, self.usd_per_hour or lease.offer.usd_per_hour)

    def extend(self, lease: Lease, seconds: float) -> None:
        for node in self._alive(lease.lease_id):
            node.deadline = self.clock.real_seconds() + seconds

    def stop(self, lease: Lease) -> None:
        for node in [] if self.deaf_to_stop else self._alive(lease.lease_id):
            node.ended_ms = self.clock.now_ms()
        self._maybe_fail()

    def list_alive(self) -> Sequence[Instance]:
        self._expire()
        return [
            Instance(
                instance_id=f"{node.lease.lease_id}-{node.rank}",
                lease_id=node.lease.lease_id,
                run_id=node.lease.run_id,
                rank=node.rank,
                usd_per_hour=node.lease.offer.usd_per_hour,
                started_at=utc(node.started_ms),
            )
            for node in self._nodes
            if node.ended_ms is None
        ]

    # -- the script ------------------------------------------------------------------------------

    def take(self, lease_id: str, rank: int | None = None) -> None:
        """Preempt one node, or the whole lease."""
        for node in self._alive(lease_id):
            if rank is None or node.rank == rank:
                node.ended_ms = self.clock.now_ms()

    def end_command(self, lease_id: str, exit_code: int) -> None:
        """Node 0's command ends; the nodes still cost money."""
        self._exit_codes[lease_id] = exit_code

    def true_bill_usd(self) -> Decimal:
        """What this cloud will charge: real node time at the price of the offer."""
        now = self.clock.now_ms()
        return sum(
            (
                node.lease.offer.usd_per_hour * Decimal((node.ended_ms or now) - node.started_ms) / HOUR_MS
                for node in self._nodes
            ),
            Decimal(0),
        )

    def _alive(self, lease_id: str) -> list[FakeNode]:
        return [node for node in self._nodes if node.lease.lease_id == lease_id and node.ended_ms is None]

    def _expire(self) -> None:
        """The provider's own limit: a node past its deadline ended at that deadline."""
        now, now_ms = self.clock.real_seconds(), self.clock.now_ms()
        for node in self._nodes:
            if node.ended_ms is None and now >= node.deadline:
                node.ended_ms = now_ms - int((now - node.deadline) * 1000 * self.clock.scale)

    def _maybe_fail(self) -> None:
        if self.fail_next:
            self.fail_next -= 1
            raise BackendError("the fake cloud did not answer")

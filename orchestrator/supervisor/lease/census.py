"""Which nodes of a lease count as alive.

A provider's list may lag or be wrong for a moment: a node is lost only after no list has shown it for
`confirm_seconds`, and a node that was asked for may stay unseen for as long as its creation can take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.clock import Clock
from orchestrator.supervisor.lease_policy import Terms


@dataclass(slots=True)
class Census:
    """The nodes of one lease, by rank. Only its own methods change it; times are real seconds."""

    num_nodes: int
    """That the lease has when it is whole."""
    clock: Clock
    terms: Terms
    alive: set[int] = field(default_factory=set)
    """Nodes that were seen and not lost since."""
    _absent_since: dict[int, float] = field(default_factory=dict)
    _awaited_until: float = 0.0

    def await_nodes(self) -> None:
        """Nodes were asked for just now: until they can no longer appear, what is reserved for them is kept."""
        allowed = max(self.terms.boot_allowance_seconds, self.terms.create_seconds) + self.terms.confirm_seconds
        self._awaited_until = self.clock.real_seconds() + allowed

    @property
    def may_still_come(self) -> bool:
        """Whether a node that was asked for and never seen can still appear."""
        return self.clock.real_seconds() <= self._awaited_until

    @property
    def is_whole(self) -> bool:
        return len(self.alive) >= self.num_nodes

    def see(self, ranks: Iterable[int]) -> None:
        """Count what a list shows."""
        self.alive |= set(ranks)

    def drop_lost(self, ranks: Iterable[int], *, num_paid: int) -> list[int]:
        """Remove the nodes that the list has not shown for long, and say which are gone.

        If none of them is, those that are paid for and never appeared in time.
        """
        now = self.clock.real_seconds()
        self._absent_since = {rank: self._absent_since.get(rank, now) for rank in self.alive - set(ranks)}
        lost = sorted(rank for rank, since in self._absent_since.items() if now - since >= self.terms.confirm_seconds)
        self.alive -= set(lost)
        if not lost and num_paid > len(self.alive) and not self.may_still_come:
            lost = sorted(set(range(self.num_nodes)) - self.alive)
        return lost

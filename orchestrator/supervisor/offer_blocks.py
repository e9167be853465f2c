"""Which offers one supervisor does not rent for now, and which it never rents again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cost.ledger.leases import Lease
from cost.ledger.recovery import BLOCK_MS, Candidate, Cause, same_market
from cost.market.offers import Offer


@dataclass(slots=True)
class OfferBlocks:
    """Blocks by offer and number of nodes. `refuse` and `block` change it; nothing is unblocked but by time."""

    _until_ms: dict[tuple[str, int], int] = field(default_factory=dict)
    _refusals: dict[str, str] = field(default_factory=dict)

    @property
    def until_ms(self) -> Mapping[tuple[str, int], int]:
        """Billed milliseconds by `Candidate.key`."""
        return self._until_ms

    @property
    def refusals(self) -> Mapping[str, str]:
        """Why an offer was refused for good, by offer_id."""
        return self._refusals

    def refuse(self, offer: Offer, reason: str) -> None:
        """Waiting does not help there."""
        self._refusals[offer.offer_id] = reason

    def block(self, cause: Cause, lease: Lease, candidates: Iterable[Candidate], *, now_ms: int) -> None:
        """Block what the end of a lease tells to avoid.

        A lack of capacity blocks that many nodes of the offer; a preemption or a price that rose blocks as many and
        fewer; a preemption blocks the whole market that the offer belongs to as well.
        """
        offer_id, until_ms = lease.offer.offer_id, now_ms + BLOCK_MS
        if cause is Cause.NO_CAPACITY:
            self._until_ms[(offer_id, lease.num_nodes)] = until_ms
        if cause in (Cause.PREEMPTED, Cause.TOO_DEAR, Cause.DEARER):
            self._until_ms |= {(offer_id, count): until_ms for count in range(1, lease.num_nodes + 1)}
        if cause is Cause.PREEMPTED:
            near = [candidate for candidate in candidates if same_market(lease.offer, candidate.offer)]
            self._until_ms |= {candidate.key: until_ms for candidate in near}

    def not_refused(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates that are not refused for good, in the same order; they may be blocked."""
        return [candidate for candidate in candidates if candidate.offer.offer_id not in self._refusals]

    def free(self, candidates: Iterable[Candidate], *, now_ms: int) -> list[Candidate]:
        """Candidates that may be rented at this moment."""
        return [candidate for candidate in candidates if self._until_ms.get(candidate.key, 0) <= now_ms]

"""Which offers are avoided after a lease has ended, and for how long."""

from __future__ import annotations

from decimal import Decimal

from cost.ledger.recovery import BLOCK_MS, Candidate, Cause
from cost.market.offers import Offer
from orchestrator.supervisor.offer_blocks import OfferBlocks
from tests.support.builders import make_lease, make_offer

HERE = make_offer(region="here")
LARGER = make_offer(region="here", instance_type="larger")
THERE = make_offer(region="there")
CANDIDATES = [Candidate(offer, count, Decimal(1)) for offer in (HERE, LARGER, THERE) for count in (2, 1)]


def free_after(cause: Cause, *, num_nodes: int = 2, now_ms: int = 0) -> list[tuple[Offer, int]]:
    blocks = OfferBlocks()
    blocks.block(cause, make_lease(HERE, num_nodes=num_nodes), CANDIDATES, now_ms=0)
    return [(candidate.offer, candidate.num_nodes) for candidate in blocks.free(CANDIDATES, now_ms=now_ms)]


def test_a_lack_of_capacity_blocks_that_many_nodes_only() -> None:
    assert free_after(Cause.NO_CAPACITY) == [(HERE, 1), (LARGER, 2), (LARGER, 1), (THERE, 2), (THERE, 1)]


def test_a_price_that_rose_blocks_the_offer_and_not_its_neighbours() -> None:
    assert free_after(Cause.DEARER) == [(LARGER, 2), (LARGER, 1), (THERE, 2), (THERE, 1)]


def test_a_preemption_blocks_the_whole_market() -> None:
    assert free_after(Cause.PREEMPTED) == [(THERE, 2), (THERE, 1)]


def test_a_failure_of_ours_blocks_nothing() -> None:
    assert len(free_after(Cause.BROKEN)) == len(CANDIDATES)


def test_a_block_ends_by_itself() -> None:
    assert len(free_after(Cause.PREEMPTED, now_ms=BLOCK_MS)) == len(CANDIDATES)


def test_a_refusal_is_for_good_and_is_no_block() -> None:
    blocks = OfferBlocks()
    blocks.refuse(HERE, "no quota")
    assert blocks.refusals == {HERE.offer_id: "no quota"}
    assert [candidate.offer for candidate in blocks.not_refused(CANDIDATES)] == [LARGER, LARGER, THERE, THERE]
    assert blocks.until_ms == {}

"""What to do when a lease has ended: one pure function, so that every path can be tested without a cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from cost.market.offers import ANY_REGION, Offer

MAX_FAILURES_WITHOUT_PROGRESS = 6
"""Failures of our processes in a row, without a new step between them, before a run is given up."""
BLOCK_MS = 10 * 60 * 1000
"""Billed time for which an offer that preempted us, or had no capacity, is tried last."""
MOVE_MARGIN = Decimal("0.05")
"""Moving must save this share of what staying costs, since prices can change again."""
FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 60.0


class Cause(StrEnum):
    """Why a lease ended. Preempted: the cloud took it. Broken: our processes died. Bug: the training code raised."""

    FINISHED = "finished"
    ASKED = "asked"
    CAP = "cap"
    PREEMPTED = "preempted"
    EXPIRED = "expired"
    TTL = "ttl"
    BROKEN = "broken"
    BUG = "bug"
    NO_CAPACITY = "no_capacity"
    TOO_DEAR = "too_dear"
    DEARER = "dearer"
    """Its price rose, though not above its bound, and another offer finishes the run for less."""


class StopReason(StrEnum):
    FINISHED = "finished"
    ASKED = "asked"
    BUDGET = "budget"
    BUG = "bug"
    GAVE_UP = "gave_up"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An offer in plan order, and what the smallest useful lease of it would reserve."""

    offer: Offer
    num_nodes: int
    needed_usd: Decimal
    expected_usd: Decimal | None = None
    """Expected dollars of the whole run on this offer when it was planned."""

    @property
    def key(self) -> tuple[str, int]:
        """Key of the block list: fewer nodes of the same offer may still be available."""
        return self.offer.offer_id, self.num_nodes


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that `decide` may look at."""

    cause: Cause
    candidates: Sequence[Candidate]
    remaining_usd: Decimal
    now_ms: int
    blocked_until_ms: Mapping[tuple[str, int], int]
    """By `Candidate.key`."""
    failures_without_progress: int
    waits_in_a_row: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Relaunch:
    offer: Offer
    num_nodes: int
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Rollover:
    """The provider's fixed time limit ended the lease, as planned: start again on the same offer, no preemption."""

    offer: Offer
    num_nodes: int


@dataclass(frozen=True, slots=True)
class Stop:
    reason: StopReason
    message: str


Decision = Relaunch | Rollover | Stop

STOPS: Mapping[Cause, StopReason] = {
    Cause.FINISHED: StopReason.FINISHED,
    Cause.ASKED: StopReason.ASKED,
    Cause.CAP: StopReason.BUDGET,
    Cause.BUG: StopReason.BUG,
}


def decide(situation: Situation) -> Decision:
    """What to do after a lease has ended.

    A run that finished, was asked to stop, reached its cap or met a bug ends. So does a run whose offers all cost more
    than their worst-case price, since nothing would bound what another lease costs. Every other run continues on the
    first candidate in plan order that is affordable and not blocked (on-demand only where it `pays`). If all are
    blocked, it waits, at no cost, for the candidate that is unblocked first. Waits double up to MAX_DELAY_SECONDS.
    """
    stop = STOPS.get(situation.cause)
    if stop is not None:
        return Stop(stop, situation.detail or stop.value)
    if situation.failures_without_progress >= MAX_FAILURES_WITHOUT_PROGRESS:
        return Stop(
            StopReason.GAVE_UP,
            f"{situation.failures_without_progress} failures in a row without a new step; the last one: "
            f"{situation.detail}",
        )
    affordable = [candidate for candidate in situation.candidates if candidate.needed_usd <= situation.remaining_usd]
    affordable = [candidate for candidate in affordable if pays(candidate, affordable, situation.remaining_usd)]
    if not affordable:
        cheapest = min((candidate.needed_usd for candidate in situation.candidates), default=Decimal(0))
        return Stop(
            StopReason.BUDGET,
            f"${situation.remaining_usd:.2f} of the cap is left and the smallest lease reserves ${cheapest:.2f}",
        )
    free = [candidate for candidate in affordable if not is_blocked(candidate, situation)]
    if situation.cause is Cause.TTL:
        first = (free or affordable)[0]
        return Rollover(first.offer, first.num_nodes)
    if situation.cause is Cause.TOO_DEAR and not free:
        return Stop(
            StopReason.GAVE_UP, f"every offer costs more than its worst-case price; the last one: {situation.detail}"
        )
    chosen = free[0] if free else min(affordable, key=lambda candidate: situation.blocked_until_ms[candidate.key])
    return Relaunch(chosen.offer, chosen.num_nodes, delay_seconds(situation, waiting=not free))


def pays(candidate: Candidate, affordable: Sequence[Candidate], remaining_usd: Decimal) -> bool:
    """Whether an on-demand candidate is worth its price, given that waiting for spot costs nothing.

    On-demand is taken where the plan prefers it to all spot, or where the money pays for the whole run on it and leaves
    what spot is expected to need: B - p_s A (T - t) > p_o W, with W at its longest.
    """
    spot = [candidate for candidate in affordable if candidate.offer.spot]
    if candidate.offer.spot or not spot or candidate.expected_usd is None:
        return True
    if affordable.index(candidate) < affordable.index(spot[0]):
        return True
    kept = min((candidate.expected_usd for candidate in spot if candidate.expected_usd is not None), default=Decimal(0))
    return remaining_usd - kept > candidate.expected_usd


def same_market(offer: Offer, other: Offer) -> bool:
    """Whether `other` shares `offer`'s preemptions: the same offer, or spot nodes with one GPU type in one zone."""
    if offer.offer_id == other.offer_id:
        return True
    here, there = ((o.cloud, o.region, o.zone, o.accelerator, o.spot) for o in (offer, other))
    return offer.spot and offer.region != ANY_REGION and here == there


def is_blocked(candidate: Candidate, situation: Situation) -> bool:
    return situation.blocked_until_ms.get(candidate.key, 0) > situation.now_ms


def delay_seconds(situation: Situation, *, waiting: bool) -> float:
    """Real seconds before the next attempt: none after a first preemption, then growing."""
    tries = situation.failures_without_progress if situation.cause is Cause.BROKEN else 0
    if waiting or situation.cause is Cause.NO_CAPACITY:
        tries = max(tries, situation.waits_in_a_row)
    if tries == 0:
        return 0.0
    return min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(tries - 1, 30))


def cheaper_elsewhere(
    current: Candidate,
    others: Sequence[Candidate],
    *,
    usd_per_hour: Decimal,
    share_left: float,
    restart_hours: float,
) -> Candidate | None:
    """The candidate on which the rest of the run costs least, if that saves MOVE_MARGIN at today's prices.

    Move from offer 1 to offer 2 only if p_2 W_2 + p_2 R < p_1 W_1, where W is the hours left on each and R those of a
    restart. The expected cost of the whole run times the share that is left is p W.
    """
    if current.expected_usd is None:
        return None
    left = Decimal(share_left)
    stay_usd = current.expected_usd * usd_per_hour / current.offer.usd_per_hour * left

    def moved_usd(candidate: Candidate) -> Decimal:
        assert candidate.expected_usd is not None
        return candidate.expected_usd * left + candidate.offer.usd_per_hour * candidate.num_nodes * Decimal(
            restart_hours
        )

    known = [other for other in others if other.expected_usd is not None and other.offer != current.offer]
    best = min(known, key=moved_usd, default=None)
    return best if best is not None and moved_usd(best) < stay_usd * (1 - MOVE_MARGIN) else None

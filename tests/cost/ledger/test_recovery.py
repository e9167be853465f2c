"""What comes after a lease that ended."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from cost.ledger.recovery import (
    MAX_DELAY_SECONDS,
    MAX_FAILURES_WITHOUT_PROGRESS,
    Candidate,
    Cause,
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
from tests.support.builders import make_offer


def offer(region: str) -> Offer:
    return make_offer(
        cloud="gcp",
        region=region,
        instance_type=None,
        accelerator="L4",
        gpu_memory_gib=24.0,
        usd_per_hour="0.30",
        as_of="",
    )


NEAR, FAR = offer("us-east5"), offer("eu-north1")
PREEMPTED = Situation(
    cause=Cause.PREEMPTED,
    candidates=[Candidate(NEAR, 2, Decimal("1.00")), Candidate(FAR, 2, Decimal("2.00"))],
    remaining_usd=Decimal("10.00"),
    now_ms=1000,
    blocked_until_ms={},
    failures_without_progress=0,
    waits_in_a_row=0,
)


def test_a_preempted_run_moves_to_the_next_cheapest_offer_at_once() -> None:
    situation = replace(PREEMPTED, blocked_until_ms={(NEAR.offer_id, 2): 2000})
    assert decide(situation) == Relaunch(FAR, 2, delay_seconds=0.0)


def test_an_offer_is_tried_again_when_its_block_is_over() -> None:
    assert decide(replace(PREEMPTED, blocked_until_ms={(NEAR.offer_id, 2): 1000})) == Relaunch(
        NEAR, 2, delay_seconds=0.0
    )


def test_spot_gpus_of_a_kind_in_one_zone_are_taken_together() -> None:
    here = replace(NEAR, zone="us-east5-a", instance_type="g2-standard-4")
    larger = replace(here, gpus_per_node=4, instance_type="g2-standard-48")
    assert same_market(here, larger)
    for other in (
        replace(larger, zone="us-east5-b"),
        replace(larger, region="us-east1"),
        replace(larger, accelerator="H100-SXM"),
        replace(larger, spot=False),
        replace(larger, cloud="aws"),
    ):
        assert not same_market(here, other)
    assert not same_market(replace(here, spot=False), replace(larger, spot=False))  # a stock of its own
    somewhere = replace(here, region="any", zone=None)
    assert not same_market(somewhere, replace(somewhere, instance_type="g2-standard-48"))  # where that is, nobody knows
    assert same_market(somewhere, somewhere)


def test_with_every_offer_blocked_it_waits_for_the_first_to_be_free() -> None:
    blocked = {(NEAR.offer_id, 2): 9000, (FAR.offer_id, 2): 5000}
    decision = decide(replace(PREEMPTED, cause=Cause.NO_CAPACITY, blocked_until_ms=blocked, waits_in_a_row=3))
    assert decision == Relaunch(FAR, 2, delay_seconds=4.0)


def test_waits_grow_but_stay_bounded() -> None:
    blocked = {(NEAR.offer_id, 2): 9000, (FAR.offer_id, 2): 5000}
    decision = decide(replace(PREEMPTED, cause=Cause.NO_CAPACITY, blocked_until_ms=blocked, waits_in_a_row=50))
    assert isinstance(decision, Relaunch) and decision.delay_seconds == MAX_DELAY_SECONDS


def test_an_unaffordable_offer_is_passed_over() -> None:
    assert decide(replace(PREEMPTED, remaining_usd=Decimal("1.50"))) == Relaunch(NEAR, 2, delay_seconds=0.0)
    stop = decide(replace(PREEMPTED, remaining_usd=Decimal("0.50")))
    assert stop == Stop(StopReason.BUDGET, "$0.50 of the cap is left and the smallest lease reserves $1.00")


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (Cause.FINISHED, StopReason.FINISHED),
        (Cause.ASKED, StopReason.ASKED),
        (Cause.CAP, StopReason.BUDGET),
        (Cause.BUG, StopReason.BUG),
    ],
)
def test_some_ends_are_final(cause: Cause, reason: StopReason) -> None:
    decision = decide(replace(PREEMPTED, cause=cause, detail="why"))
    assert decision == Stop(reason, "why")


def test_a_cluster_that_keeps_breaking_is_given_up_but_not_the_first_time() -> None:
    broken = replace(PREEMPTED, cause=Cause.BROKEN, failures_without_progress=1)
    assert decide(broken) == Relaunch(NEAR, 2, delay_seconds=1.0)
    stop = decide(replace(broken, failures_without_progress=MAX_FAILURES_WITHOUT_PROGRESS))
    assert isinstance(stop, Stop) and stop.reason is StopReason.GAVE_UP


def test_a_time_limit_that_ended_is_a_rollover_and_no_preemption() -> None:
    assert decide(replace(PREEMPTED, cause=Cause.TTL)) == Rollover(NEAR, 2)


def test_an_offer_above_its_bound_is_left_for_the_next_and_the_last_one_ends_the_run() -> None:
    one_blocked = replace(PREEMPTED, cause=Cause.TOO_DEAR, blocked_until_ms={(NEAR.offer_id, 2): 2000})
    assert decide(one_blocked) == Relaunch(FAR, 2, delay_seconds=0.0)
    both = replace(one_blocked, blocked_until_ms={(NEAR.offer_id, 2): 2000, (FAR.offer_id, 2): 2000}, detail="$9/h")
    stop = decide(both)
    assert stop == Stop(StopReason.GAVE_UP, "every offer costs more than its worst-case price; the last one: $9/h")


def test_a_run_moves_only_where_the_rest_and_a_restart_cost_clearly_less() -> None:
    here, there = Candidate(NEAR, 2, Decimal(1), Decimal(100)), Candidate(FAR, 2, Decimal(1), Decimal(120))

    def moves(price_ratio: str, share_left: float, restart_hours: float = 0.5) -> bool:
        price = NEAR.usd_per_hour * Decimal(price_ratio)
        return (
            cheaper_elsewhere(
                here, [here, there], usd_per_hour=price, share_left=share_left, restart_hours=restart_hours
            )
            is there
        )

    assert not moves("1.0", 1.0) and not moves("1.2", 1.0)
    assert moves("1.5", 1.0)  # $150 here, $120 and half an hour of two nodes there
    assert not moves("1.5", 0.01)  # $1.50 are left: the restart costs more than it saves
    assert not moves("1.25", 1.0)  # $125 against $120 and the restart: within the margin
    unknown = Candidate(NEAR, 2, Decimal(1))
    assert cheaper_elsewhere(unknown, [there], usd_per_hour=Decimal(9), share_left=1.0, restart_hours=0.0) is None


def test_on_demand_is_not_paid_for_where_waiting_for_spot_costs_nothing() -> None:
    firm = replace(FAR, spot=False)
    candidates = [
        Candidate(NEAR, 2, Decimal("1.00"), Decimal("4.00")),
        Candidate(firm, 2, Decimal("1.00"), Decimal("8.00")),
    ]
    blocked = {(NEAR.offer_id, 2): 2000}
    short = replace(PREEMPTED, candidates=candidates, blocked_until_ms=blocked, waits_in_a_row=1)
    decision = decide(replace(short, remaining_usd=Decimal("11.99")))
    assert isinstance(decision, Relaunch)
    assert (decision.offer, decision.delay_seconds) == (NEAR, 1.0)
    # Enough for the whole run on demand, with what spot is expected to need kept.
    assert decide(replace(short, remaining_usd=Decimal("12.01"))) == Relaunch(firm, 2, delay_seconds=0.0)


def test_on_demand_that_the_plan_prefers_to_spot_is_taken() -> None:
    firm = replace(FAR, spot=False)
    candidates = [
        Candidate(firm, 2, Decimal("1.00"), Decimal("3.00")),
        Candidate(NEAR, 2, Decimal("1.00"), Decimal("4.00")),
    ]
    assert decide(replace(PREEMPTED, candidates=candidates, remaining_usd=Decimal("3.00"))) == Relaunch(firm, 2, 0.0)

"""What holds for every plan, whatever the offers, the budget and the objective."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost.market.offers import Offer, load_reference_offers
from cost.performance.workload import Workload
from cost.plan.frontier import model_shape
from cost.plan.planner import OBJECTIVES, Objective, Plan, make_plan

TABLE = load_reference_offers().offers
WORK = model_shape(3e8)
LARGE = model_shape(1.2e10, tokens_per_param=1)
budgets = st.decimals("0.05", 500, places=2)
few_offers = st.lists(st.sampled_from(TABLE), min_size=1, max_size=12, unique_by=lambda offer: offer.offer_id)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plan(offers: list[Offer], budget: Decimal, objective: Objective = "dollars", work: Workload = WORK) -> Plan:
    return make_plan(work, offers, budget_usd=budget, objective=objective, max_nodes=2)


def place(found: Plan, offer_id: str) -> int | None:
    ids = [estimate.offer.offer_id for estimate in found.ranked]
    return ids.index(offer_id) if offer_id in ids else None


@quick
@given(few_offers, st.integers(0, 11), st.floats(0.05, 0.999), budgets, st.sampled_from(OBJECTIVES))
def test_a_cheaper_price_never_ranks_worse(
    offers: list[Offer], index: int, factor: float, budget: Decimal, objective: Objective
) -> None:
    chosen = offers[index % len(offers)]
    cheaper = dataclasses.replace(chosen, usd_per_hour=chosen.usd_per_hour * Decimal(str(factor)))
    before = place(plan(offers, budget, objective), chosen.offer_id)
    after = place(plan([cheaper if offer is chosen else offer for offer in offers], budget, objective), chosen.offer_id)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert after <= before


@quick
@given(few_offers, budgets, st.decimals("0.01", 200, places=2), st.sampled_from(OBJECTIVES))
def test_more_budget_never_buys_less(offers: list[Offer], budget: Decimal, more: Decimal, objective: Objective) -> None:
    poor, rich = plan(offers, budget, objective).best, plan(offers, budget + more, objective).best
    assert (poor is None) == (rich is None)
    if poor is None or rich is None:
        return
    assert rich.num_tokens >= poor.num_tokens
    assert rich.predicted.nats_per_token <= poor.predicted.nats_per_token
    assert rich.within_budget >= poor.within_budget
    if poor.within_budget:
        measure = {"hours": lambda item: item.hours}.get(objective, lambda item: item.total_usd)
        assert measure(rich) <= measure(poor)


@quick
@given(few_offers, budgets, st.sampled_from([WORK, LARGE]))
def test_no_offer_is_silently_dropped(offers: list[Offer], budget: Decimal, work: Workload) -> None:
    found = plan(offers, budget, work=work)
    ranked, rejected = [estimate.offer for estimate in found.ranked], [rejection.offer for rejection in found.rejected]
    assert sorted(estimate.offer_id for estimate in (*ranked, *rejected)) == sorted(offer.offer_id for offer in offers)
    assert all(rejection.reason for rejection in found.rejected)


@quick
@given(few_offers, budgets)
def test_dollars_are_the_sum_of_the_lines_to_the_last_digit(offers: list[Offer], budget: Decimal) -> None:
    for estimate in plan(offers, budget).ranked:
        assert sum((line.usd for line in estimate.lines), Decimal(0)) == estimate.total_usd
        assert all(line.usd >= 0 for line in estimate.lines)
        assert estimate.worst_case_usd >= estimate.lines[0].usd


@quick
@given(few_offers, budgets)
def test_units_round_trip(offers: list[Offer], budget: Decimal) -> None:
    """Hours back to tokens, dollars per parameter back to dollars, GiB back to bytes, tokens per second back to MFU."""
    for estimate in plan(offers, budget).ranked:
        assert estimate.train_hours * 3600 * estimate.tokens_per_second == pytest.approx(WORK.num_tokens)
        assert estimate.usd_per_param * WORK.num_params == pytest.approx(estimate.total_usd)
        assert estimate.peak_memory_gib * 2**30 == pytest.approx(sum(estimate.memory.by_kind.values()))
        seconds = estimate.hours * 3600 - estimate.bill.pace.startup_seconds
        assert seconds == pytest.approx(estimate.train_hours * 3600 * (1 + estimate.bill.waste.total))
        assert estimate.layout.global_batch_size >= WORK.global_batch_size
        low, high = estimate.tokens_per_second_interval
        assert low < estimate.tokens_per_second < high


@quick
@given(few_offers, budgets, st.sampled_from(OBJECTIVES))
def test_the_order_of_the_offers_does_not_matter(offers: list[Offer], budget: Decimal, objective: Objective) -> None:
    forward, backward = plan(offers, budget, objective), plan(offers[::-1], budget, objective)
    assert [estimate.offer.offer_id for estimate in forward.ranked] == [
        estimate.offer.offer_id for estimate in backward.ranked
    ]

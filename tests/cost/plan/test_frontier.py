"""Shapes, the largest model for a budget, and where more parameters stop paying."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest

from cost.errors import UserError
from cost.market.offers import Offer, load_reference_offers
from cost.outcome.scaling_law import law_for
from cost.plan.frontier import choose_model, frontier, ladder, model_shape, undominated
from cost.plan.planner import Market
from tests.support.builders import make_offer

OFFERS = load_reference_offers().offers
FEW = tuple(offer for offer in OFFERS if offer.cloud in ("verda", "nebius"))


def offer(price: str, *, region: str = "here", accelerator: str = "H100-SXM", spot: bool = True) -> Offer:
    return make_offer(
        cloud="verda", region=region, instance_type="x", accelerator=accelerator, spot=spot, usd_per_hour=price
    )


@pytest.mark.parametrize("size", [1e8, 3e8, 1.1e9, 3e9])
@pytest.mark.parametrize("experts", [1, 8])
def test_a_shape_has_about_the_parameters_asked_for(size: float, experts: int) -> None:
    shape = model_shape(size, tokens_per_param=10, num_experts=experts, num_active_experts=min(2, experts))
    assert shape.num_params == pytest.approx(size, rel=0.03)
    assert shape.num_tokens == 10 * shape.num_params
    assert shape.width % 128 == 0
    assert shape.hidden_size % 64 == 0


def test_a_ladder_has_both_ends() -> None:
    rungs = ladder(1e9, 2e9)
    assert (rungs[0], rungs[-1]) == (1e9, 2e9)
    assert all(1 < high / low <= 1.05 + 1e-9 for low, high in itertools.pairwise(rungs))
    assert ladder(1e9, 1e9) == [1e9]
    with pytest.raises(UserError, match=r"3e\+09..1e\+09 is not a valid range of parameters; write for example 1.1e9"):
        ladder(3e9, 1e9)


def test_of_equal_machines_only_the_cheapest_is_looked_at() -> None:
    cheap, dear = offer("1", region="cheap"), offer("2", region="dear")
    assert undominated([dear, cheap, offer("3", spot=False)])[0] is cheap
    assert len(undominated([dear, cheap, offer("3", spot=False)])) == 2


def test_the_largest_model_fits_the_budget_and_the_next_rung_does_not() -> None:
    found = choose_model(OFFERS, low=8e8, high=2e9, budget_usd=Decimal(100))
    assert found.chosen is not None
    assert found.chosen.best is not None
    assert found.chosen.best.total_usd <= 100
    larger = [plan for plan in found.plans if plan.workload.num_params > found.chosen.workload.num_params]
    assert larger
    assert all(not plan.affordable for plan in larger)
    # FACTS of 2026: at $0.81 an H100-hour about 1.29B parameters at 20 tokens each; cheaper cards do a little better.
    assert 1.0e9 < found.chosen.workload.num_params < 1.8e9


def test_more_budget_never_buys_a_smaller_model() -> None:
    sizes = []
    for budget in (50, 90, 100, 101):
        chosen = choose_model(FEW, low=9e8, high=1.6e9, budget_usd=Decimal(budget)).chosen
        sizes.append(0 if chosen is None else chosen.workload.num_params)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_dollars_per_parameter_grow_with_the_model_at_fixed_tokens_per_parameter() -> None:
    found = choose_model(OFFERS, low=1.1e9, high=3e9, budget_usd=Decimal(1000), objective="usd_per_param")
    assert found.chosen is found.plans[0]


def test_a_range_that_nothing_pays_for_has_no_choice() -> None:
    found = choose_model(OFFERS, low=2e9, high=3e9, budget_usd=Decimal(1))
    assert found.chosen is None
    assert all(plan.best is not None for plan in found.plans)
    with pytest.raises(UserError, match="no objective 'speed' for a range of models; choose one of params"):
        choose_model(OFFERS, low=2e9, high=3e9, budget_usd=Decimal(1), objective="speed")


def test_the_frontier_turns_where_more_parameters_stop_paying() -> None:
    sizes = [2e8, 6e8, 1.8e9, 6e9]
    market = Market(law=law_for("fineweb-edu", "nanochat"))
    points = frontier(OFFERS, budget_usd=Decimal(100), sizes=sizes, market=market)
    dense = [point for point in points if not point.is_mixture]
    mixed = [point for point in points if point.is_mixture]
    assert len(dense) == len(mixed) == len(sizes)
    assert all(Decimal(95) < point.estimate.total_usd <= 100 for point in points)
    losses = [point.predicted.nats_per_token for point in dense]
    best = losses.index(min(losses))
    assert [point.best for point in dense] == [index == best for index in range(len(sizes))]
    assert best < len(sizes) - 1
    # A mixture has fewer active than total weights and sees more tokens for the same money.
    assert all(point.workload.active_params < point.workload.num_params for point in mixed)
    assert all(m.workload.num_tokens > d.workload.num_tokens for m, d in zip(mixed, dense, strict=True))

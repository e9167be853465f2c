"""Monte Carlo of a plan: where it must agree with arithmetic, and what must not depend on luck."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cost.market.preemption import Hazard, Hazards
from cost.plan.frontier import model_shape
from cost.plan.planner import Estimate, Market, make_plan
from cost.plan.policy import Traces
from cost.plan.simulate import simulate
from tests.support.builders import make_offer

NEVER = Hazard(0, 1.0, "never")
WORK = model_shape(2e8, tokens_per_param=20)


def estimate(rate: float, *, on_demand: str | None = "3", spot: bool = True) -> Estimate:
    usual = None if on_demand is None else Decimal(on_demand)
    offer = make_offer(cloud="verda", instance_type="x", spot=spot, on_demand_usd_per_hour=usual)
    market = Market(hazards=Hazards(fixed_per_node_hour=rate))
    best = make_plan(WORK, [offer], budget_usd=Decimal(100), market=market).best
    assert best is not None
    return best


def test_without_preemptions_the_median_is_the_plan() -> None:
    each_estimate = estimate(0.0)
    found = simulate(each_estimate, num_tokens=WORK.num_tokens, hazard=NEVER, budget_usd=100.0, runs=201)
    default = found.policies["default"]
    assert default.usd.p50 == pytest.approx(float(each_estimate.total_usd), rel=0.08)
    assert default.usd.p10 < default.usd.p50 < default.usd.p90
    assert (default.preemptions.p90, default.finished_share) == (0, 1.0)
    assert default.tokens.p50 == pytest.approx(WORK.num_tokens)


def test_preemptions_come_at_the_rate_that_was_given() -> None:
    each_estimate = estimate(0.5)
    sure = Hazard(0.5 * 1e6, 1e6, "sure")
    found = simulate(each_estimate, num_tokens=WORK.num_tokens, hazard=sure, budget_usd=100.0, runs=300, num_zones=3)
    assert found.policies["spot"].preemptions.p50 == pytest.approx(each_estimate.expected_preemptions, abs=2)
    assert found.policies["spot"].wasted_share.p50 > 0.03


def test_the_same_seed_gives_the_same_dollars_and_another_one_does_not() -> None:
    item, hazard = estimate(0.2), Hazard(1, 4.8, "prior")
    first, again, other = (
        simulate(item, num_tokens=WORK.num_tokens, hazard=hazard, budget_usd=100.0, runs=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.usd_of_draws != other.usd_of_draws


def test_no_draw_spends_more_than_the_budget() -> None:
    found = simulate(estimate(1.0), num_tokens=WORK.num_tokens, hazard=Hazard(1, 1.0, "x"), budget_usd=1.0, runs=50)
    assert all(usd <= 1.0 + 1e-9 for draws in found.usd_of_draws.values() for usd in draws)
    assert found.policies["default"].finished_share == 0.0
    assert found.policies["default"].tokens.p90 < WORK.num_tokens


def test_real_traces_take_the_place_of_the_hazard() -> None:
    halves = Traces(("a",), 1.0, ((1.0, ("a",)), (1.0, ())))
    found = simulate(estimate(0.2), num_tokens=WORK.num_tokens, hazard=NEVER, budget_usd=100.0, runs=20, traces=halves)
    assert found.policies["spot"].preemptions.p50 >= 1


def test_policies_that_need_another_price_are_left_out() -> None:
    def names(estimate: Estimate) -> set[str]:
        return set(simulate(estimate, num_tokens=WORK.num_tokens, hazard=NEVER, budget_usd=100.0, runs=2).policies)

    assert names(estimate(0.0, on_demand=None)) == {"default", "spot", "steady_spot"}
    assert names(estimate(0.0, spot=False)) == {"on_demand"}
    assert "spot_then_on_demand" in names(estimate(0.0))

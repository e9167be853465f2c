"""Every number of an estimate follows from the inputs that its explanation shows."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cost.market.offers import load_reference_offers
from cost.plan.explain import explain
from cost.plan.frontier import model_shape
from cost.plan.planner import Emulation, Market, make_plan

OFFERS = load_reference_offers().offers


@pytest.mark.parametrize("cloud", ["verda", "aws", "gcp", "vast", "runpod"])
def test_explanations_agree_with_the_estimate(cloud: str) -> None:
    market = Market()
    plan = make_plan(model_shape(5e8), OFFERS, budget_usd=Decimal(100), clouds=[cloud], max_nodes=2, market=market)
    for item in (plan.ranked[0], plan.ranked[-1]):
        found = {entry.name: entry for entry in explain(plan, item, market.hazards.for_offer(item.offer))}
        for line in item.lines:
            assert found[line.name].value == pytest.approx(float(line.usd), abs=2e-6), line.name
        assert found["total"].value == pytest.approx(float(item.total_usd))
        assert found["hours"].value == pytest.approx(item.hours)
        assert found["train_hours"].value == pytest.approx(item.train_hours)
        assert found["expected_preemptions"].value == pytest.approx(item.expected_preemptions)
        assert found["checkpoint_interval"].value == pytest.approx(item.checkpoint_interval_seconds)
        assert found["peak_memory_gib"].value == pytest.approx(item.peak_memory_gib)
        assert found["usd_per_param"].value == pytest.approx(float(item.usd_per_param), rel=1e-5)
        seconds = sum(found["tokens_per_second"].inputs.values())
        assert plan.workload.tokens_per_step / seconds == pytest.approx(item.tokens_per_second)
        assert found["flops_per_token"].value == pytest.approx(plan.workload.flops_per_token)


def test_every_explanation_has_a_formula_inputs_and_a_source() -> None:
    plan = make_plan(model_shape(1e8), OFFERS, budget_usd=Decimal(100))
    assert plan.best is not None
    for entry in explain(plan, plan.best, Market().hazards.for_offer(plan.best.offer)):
        assert entry.formula
        assert entry.inputs, entry.name
        assert entry.source, entry.name
        assert entry.unit, entry.name


def test_the_loss_follows_from_the_constants_shown() -> None:
    plan = make_plan(model_shape(1e8), OFFERS, budget_usd=Decimal(100))
    assert plan.best is not None
    found = {entry.name: entry for entry in explain(plan, plan.best, Market().hazards.for_offer(plan.best.offer))}
    x = found["predicted_loss"].inputs
    by_formula = x["E"] + x["A"] / x["N"] ** x["alpha"] + x["B"] / (x["k"] * x["D"]) ** x["beta"]
    assert found["predicted_loss"].value == pytest.approx(by_formula)


def test_an_emulated_plan_can_be_explained() -> None:
    work = model_shape(1e8, tokens_per_param=0.1)
    plan = make_plan(work, OFFERS, budget_usd=Decimal(100), emulation=Emulation(2, 30.0, 1))
    assert plan.best is not None
    found = {entry.name: entry.value for entry in explain(plan, plan.best, Market().hazards.for_offer(plan.best.offer))}
    assert found["train_hours"] == pytest.approx(plan.best.train_hours)

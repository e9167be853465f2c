"""A recipe becomes a plan: whose prices, which nodes, what this machine stands for."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import UserError
from orchestrator.planning import recipe_plan as planning
from orchestrator.prices.table import Prices, current_prices
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tests.support.builders import make_offer

H100 = make_offer(
    cloud="lambda",
    region="us-east-1",
    instance_type="gpu_8x_h100",
    gpus_per_node=8,
    spot=False,
    usd_per_hour=24,
    on_demand_usd_per_hour=24,
    as_of="2026-07-30",
)
CHEAP = replace(H100, cloud="aws", spot=True, usd_per_hour=Decimal(8), as_of=">=2026-02-18 (seen later too)")
OLD_CARD = replace(H100, cloud="gcp", accelerator="V100", gpu_memory_gib=16.0, as_of="undated; late 2025")
PRICES = Prices((H100, CHEAP, OLD_CARD), "test table", num_skipped=2)


def demo(*overrides: str) -> Recipe:
    anything = ["local.market=calm", "offers.gpus=null", "offers.spot=null"]
    return load_recipe("demo", ["precision=bf16", *anything, *overrides])


def test_prices_know_their_dates() -> None:
    assert PRICES.dates() == (date(2026, 2, 18), date(2026, 7, 30))
    assert PRICES.num_undated == 1
    assert Prices((OLD_CARD,), "test table").dates() is None


def test_the_reference_table_has_offers_of_many_clouds_with_dates() -> None:
    prices = current_prices()
    assert len({offer.cloud for offer in prices.offers}) >= 5
    assert prices.dates() is not None


def test_the_local_cloud_is_planned_with_all_nodes_of_the_recipe() -> None:
    plan = planning.make_plan_for(demo(), PRICES, budget_usd=Decimal(100))
    assert plan.emulation is not None
    assert plan.emulation.time_scale == 120
    assert [estimate.num_nodes for estimate in plan.ranked] == [2, 2, 2]
    assert planning.offers_in_order(plan)[0] == CHEAP


def test_a_real_cloud_may_be_planned_with_fewer_nodes_than_the_most() -> None:
    plan = planning.make_plan_for(demo("backend=sky"), PRICES, budget_usd=Decimal(100))
    assert plan.emulation is None
    assert planning.winner(plan).num_nodes == 1


def test_a_number_of_nodes_that_was_asked_for_is_kept() -> None:
    plan = planning.make_plan_for(demo("backend=sky"), PRICES, budget_usd=Decimal(100), nodes=2)
    assert planning.winner(plan).num_nodes == 2


def test_a_node_of_the_local_cloud_has_no_more_cores_than_its_worker_has_threads() -> None:
    one_thread = planning.local_emulation(demo("training.num_threads=1", "nodes.max=1"))
    assert one_thread is not None
    assert one_thread.num_cores == 1
    assert planning.local_emulation(demo("backend=sky")) is None


def test_what_is_asked_for_replaces_what_the_recipe_says() -> None:
    recipe = demo("offers.spot=true", "offers.clouds=[aws]")
    budget = Decimal(100)
    assert [o.cloud for o in planning.offers_in_order(planning.make_plan_for(recipe, PRICES, budget_usd=budget))] == [
        "aws"
    ]
    asked = planning.make_plan_for(recipe, PRICES, budget_usd=budget, spot=False, clouds=["LAMBDA"])
    assert [offer.cloud for offer in planning.offers_in_order(asked)] == ["lambda"]


def test_a_family_of_gpus_stands_for_its_members() -> None:
    assert set(planning.known_gpus(["a100"]) or ()) == {"A100-40GB", "A100-80GB-PCIe", "A100-80GB-SXM"}
    assert (planning.known_gpus(["H100-SXM", "h100"]) or ())[0] == "H100-SXM"
    assert planning.known_gpus(None) is None


def test_an_unknown_gpu_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no GPU is called 'RTX409'; did you mean RTX4090\? There are RTX3090, "):
        planning.known_gpus(["RTX409"])


def test_an_unknown_cloud_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no offer is of cloud 'lamda'; did you mean lambda\? There are aws, gcp, la"):
        planning.known_clouds(["lamda"], PRICES.offers)


def test_rejections_are_counted_by_reason() -> None:
    plan = planning.make_plan_for(demo("backend=sky"), PRICES, budget_usd=Decimal(100), clouds=["gcp"])
    assert planning.rejections(plan) == [("not asked for", 2), ("V100 has no bf16 units", 1)]
    with pytest.raises(UserError, match=r"none of 3 offers can run this recipe: not asked for \(2 offers\); V100 has"):
        planning.winner(plan)


def test_a_model_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    huge = demo("backend=sky", "model.width=65536", "model.hidden_size=262144", "model.num_layers=100")
    plan = planning.make_plan_for(huge, Prices((H100,), "test table"), budget_usd=Decimal(100))
    with pytest.raises(UserError, match=r"needs at least [\d.]+ GiB per device.* H100-SXM.*\(1 offer\)\. Make"):
        planning.winner(plan)


def test_a_hazard_rate_of_the_market_is_what_the_plan_expects() -> None:
    calm = planning.winner(planning.make_plan_for(demo(), PRICES, budget_usd=Decimal(100)))
    rough = planning.winner(
        planning.make_plan_for(demo("local.market='hazard:0.5'"), PRICES, budget_usd=Decimal(100), spot=True)
    )
    assert calm.expected_preemptions == 0
    assert 0.5 * 2 * rough.train_hours < rough.expected_preemptions < 0.5 * 2 * rough.hours


def test_a_written_trace_is_counted_as_far_as_the_run_lasts(tmp_path: Path) -> None:
    trace = tmp_path / "trace.yaml"
    trace.write_text(
        "- {at_seconds: 10, action: kill, rank: 1}\n"
        "- {at_seconds: 20, action: notice, rank: 0, notice_seconds: 15}\n"
        "- {at_seconds: 30, action: capacity, capacity: 1}\n"
        "- {at_seconds: 100000, action: kill, rank: 1}\n"
    )
    plan = planning.make_plan_for(demo(f"local.market='trace:{trace}'"), PRICES, budget_usd=Decimal(100), spot=True)
    assert planning.winner(plan).expected_preemptions == pytest.approx(2, rel=0.3)


def test_a_trace_of_capacity_leaves_the_known_rates(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"metadata": {"gap_seconds": 600}, "data": [2, 1, 2, 0]}')
    plan = planning.make_plan_for(demo(f"local.market='trace:{trace}'"), PRICES, budget_usd=Decimal(100), spot=True)
    assert planning.winner(plan).expected_preemptions > 0

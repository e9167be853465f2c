"""The speed of this machine: timed once, kept, and what a plan and a launch make of it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.planning import processor, recipe_plan
from orchestrator.prices.table import Prices
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tests.support.builders import make_offer
from trainer.processor import ProcessorSpeed

PRICES = Prices((make_offer(accelerator="H100-SXM", spot=True),), "test table")
EMULATED = ProcessorSpeed("a laptop", False, 150e9, 30e9, 150e9, 30e9, is_measured=True)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_timing_is_made_once_for_a_shape_and_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Recipe] = []

    def count(recipe: Recipe) -> ProcessorSpeed:
        timed.append(recipe)
        return EMULATED

    monkeypatch.setattr(processor, "time_in_child", count)
    demo = load_recipe("demo")
    assert processor.known_speed(home, demo) != EMULATED
    assert processor.timed_speed(home, demo) == EMULATED
    assert processor.timed_speed(home, load_recipe("demo", ["seed=7"])) == EMULATED
    assert processor.known_speed(home, demo) == EMULATED
    assert len(timed) == 1
    processor.timed_speed(home, load_recipe("demo", ["model.width=320"]))
    assert len(timed) == 2


def test_without_a_timing_the_table_is_used_and_says_so(home: Home) -> None:
    found = processor.timed_speed(home, load_recipe("demo"))
    assert found is not None
    assert not found.is_measured
    assert "assumed" in found.reason
    assert not home.processor.exists()


def test_a_damaged_file_of_timings_counts_nothing(home: Home) -> None:
    home.create().processor.write_text("{half")
    found = processor.known_speed(home, load_recipe("demo"))
    assert found is not None
    assert not found.is_measured


def test_only_an_open_precision_of_the_local_backend_is_chosen(home: Home) -> None:
    demo = load_recipe("demo")
    assert processor.in_known_precision(demo, EMULATED).precision == "fp32"
    assert (
        processor.in_known_precision(demo, replace(EMULATED, has_bf16_units=True, bf16_flops=3e11)).precision == "bf16"
    )
    fixed = load_recipe("demo", ["precision=bf16"])
    assert processor.in_known_precision(fixed, EMULATED) == fixed
    assert processor.known_speed(home, load_recipe("350m", ["backend=sky"])) is None


def test_a_plan_knows_that_bf16_is_emulated() -> None:
    hours = {}
    for precision in ("bf16", "fp32"):
        recipe = load_recipe("demo", [f"precision={precision}", "local.market=calm"])
        plan = recipe_plan.make_plan_for(recipe, PRICES, budget_usd=Decimal(100), processor=EMULATED)
        assert plan.best is not None
        hours[precision] = 1 / plan.best.tokens_per_second
    assert 3 < hours["bf16"] / hours["fp32"] < 5


@pytest.mark.times_processor
def test_a_real_timing_is_kept_and_decides_the_precision(home: Home) -> None:
    pytest.importorskip("torch")
    demo = load_recipe("demo")
    found = processor.timed_speed(home, demo)
    assert found is not None
    assert found.is_measured
    assert min(found.fp32_flops, found.bf16_flops, found.square_fp32_flops, found.square_bf16_flops) > 1e8
    assert processor.known_speed(home, demo) == found
    assert processor.in_known_precision(demo, found).precision == found.precision


@pytest.mark.times_processor
def test_a_child_that_cannot_time_leaves_the_table(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "own_module", lambda *arguments: ["false"])
    found = processor.timed_speed(home, load_recipe("demo"))
    assert found is not None
    assert not found.is_measured

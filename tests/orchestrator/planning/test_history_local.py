"""A run that was measured on this machine tells the next plan of its shape how fast it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import recipe_plan as planning
from orchestrator.planning.history import measured_tokens_per_second
from orchestrator.prices.table import current_prices
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo", ["precision=bf16", "local.market=calm", *overrides])


def ran(home: Home, name: str, trained: Recipe, *, at: int = 1, **progress: Any) -> Path:
    folder = home.root / "store" / name
    (folder / "progress").mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"recipe": trained.model_dump(mode="json")}))
    newest = {"step": 100, "world_size": 2, "tokens_per_second": 9000.0, **progress}
    path = folder / "progress" / "latest.json"
    path.write_text(json.dumps(newest))
    os.utime(path, (at, at))
    return path


def test_the_newest_run_of_the_shape_counts(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert measured_tokens_per_second(home, recipe()) is None
    ran(home, "demo-1", recipe(), at=10, tokens_per_second=8000.0)
    ran(home, "demo-2", recipe("seed=3", "budget_usd=7"), at=20, tokens_per_second=9000.0)
    ran(home, "demo-3", recipe("model.num_layers=7"), at=30, tokens_per_second=50.0)
    assert measured_tokens_per_second(home, recipe()) == 9000.0


@pytest.mark.parametrize("progress", [{"step": 3}, {"world_size": 1}, {"tokens_per_second": None}])
def test_what_says_little_does_not_count(tmp_path: Path, progress: dict[str, Any]) -> None:
    ran(Home(tmp_path), "demo-1", recipe(), **progress)
    assert measured_tokens_per_second(Home(tmp_path), recipe()) is None


def test_a_store_that_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    ran(Home(tmp_path), "demo-1", recipe()).write_text("{")
    assert measured_tokens_per_second(Home(tmp_path), recipe()) is None


def test_the_plan_believes_the_measurement_and_before_it_a_careful_model(tmp_path: Path) -> None:
    from decimal import Decimal

    prices = current_prices()
    modelled = planning.winner(planning.make_plan_for(recipe(), prices, budget_usd=Decimal(100)))
    ran(Home(tmp_path), "demo-1", recipe())
    seen = planning.measured_here(Home(tmp_path), recipe())
    measured = planning.winner(
        planning.make_plan_for(recipe(), prices, budget_usd=Decimal(100), measured_tokens_per_second=seen)
    )
    assert measured.tokens_per_second == 9000.0
    assert measured.tokens_per_second_interval == (9000.0, 9000.0)
    low, high = modelled.tokens_per_second_interval
    assert low < modelled.tokens_per_second < high < 30_000
    assert planning.measured_here(Home(tmp_path), recipe("backend=sky")) is None


def test_a_compiled_recipe_is_planned_faster_than_an_eager_one() -> None:
    from decimal import Decimal

    def speed(flag: str) -> float:
        chosen = load_recipe("1.5b", [f"training.compile={flag}"])
        plan = planning.make_plan_for(chosen, current_prices(), budget_usd=Decimal(100), gpus=["H100-SXM"])
        return planning.winner(plan).tokens_per_second / planning.winner(plan).layout.world_size

    assert speed("true") > speed("false")

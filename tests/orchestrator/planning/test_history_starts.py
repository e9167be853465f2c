"""How long nodes took to be set up is kept, believed by the next plan, and charged."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from orchestrator.planning import recipe_plan as planning
from orchestrator.planning.history import read_history, record_start, typical_start_seconds
from orchestrator.prices.table import reference_prices
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tests.support.cloud_runs import ran_on


def test_the_middle_of_the_newest_starts_counts(tmp_path: Path) -> None:
    path = tmp_path / "home" / "starts.jsonl"
    assert typical_start_seconds(path) == {}
    for seconds in (900, 40, 50, 60, 70, 80):
        record_start(path, cloud="aws", seconds=float(seconds), parts={"data_seconds": 1.0})
    with path.open("a") as file:
        file.write('{"cloud": "gcp", "sec')  # cut short by a kill
    assert typical_start_seconds(path) == {"aws": 60.0}


def test_a_plan_charges_the_start_that_was_measured(tmp_path: Path) -> None:
    home, prices = Home(tmp_path / "slm"), reference_prices()
    recipe = load_recipe("gpt2-124m", ["backend=sky"])
    offer = next(
        offer for offer in prices.offers if offer.cloud == "verda" and offer.accelerator == "H100-SXM" and offer.spot
    )
    ran_on(home, offer)
    only = {"clouds": ["verda"], "gpus": ["H100-SXM"], "allow_unguarded": True, "budget_usd": Decimal(100)}
    before = planning.make_plan_for(recipe, prices, history=read_history(home), **only)
    record_start(home.starts, cloud="verda", seconds=3000.0, parts={})
    after = planning.make_plan_for(recipe, prices, history=read_history(home), **only)
    assert before.best is not None
    assert after.best is not None
    longer = after.best.bill.pace.startup_seconds - before.best.bill.pace.startup_seconds
    assert longer == 3000.0 - 300.0  # 300 s stand in cost/data/clouds.csv
    assert after.best.total_usd > before.best.total_usd
    assert after.seen.starts == {"verda": 3000.0}

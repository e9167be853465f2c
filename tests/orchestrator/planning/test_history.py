"""What our own runs on clouds saw changes the next plan, and what cannot be read changes nothing."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.ledger.database import connect
from cost.market.offers import Offer
from cost.market.preemption import Sighting, prior
from cost.plan.plans import Estimate
from orchestrator.planning import recipe_plan as planning
from orchestrator.planning.history import History, begun_precision, read_history
from orchestrator.planning.recipe_plan import Planned
from orchestrator.prices.table import Prices
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tests.support.builders import make_offer
from tests.support.cloud_runs import SPEED, ran_on

SPOT = make_offer(
    region="us-east-2",
    zone="us-east-2b",
    instance_type="p5",
    gpus_per_node=8,
    usd_per_hour=8,
    on_demand_usd_per_hour=32,
    as_of="2026-11-13",
)
ON_DEMAND = replace(SPOT, spot=False, usd_per_hour=Decimal(32))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("gpt2-124m", ["backend=sky", *overrides])


def planned(known: History | None, *offers: Offer, chosen: Recipe | None = None) -> Planned:
    prices = Prices(offers or (SPOT,), "test table")
    return planning.planned_for(chosen or recipe(), prices, budget_usd=Decimal(100), history=known)


def best(known: History | None, *offers: Offer) -> Estimate:
    return planning.winner(planned(known, *offers).plan)


def test_losses_and_node_hours_come_from_the_ledger(home: Home) -> None:
    ran_on(home, SPOT, outcomes=("preempted", "broken", "preempted", "no_capacity"), hours_each=3, num_nodes=2)
    ran_on(home, SPOT, outcomes=("finished",), hours_each=1)
    # 4 leases x 3 h x 2 nodes, and one of 1 h: only what the cloud took back is a loss.
    assert read_history(home).sightings == (Sighting("aws", "H100-SXM", 8, 2, 25.0),)


def test_node_hours_of_an_on_demand_offer_are_no_spot_hours(home: Home) -> None:
    ran_on(home, ON_DEMAND)
    assert read_history(home).sightings == ()


def test_the_plan_expects_the_losses_that_own_runs_saw(home: Home) -> None:
    ran_on(home, SPOT, outcomes=("preempted",) * 20, hours_each=1)
    known = read_history(home)
    before = prior("aws", "H100-SXM", 8)
    rate = (before.losses + 20) / (before.node_hours + 20)
    hazard = planned(known).hazards.for_offer(SPOT)
    assert hazard.per_node_hour == pytest.approx(rate)
    assert hazard.source.startswith("our own runs: 20 in 20.0 node-hours; before: ")


def test_a_measured_speed_beats_the_model_and_narrows_the_interval(home: Home) -> None:
    modelled = best(None)
    run = ran_on(home, SPOT)
    known = read_history(home)
    measured = best(known)
    assert (modelled.throughput.basis, measured.throughput.basis) == ("pooled", "measured")
    low, high = modelled.tokens_per_second_interval
    closer, nearer = measured.tokens_per_second_interval
    assert nearer / closer < high / low
    (item,) = known.measurements
    assert (item.run_id, item.tokens_per_second) == (run.run_id, 8 * SPEED)
    assert planned(known).plan.seen.measured_by == {"H100-SXM": run.run_id}


def test_the_model_corrected_by_a_run_gives_what_that_run_did(home: Home) -> None:
    from cost.performance.layouts import own_layout, placed

    ran_on(home, SPOT, tokens_per_second=50_000.0)
    ran_on(home, SPOT, tokens_per_second=70_000.0)
    known = read_history(home)
    item = known.measurements[-1]
    layout = own_layout(item.work, item.cluster, item.micro_batch_size)
    said = placed(item.work, item.cluster, layout, known.calibrated(), item.software)
    assert said.tokens_per_second == pytest.approx(70_000.0)  # the newest of both


@pytest.mark.parametrize(
    "progress",
    [{"step": 3}, {"tokens_per_second": None}, {"tokens_per_second": 0.0}, {"world_size": 7}],
    ids=["too early", "no speed yet", "standing still", "part of a node"],
)
def test_what_says_little_about_the_speed_is_left_out(home: Home, progress: dict[str, Any]) -> None:
    ran_on(home, SPOT, **progress)
    known = read_history(home)
    assert (known.measurements, known.problem) == ((), None)
    assert known.sightings


def test_the_local_market_teaches_nothing(home: Home) -> None:
    ran_on(home, SPOT, backend="local")
    assert read_history(home) == History()


def test_the_local_cloud_is_planned_without_what_clouds_taught(home: Home) -> None:
    ran_on(home, SPOT)
    local = recipe("backend=local", "nodes.max=1")
    with_it, without = planned(read_history(home), chosen=local), planned(None, chosen=local)
    assert with_it == without


def test_without_a_ledger_nothing_is_learned_and_none_is_made(home: Home) -> None:
    assert read_history(home) == History()
    assert begun_precision(home, recipe("precision=auto")) is None
    assert not home.root.exists()


def test_a_damaged_ledger_is_named_and_does_not_stop_the_plan(home: Home) -> None:
    home.create().database.write_bytes(b"no database at all" * 100)
    known = read_history(home)
    assert known.problem is not None
    assert known.problem.startswith(f"earlier runs are not used: {home.database} cannot be read (")
    assert best(known) == best(None)
    assert begun_precision(home, recipe("precision=auto")) is None


def test_a_ledger_without_tables_and_one_of_a_newer_slm_are_named(home: Home) -> None:
    sqlite3.connect(home.create().database).close()
    with sqlite3.connect(home.database) as db:
        db.execute("CREATE TABLE other (x)")
    db.close()
    assert "no such table: runs" in str(read_history(home).problem)
    home.database.unlink()
    newer = connect(home.database)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    assert "cannot be read (format 99, this slm knows up to" in str(read_history(home).problem)


def test_one_unreadable_run_does_not_silence_the_others(home: Home) -> None:
    broken = ran_on(home, SPOT)
    unread = ran_on(home, SPOT)
    ran_on(home, SPOT)
    db = connect(home.database)
    db.execute("UPDATE runs SET options_json = '{' WHERE run_id = ?", (broken.run_id,))
    db.execute("UPDATE leases SET offer_json = '[]' WHERE lease_id LIKE ?", (f"%{unread.run_id}-1",))
    db.close()
    (home.store_dir(unread.run_id) / "progress" / "latest.json").write_text("{")
    known = read_history(home)
    assert known.problem == (
        f"skipped, as it cannot be read: run {broken.run_id}, lease slm-abc123-{unread.run_id}-1, "
        f"the progress of {unread.run_id}"
    )
    # Two leases of two hours of the third run, one of the second.
    assert known.sightings == (Sighting("aws", "H100-SXM", 8, 1, 6.0),)
    assert len(known.measurements) == 1


def test_a_recipe_whose_run_was_cut_off_keeps_its_precision(home: Home) -> None:
    auto = recipe("precision=auto")
    ran_on(home, SPOT, recipe=auto.in_precision("fp32"))
    assert planning.as_begun(home, auto).precision == "fp32"
    assert planning.as_begun(home, recipe("precision=auto", "seed=5")).precision == "auto"
    assert planning.as_begun(home, recipe()).precision == "bf16"
    db = connect(home.database)
    db.execute("UPDATE runs SET state = 'STOPPED'")
    db.close()
    assert planning.as_begun(home, auto).precision == "auto"

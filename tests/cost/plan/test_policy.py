"""Spot policies on traces short enough to follow by hand, and on the real ones where they are."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cost.errors import UserError
from cost.plan.policy import (
    ON_DEMAND,
    POLICIES,
    Terms,
    Traces,
    default_policy,
    joined,
    offline_bound,
    on_demand_only,
    read_traces,
    run,
    score,
    spot_only,
    spot_then_on_demand,
)

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "traces" / "aws-v100-feb-2023"
UP, DOWN = ("a",), ()


def terms(**changes: float | None) -> Terms:
    usual: dict[str, float | None] = {
        "budget_usd": 100.0,
        "spot_usd_per_hour": 1.0,
        "on_demand_usd_per_hour": 4.0,
        "deadline_hours": 10.0,
        "startup_hours": 0.5,
        "lost_hours": 0.25,
    }
    return Terms(**(usual | changes))  # type: ignore[arg-type]


def trace(*stretches: tuple[float, tuple[str, ...]]) -> Traces:
    zones = sorted({zone for _, up in stretches for zone in up})
    return Traces(tuple(zones), 0.1, stretches)


def test_a_preemption_costs_start_up_and_the_work_since_the_checkpoint() -> None:
    # 4 h up, 2 h away, 4 h up: 3.5 h of work, 0.25 lost, then 3.5 h; 8 h are paid.
    outcome = run(spot_only, trace((4, UP), (2, DOWN), (4, UP)), terms())
    assert outcome.useful_hours == pytest.approx(3.5 - 0.25 + 3.5)
    assert (outcome.usd, outcome.preemptions) == (pytest.approx(8.0), 1)


def test_a_node_lost_in_its_start_up_loses_no_work() -> None:
    outcome = run(spot_only, trace((0.25, UP), (9.75, DOWN)), terms())
    assert (outcome.useful_hours, outcome.preemptions) == (0.0, 1)
    assert outcome.usd == pytest.approx(0.25)


def test_the_budget_ends_a_run_to_the_cent() -> None:
    outcome = run(spot_only, trace((10, UP)), terms(budget_usd=3.0))
    assert outcome.usd == pytest.approx(3.0)
    assert outcome.useful_hours == pytest.approx(2.5)
    assert outcome.hours == pytest.approx(3.0)


def test_finished_work_ends_a_run() -> None:
    outcome = run(spot_only, trace((10, UP)), terms(work_hours=2.0))
    assert outcome.finished
    assert (outcome.useful_hours, outcome.usd) == (pytest.approx(2.0), pytest.approx(2.5))


def test_on_demand_fills_the_gaps_at_its_own_start_up() -> None:
    outcome = run(spot_then_on_demand, trace((4, UP), (2, DOWN), (4, UP)), terms())
    assert outcome.usd == pytest.approx(8 + 2 * 4)
    assert outcome.useful_hours == pytest.approx(3.5 - 0.25 + 1.5 + 3.5)


def test_the_bound_by_hand() -> None:
    # 8 h with capacity at $1, and what is left buys min(92/4, 2) = 2 h of on-demand.
    assert offline_bound(trace((4, UP), (2, DOWN), (4, UP)), terms()) == pytest.approx(10.0)
    # $9 pay 8 h of spot and 0.25 h of on-demand; $5 only 5 h of spot.
    assert offline_bound(trace((4, UP), (2, DOWN), (4, UP)), terms(budget_usd=9.0)) == pytest.approx(8.25)
    assert offline_bound(trace((4, UP), (2, DOWN), (4, UP)), terms(budget_usd=5.0)) == pytest.approx(5.0)


def test_the_default_moves_to_the_zone_that_was_lost_least() -> None:
    seen = trace((1, ("a", "b")), (1, ("b",)), (1, ("a", "b")), (1, ("b",)), (0.5, DOWN), (5.5, ("a", "b")))
    held: list[str | None] = []

    def watched(view):  # type: ignore[no-untyped-def]
        held.append(default_policy(view))
        return held[-1]

    run(watched, seen, terms(on_demand_usd_per_hour=None))
    # "a" is first and free; it is lost after an hour, and again later, so "b" is taken when both come back.
    assert [zone for index, zone in enumerate(held) if index == 0 or zone != held[index - 1]] == ["a", "b", None, "b"]


def test_the_default_waits_out_a_short_outage_and_buys_on_demand_in_a_long_one() -> None:
    def holds_on_demand(outage: float) -> bool:
        found: set[str | None] = set()

        def watched(view):  # type: ignore[no-untyped-def]
            found.add(default_policy(view))
            return default_policy(view)

        run(watched, trace((2, UP), (outage, DOWN), (40 - outage, UP)), terms(deadline_hours=40.0))
        return ON_DEMAND in found

    assert not holds_on_demand(0.5)
    assert holds_on_demand(6.0)


def test_without_an_on_demand_price_nobody_asks_for_it() -> None:
    for policy in POLICIES.values():
        outcome = run(policy, trace((1, UP), (9, DOWN)), terms(on_demand_usd_per_hour=None))
        assert outcome.usd <= 1.0 + 1e-9


def test_no_policy_passes_budget_deadline_or_bound() -> None:
    rng = random.Random(7)
    for _ in range(200):
        stretches = joined((rng.uniform(0.05, 4), UP if rng.random() < 0.6 else DOWN) for _ in range(30))
        traces = Traces(("a",), 0.1, stretches)
        some = terms(budget_usd=rng.uniform(1, 40), deadline_hours=rng.uniform(1, 60))
        for name, policy in POLICIES.items():
            outcome = run(policy, traces, some)
            assert outcome.usd <= some.budget_usd + 1e-9, name
            assert outcome.hours <= some.deadline_hours + 1e-9, name
            assert -1e-9 <= outcome.useful_hours <= offline_bound(traces, some) + 1e-9, name


def write(folder: Path, name: str, data: list[int], gap: int = 360) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"metadata": {"gap_seconds": gap}, "data": data}))


def test_traces_are_read_joined_and_begin_anew(tmp_path: Path) -> None:
    write(tmp_path, "x", [1, 1, 0, 0])
    write(tmp_path, "y", [0, 2, 2, 2, 9])
    traces = read_traces(tmp_path)
    assert traces.zones == ("x", "y")
    assert [up for _, up in traces.stretches] == [("x",), ("x", "y"), ("y",)]
    assert traces.hours == pytest.approx(0.4)
    assert [up for _, up in traces.window(0.3, 0.2)] == [("y",), ("x",)]
    assert read_traces(tmp_path, num_nodes=2).stretches[0][1] == ()
    assert [round(hours, 9) for hours, _ in traces.only("x").stretches] == [0.2, 0.2]


def test_folders_without_usable_traces_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.json traces in .*; give a folder of availability traces"):
        read_traces(tmp_path)
    write(tmp_path, "x", [1])
    write(tmp_path, "y", [1], gap=60)
    with pytest.raises(UserError, match=r"different gaps between samples \(60 s, 360 s\); put them into"):
        read_traces(tmp_path)
    write(tmp_path, "y", [])
    with pytest.raises(UserError, match="has no samples"):
        read_traces(tmp_path)
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(UserError, match="is not an availability trace"):
        read_traces(tmp_path)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "policy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def test_the_bench_prints_what_the_policies_reach(tmp_path: Path) -> None:
    write(tmp_path, "x", [1] * 100)
    done = bench(
        str(tmp_path), "--budget", "10", "--spot", "1", "--deadline", "8", "--startup", "12", "--starts", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    # Always up: 8 h of spot less 12 min; the bound is 8 h.
    assert document["policies"][document["default"]]["fraction_of_bound"] == pytest.approx(7.8 / 8)
    assert set(document["policies"]["on_demand"]) == {"fraction_of_bound", "useful_hours", "usd", "preemptions"}


def test_the_bench_names_an_empty_folder(tmp_path: Path) -> None:
    done = bench(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there are no .json traces")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no spot traces at {REAL}")
def test_on_real_traces_the_default_comes_near_the_bound() -> None:
    """The full measurement, 150 starts, is `python bench/policy.py`; this one takes 15."""
    traces = read_traces(REAL)
    real = Terms(100.0, 0.918, 3.06, 120.0, 0.2, 0.125)
    rng = random.Random(0)
    starts = [rng.uniform(0, traces.hours - 120) for _ in range(15)]
    every_zone = score(default_policy, traces, real, starts).fraction_of_bound
    alone = [score(default_policy, traces.only(zone), real, starts).fraction_of_bound for zone in traces.zones]
    assert every_zone >= 0.95
    assert sum(alone) / len(alone) >= 0.75
    assert score(on_demand_only, traces, real, starts).fraction_of_bound < 0.35

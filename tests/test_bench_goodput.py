"""What bench/goodput.py makes of a run's own records: who was lost, for how long, and what had to be done again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

T0 = 1_800_000_000.0


@pytest.fixture
def goodput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))
    return importlib.import_module("goodput")


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds, UTC).isoformat()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three groups: the second after a kill at 40 s, the third after a notice at 70 s for 85 s."""
    store, market = tmp_path / "store", tmp_path / "market"
    groups = [
        (0, 2, "start", 0.0, 10.0, None, range(1, 31)),
        (1, 2, "after a loss", 42.0, 46.0, {"incarnation": 0, "step": 25}, range(26, 61)),
        (2, 1, "regrouped at step 60", 80.0, 83.0, {"incarnation": 1, "step": 60}, range(61, 71)),
    ]
    for folder in ("phases", "incarnations"):
        (store / folder).mkdir(parents=True)
    for incarnation, world_size, reason, noticed, trains, parent, steps in groups:
        phases = {"shutdown": 1.0, "process_group": 0.5} if parent else {"ray": 5.0}
        facts = {"incarnation": incarnation, "world_size": world_size, "reason": reason, "started_at": iso(noticed)}
        facts |= {"seconds": phases, "total_seconds": trains - noticed}
        (store / "phases" / f"lease-{incarnation}.json").write_text(json.dumps(facts))
        (store / "incarnations" / f"{incarnation}.json").write_text(json.dumps({"parent": parent, "lease_id": "lease"}))
        metrics = store / "metrics" / f"incarnation={incarnation}"
        metrics.mkdir(parents=True)
        rows = [json.dumps({"step": step, "seconds": 1.0}) for step in steps]
        (metrics / "part-000000.jsonl").write_text("\n".join(rows) + "\n")
    market.mkdir()
    events = [
        {"at": iso(40), "event": "kill", "instance_id": "b", "rank": 1},
        {"at": iso(70), "event": "notice", "instance_id": "c", "rank": 1},
        {"at": iso(85), "event": "kill", "instance_id": "c", "rank": 1},
        {"at": iso(200), "event": "kill", "instance_id": "a", "rank": 0},
    ]
    (market / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return tmp_path


def test_losses_are_told_from_the_end_of_the_run_and_drains_from_kills(goodput: ModuleType, run: Path) -> None:
    losses = goodput.losses_of(run / "market", T0 + 100)
    assert [(loss["rank"], loss["at"] - T0, loss["noticed_at"] and loss["noticed_at"] - T0) for loss in losses] == [
        (1, 40.0, None),
        (1, 85.0, 70.0),
    ]


def test_a_kill_counts_from_the_kill_and_a_drain_from_when_nobody_trained(goodput: ModuleType, run: Path) -> None:
    groups = goodput.groups_of(run / "store")
    # The first group's newest step was seen in its progress after its last records were written.
    seen = goodput.Seen({0: 33, 1: 59, 2: 70})
    found = goodput.recoveries(groups, goodput.losses_of(run / "market", T0 + 100), seen, run / "store")
    kill, drain = found
    assert (kill["how"], kill["seconds"], kill["detected_after_seconds"], kill["steps_lost"]) == ("killed", 6.0, 2.0, 8)
    assert (drain["how"], drain["seconds"], drain["steps_lost"]) == ("drained", 3.0, 0)
    assert goodput.summary(found, "other", "killed")["median_seconds"] == 6.0
    assert goodput.summary(found, "head", "killed") is None


def test_what_ray_makes_survivors_pay_is_the_start_of_their_processes(goodput: ModuleType, run: Path) -> None:
    cost = goodput.restart_cost(goodput.groups_of(run / "store"))
    assert (cost["groups"], cost["median_seconds"], cost["of_median_seconds"]) == (2, 1.0, 1.5)


def test_a_loss_while_another_is_made_good_took_no_steps(goodput: ModuleType, run: Path) -> None:
    groups = goodput.groups_of(run / "store")
    losses = [
        {"at": T0 + 40, "rank": 1, "noticed_at": None},
        {"at": T0 + 43, "rank": 0, "noticed_at": T0 + 41},
    ]
    found = goodput.recoveries(groups, losses, goodput.Seen({0: 33}), run / "store")
    assert [(loss["steps_lost"], loss["while_another_was_recovered"]) for loss in found] == [(8, False), (0, True)]


def test_a_node_that_had_not_joined_yet_stopped_nobody(goodput: ModuleType, run: Path) -> None:
    groups = goodput.groups_of(run / "store")
    losses = [{"at": T0 + 90, "rank": 1, "noticed_at": None}]  # the third group is one worker
    (found,) = goodput.recoveries(groups, losses, goodput.Seen({0: 33}), run / "store")
    assert found["had_joined"] is False and "seconds" not in found
    assert goodput.summary([found], "other", "killed") is None

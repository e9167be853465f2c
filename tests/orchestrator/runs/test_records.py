"""Run records, the one supervisor, and the two clocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cost.errors import SlmError, UserError
from cost.ledger.database import connect
from orchestrator.clock import SystemClock, utc, wall_ms
from orchestrator.events import Event, EventLog, read_events
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import MOVES, TERMINAL, Runs, RunState, SupervisorLock, is_supervised

OPTIONS = RunOptions("fake", single_supervisor=True)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(connect(tmp_path / "slm.db"))


def create(runs: Runs, name: str = "demo") -> str:
    return runs.create(
        recipe_name=name, recipe_digest="d", recipe_json="{}", options=OPTIONS, cap_usd=Decimal("12.34")
    ).run_id


def test_runs_are_named_after_their_recipe_and_numbered(runs: Runs) -> None:
    assert [create(runs), create(runs), create(runs, "tiny")] == ["demo-1", "demo-2", "tiny-3"]
    assert runs.get("demo-2").cap_usd == Decimal("12.34") and runs.get("demo-2").options == OPTIONS


def test_the_only_run_needs_no_name(runs: Runs) -> None:
    run_id = create(runs)
    assert runs.pick(None).run_id == run_id
    create(runs)
    with pytest.raises(UserError, match=r"there are 2 runs, say which: demo-1 \(planned\), demo-2 \(planned\)"):
        runs.pick(None)


def test_an_unknown_run_is_answered_with_the_nearest(runs: Runs) -> None:
    with pytest.raises(UserError, match="nothing was launched yet"):
        runs.pick(None)
    with pytest.raises(UserError, match="nothing was launched yet"):
        runs.get("demo-1")
    create(runs)
    with pytest.raises(UserError, match=r"no run demo-11; did you mean demo-1\?"):
        runs.get("demo-11")
    with pytest.raises(UserError, match=r"no run zzz; there are: demo-1"):
        runs.get("zzz")


def test_a_finished_run_can_only_be_launched_again_if_it_did_not_succeed(runs: Runs) -> None:
    run_id = create(runs)
    runs.move(run_id, RunState.SUCCEEDED, fencing_token=0)
    with pytest.raises(SlmError, match="cannot go from SUCCEEDED to LAUNCHING"):
        runs.move(run_id, RunState.LAUNCHING, fencing_token=0)
    for state in TERMINAL - {RunState.SUCCEEDED}:
        assert MOVES[state] == {RunState.LAUNCHING}


def test_only_the_newest_fencing_token_may_move_a_run(runs: Runs) -> None:
    run_id = create(runs)
    assert runs.take_over(run_id).fencing_token == 1
    with pytest.raises(SlmError, match="taken over by another supervisor"):
        runs.move(run_id, RunState.LAUNCHING, fencing_token=0)
    runs.move(run_id, RunState.LAUNCHING, fencing_token=1, reason="go")
    assert (runs.get(run_id).state, runs.get(run_id).reason) == (RunState.LAUNCHING, "go")


def test_a_take_over_forgets_an_old_request_to_stop(runs: Runs) -> None:
    run_id = create(runs)
    runs.request_stop(run_id)
    assert runs.stop_requested(run_id)
    assert not runs.take_over(run_id).stop_requested


def hold_lock(path: Path, ready: Connection) -> None:
    with SupervisorLock(path, "demo-1"):
        ready.send(True)
        time.sleep(60)


def test_two_supervisors_can_not_have_one_run_and_a_killed_one_leaves_it_free(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "supervisor.lock"
    assert not is_supervised(path)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=hold_lock, args=(path, theirs))
    other.start()
    try:
        assert ours.poll(30) and ours.recv()
        assert is_supervised(path)
        with (
            pytest.raises(UserError, match=f"already has a supervisor \\(process {other.pid},"),
            SupervisorLock(path, "demo-1"),
        ):
            pass
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join(30)
    assert not is_supervised(path)
    with SupervisorLock(path, "demo-1"):
        assert is_supervised(path)


def test_billed_time_runs_at_its_scale_and_never_before_the_ledger() -> None:
    origin = wall_ms() - 10_000
    clock = SystemClock(origin_ms=origin, scale=60.0)
    assert 595_000 <= clock.now_ms() - origin <= 660_000
    assert clock.went_back_ms == 0
    floor = origin + 3_600_000
    later = SystemClock(origin_ms=origin, scale=60.0, floor_ms=floor)
    assert later.now_ms() >= floor and later.went_back_ms > 2_900_000


@pytest.mark.parametrize("jump_seconds", [-7200, 7200])
def test_a_wall_clock_that_jumps_does_not_move_billed_time(monkeypatch: pytest.MonkeyPatch, jump_seconds: int) -> None:
    clock = SystemClock(origin_ms=wall_ms(), scale=1.0)
    before = clock.now_ms()
    real: Callable[[], float] = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_seconds)
    assert 0 <= clock.now_ms() - before < 60_000


def test_events_are_kept_but_progress_is_only_shown(tmp_path: Path) -> None:
    shown: list[Event] = []
    log = EventLog(tmp_path / "run" / "events.jsonl", shown.append)
    log(Event("start", "renting", utc(0), {"nodes": 2}))
    log(Event("progress", "step 1", utc(0)))
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"kind": "cut sho')
    assert [event["message"] for event in read_events(tmp_path / "run" / "events.jsonl")] == ["renting"]
    assert len(shown) == 2 and read_events(tmp_path / "none.jsonl") == []

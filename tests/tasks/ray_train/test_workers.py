"""What a worker sees of the outside, and what it calls a failure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from cost.errors import UserError
from tasks.node.environment import NodeEnv, boottime
from tasks.node.notice import LEAVE_SECONDS
from tasks.ray_train import workers
from tasks.ray_train.workers import (
    ASKED,
    HEAD_LEAVES,
    REGROUP,
    STOP,
    NodeSignals,
    Phases,
    Regroup,
    StepCounter,
    ask,
    fingerprint,
    is_failure,
    record_failure,
)
from tests.tasks.node.test_ray_node_parts import environ
from trainer.checkpoints.lineage import Superseded
from trainer.loop import Signal
from trainer.run_store.base import Store, StoreError, open_store


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ASKED, "regroup", "")
    monkeypatch.setattr(workers, "CONTROL_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def signals_of(tmp_path: Path, store: Store, *, node: int = 1, rank: int = 0) -> NodeSignals:
    (tmp_path / "node").mkdir(exist_ok=True)
    env = NodeEnv.from_environ(environ(tmp_path, SLM_RANK=str(node)))
    return NodeSignals(env, store, store, rank, StepCounter())


def said(tmp_path: Path) -> str:
    """The node's log."""
    return (tmp_path / "node" / "events.log").read_text()


def notice(tmp_path: Path, seconds: float) -> None:
    text = json.dumps({"deadline_boottime": boottime() + seconds, "seconds": seconds})
    (tmp_path / "node" / "notice.json").write_text(text)


def command(store: Store, name: str, number: int) -> None:
    store.write("control/lease-1.json", json.dumps({"command": name, "number": number, "reason": "why"}).encode())


def test_nothing_outside_means_nothing_wanted(tmp_path: Path, store: Store) -> None:
    assert signals_of(tmp_path, store).poll(3) == Signal()


def test_a_command_to_save_is_obeyed_once_per_number(tmp_path: Path, store: Store) -> None:
    signals = signals_of(tmp_path, store)
    command(store, "checkpoint", 1)
    assert [signals.poll(step).checkpoint for step in (1, 2)] == [True, False]
    command(store, "checkpoint", 2)
    assert [signals.poll(step).checkpoint for step in (3, 4)] == [True, False]


def test_only_rank_0_reads_commands(tmp_path: Path, store: Store) -> None:
    command(store, "stop", 1)
    assert not signals_of(tmp_path, store, rank=1).poll(1).stop
    signals = signals_of(tmp_path, store)
    assert signals.poll(1).stop
    assert signals.why == STOP


def test_a_command_that_cannot_be_read_is_no_command(tmp_path: Path, store: Store) -> None:
    store.write("control/lease-1.json", b'{"command": "st')
    assert signals_of(tmp_path, store).poll(1) == Signal()


def test_a_notice_asks_for_a_checkpoint_at_once_and_training_goes_on(tmp_path: Path, store: Store) -> None:
    signals = signals_of(tmp_path, store)
    notice(tmp_path, 60.0)
    assert [signals.poll(step) for step in (1, 2)] == [Signal(checkpoint=True), Signal(hold=True)]


@pytest.mark.parametrize(("node", "why"), [(1, REGROUP), (0, HEAD_LEAVES)])
def test_the_group_leaves_a_node_shortly_before_it_is_taken(tmp_path: Path, store: Store, node: int, why: int) -> None:
    signals = signals_of(tmp_path, store, node=node)
    notice(tmp_path, LEAVE_SECONDS - 1)
    assert signals.poll(1).stop
    assert signals.why == why


def test_no_checkpoint_is_begun_that_would_not_end_in_time(tmp_path: Path, store: Store) -> None:
    store.write("progress/latest.json", json.dumps({"checkpoint_save_seconds": 40.0}).encode())
    signals = signals_of(tmp_path, store)
    notice(tmp_path, 30.0)
    assert [signals.poll(step) for step in (1, 2)] == [Signal(hold=True), Signal(hold=True)]
    assert signals.why == workers.NOTHING
    assert "too late for a checkpoint, none is begun (a save takes 40.0 s" in said(tmp_path)


def test_a_checkpoint_that_fits_once_is_begun_when_the_group_leaves(tmp_path: Path, store: Store) -> None:
    store.write("progress/latest.json", json.dumps({"checkpoint_save_seconds": 18.0}).encode())
    signals = signals_of(tmp_path, store)
    notice(tmp_path, 50.0)  # the last one is begun 1.5 x 18 + 2 s before the end; another would not end before it
    assert signals.poll(1) == Signal(hold=True)
    assert re.search(r"goes in \d+ s: the last checkpoint in (1|2)\d s \(a save takes 18.0 s", said(tmp_path))


def test_a_half_written_notice_is_read_in_the_next_step(tmp_path: Path, store: Store) -> None:
    signals = signals_of(tmp_path, store)
    (tmp_path / "node" / "notice.json").write_text('{"deadline')
    assert signals.poll(1) == Signal()
    notice(tmp_path, 60.0)
    assert signals.poll(2).checkpoint


def test_the_controllers_wish_is_passed_on_and_a_stop_outranks_it(tmp_path: Path, store: Store) -> None:
    signals = signals_of(tmp_path, store)
    ask("1 more node(s) joined")
    assert signals.poll(1) == Signal(stop=True, reason="1 more node(s) joined")
    command(store, "stop", 1)
    signals.poll(2)
    assert signals.why == STOP


@pytest.mark.parametrize(
    "error",
    [
        Regroup("at step 3"),
        StoreError("the store is gone"),
        Superseded(1, 2),
        ConnectionResetError("reset"),
        KeyboardInterrupt(),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29377"),
        RuntimeError("NCCL communicator was aborted on rank 0"),
        torch.distributed.DistBackendError("watchdog"),
    ],
)
def test_the_echo_of_what_ended_elsewhere_is_no_failure(error: BaseException) -> None:
    assert not is_failure(error)


@pytest.mark.parametrize("error", [ValueError("shape"), UserError("vocabulary"), RuntimeError("expected 3D input")])
def test_what_would_happen_again_is_a_failure(error: BaseException) -> None:
    assert is_failure(error)


def raised(text: str) -> ValueError:
    try:
        int_of(text)
    except ValueError as error:
        return error
    raise AssertionError


def int_of(text: str) -> None:
    raise ValueError(f"cannot use {text}")


def test_the_same_bug_has_the_same_fingerprint_whatever_its_numbers() -> None:
    assert fingerprint(raised("loss 3.5e-1 at 0x7f12")) == fingerprint(raised("loss 7 at 0xa0"))
    assert fingerprint(raised("loss 1")) != fingerprint(raised("norm 1"))
    assert fingerprint(raised("loss 1")).startswith("ValueError in tasks/ray_train/test_workers.py:int_of")


def test_failures_are_recorded_under_free_numbers(tmp_path: Path, store: Store) -> None:
    (tmp_path / "node").mkdir()
    env = NodeEnv.from_environ(environ(tmp_path))
    store.write("incarnations/3.json", b"{}")
    record_failure(store, env, raised("loss 1"), step=7)
    record_failure(store, env, UserError("a whole sentence\nin two lines"), step=8)
    first, second = (json.loads(store.read(f"failures/{number:04d}.json")) for number in (0, 1))
    assert (first["step"], first["incarnation"], first["lease_id"]) == (7, 3, "lease-1")
    assert first["message"] == "ValueError: cannot use loss 1"
    assert "int_of" in first["traceback"]
    assert second["message"] == "a whole sentence\nin two lines"


def test_phases_are_the_times_between_stamps(tmp_path: Path, store: Store) -> None:
    (tmp_path / "node").mkdir()
    env = NodeEnv.from_environ(environ(tmp_path))
    phases = Phases({"number": 2, "reason": "after a loss", "stamps": [("noticed", 100.0), ("shutdown", 101.5)]})
    assert phases.seconds()["shutdown"] == 1.5
    assert set(phases.seconds()) == {"shutdown", "handover"}
    phases.write(store, env, world_size=1)
    phases.write(store, env, world_size=1)
    assert store.list("phases/") == ["phases/lease-1-2.json", "phases/lease-1-3.json"]
    assert json.loads(store.read("phases/lease-1-2.json"))["reason"] == "after a loss"

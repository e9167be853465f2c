"""When a cluster is given up: decided from what workers and incarnations recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.node.environment import NodeEnv
from tasks.ray_train import elastic
from tasks.ray_train.elastic import GaveUp, Keeper, Progress, read_failures, repeated_failure
from tests.tasks.node.test_ray_node_parts import environ
from tests.tasks.test_spec import make_spec
from trainer.run_store.base import Store, open_store


def failure(group: int, step: int = 5, fingerprint: str = "ValueError", lease_id: str = "lease-1") -> dict[str, Any]:
    return {"lease_id": lease_id, "group": group, "step": step, "fingerprint": fingerprint, "message": "the message"}


def test_two_groups_that_fail_alike_at_one_step_are_a_bug() -> None:
    assert repeated_failure([failure(1), failure(2)], "lease-1") == failure(2)


@pytest.mark.parametrize(
    "second",
    [failure(1), failure(2, step=6), failure(2, fingerprint="KeyError"), failure(2, lease_id="lease-0")],
    ids=["another rank of the same group", "another step", "another bug", "another lease"],
)
def test_anything_else_may_be_chance(second: dict[str, Any]) -> None:
    assert repeated_failure([failure(1), second], "lease-1") is None


def test_restarts_are_counted_from_one_checkpoint_on() -> None:
    progress = Progress()
    counts = [progress.restart(parent) for parent in (None, None, {"step": 4}, {"step": 4}, {"step": 9})]
    assert counts == [1, 2, 1, 2, 1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def keeper(tmp_path: Path, store: Store) -> Keeper:
    (tmp_path / "node").mkdir()
    keeper = Keeper(make_spec(max_workers=2), stamps=[])
    keeper._env = NodeEnv.from_environ(environ(tmp_path))
    keeper._store = store
    return keeper


def test_a_repeated_failure_ends_the_run(keeper: Keeper, store: Store) -> None:
    for number in (1, 2):
        store.write(f"failures/{number:04d}.json", json.dumps(failure(number)).encode())
    store.write("failures/0003.json", b"half")
    assert len(read_failures(store)) == 2
    with pytest.raises(GaveUp, match="two groups of workers failed alike at step 5: the message"):
        keeper.before_controller_execute_failure_decision(None)


def test_groups_that_never_get_further_end_the_run(keeper: Keeper, store: Store) -> None:
    store.write("incarnations/0.json", json.dumps({"parent": None}).encode())
    for _ in range(elastic.MAX_RESTARTS_WITHOUT_PROGRESS):
        keeper.before_controller_execute_failure_decision(None)
    store.write("incarnations/1.json", json.dumps({"parent": {"incarnation": 0, "step": 8}}).encode())
    for _ in range(elastic.MAX_RESTARTS_WITHOUT_PROGRESS):
        keeper.before_controller_execute_failure_decision(None)
    with pytest.raises(GaveUp, match="7 groups in a row failed without a new checkpoint"):
        keeper.before_controller_execute_failure_decision(None)


def test_a_start_that_failed_is_no_failed_group(keeper: Keeper) -> None:
    for _ in range(3 * elastic.MAX_RESTARTS_WITHOUT_PROGRESS):
        keeper.before_worker_group_start(SimpleNamespace(num_workers=2))
        keeper.before_controller_execute_failure_decision(None)


def test_too_few_nodes_are_waited_for_but_not_for_ever(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "WAITING_SECONDS", 0.0)
    RestartingState = type("RestartingState", (), {})
    states = RestartingState(), RestartingState()
    keeper.after_controller_state_update(*states)
    monkeypatch.setattr(elastic, "MAX_WAIT_SECONDS", -1.0)
    with pytest.raises(GaveUp, match="too few nodes for"):
        keeper.after_controller_state_update(*states)

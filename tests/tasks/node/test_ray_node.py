"""Leases of real nodes on this machine: Ray, Ray Train and training as they run in the cloud, killed and drained."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.ray_nodes import LEASE, Nodes

START_SECONDS = 150.0
"""Bounds are for a machine that does much else; bench/recovery_local.py measures."""
CHANGE_SECONDS = 90.0

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with Nodes(2) as nodes:
        yield nodes


def last_step(nodes: Nodes, incarnation: int) -> int:
    """The newest step that a group of workers has recorded."""
    return max(int(row["step"]) for row in steps_of(nodes, incarnation))


def steps_of(nodes: Nodes, incarnation: int) -> list[dict[str, Any]]:
    """What it has recorded of each step."""
    keys = nodes.store.list(f"metrics/incarnation={incarnation}/")
    return [json.loads(line) for key in keys for line in nodes.store.read(key).splitlines()]


def train_workers(nodes: Nodes, rank: int) -> list[psutil.Process]:
    return [process for process in nodes.family(rank) if "RayTrainWorker" in " ".join(process.cmdline())]


def temp_dir(nodes: Nodes, rank: int) -> Path:
    return Path(json.loads((nodes.node_dir(rank) / "ray.json").read_text())["temp_dir"])


def test_a_lease_trains_on_through_loss_growth_and_notice(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1)
    nodes.wait("two workers train", lambda: nodes.trains(2), START_SECONDS)
    nodes.wait("a checkpoint", nodes.checkpoints, CHANGE_SECONDS)

    nodes.kill(1)
    nodes.wait("the worker that is left trains", lambda: nodes.trains(1), CHANGE_SECONDS)
    after_loss = nodes.progress()["incarnation"]
    assert nodes.incarnations()[after_loss]["parent"]["step"] == nodes.checkpoints()[0][1]

    nodes.start(1)
    nodes.wait("two workers train again", lambda: nodes.trains(2), START_SECONDS)
    grown = nodes.progress()["incarnation"]
    assert nodes.incarnations()[grown]["parent"] == {"incarnation": after_loss, "step": last_step(nodes, after_loss)}

    nodes.notice(1, seconds=9.0)
    nodes.wait("the drained node is left", lambda: nodes.trains(1, grown), CHANGE_SECONDS)
    assert nodes.incarnations()[grown + 1]["parent"] == {"incarnation": grown, "step": last_step(nodes, grown)}
    nodes.wait("the drained node ends by itself", lambda: nodes.processes[1].poll() is not None, CHANGE_SECONDS)
    assert nodes.processes[1].returncode == 0
    assert not nodes.family(1)

    nodes.command("stop", number=1)
    nodes.wait("the lease ends", lambda: nodes.processes[0].poll() is not None, CHANGE_SECONDS)
    assert nodes.processes[0].returncode == 10
    assert nodes.checkpoints()[-1] == (grown + 1, last_step(nodes, grown + 1))
    assert not nodes.family(0)
    assert not temp_dir(nodes, 0).exists()
    assert not nodes.store.list("failures/")
    phases = [nodes.read(f"phases/{LEASE}-{number}.json") for number in (1, 2, 3, 4)]
    assert [phase["world_size"] for phase in phases] == [2, 1, 2, 1]
    assert {"workers", "process_group", "data", "model", "load", "first_step"} <= set(phases[1]["seconds"])


def test_three_nodes_shrink_to_two_grow_back_and_lose_no_step_to_a_sigterm() -> None:
    with Nodes(3) as nodes:
        for rank in range(3):
            nodes.start(rank)
        nodes.wait("three workers train", lambda: nodes.trains(3), START_SECONDS)
        nodes.wait("a checkpoint", nodes.checkpoints, CHANGE_SECONDS)

        nodes.kill(2)
        nodes.wait("the two that are left train", lambda: nodes.trains(2), CHANGE_SECONDS)
        shrunk = nodes.progress()["incarnation"]
        nodes.start(2)
        nodes.wait("three workers train again", lambda: nodes.trains(3, shrunk), START_SECONDS)
        grown = nodes.progress()["incarnation"]
        assert nodes.incarnations()[grown]["parent"] == {"incarnation": shrunk, "step": last_step(nodes, shrunk)}

        nodes.terminate(1)  # what a platform without a notice of its own does
        nodes.wait("the node is left", lambda: nodes.trains(2, grown), CHANGE_SECONDS)
        assert nodes.incarnations()[grown + 1]["parent"] == {"incarnation": grown, "step": last_step(nodes, grown)}
        nodes.wait("the node ends by itself", lambda: nodes.processes[1].poll() is not None, CHANGE_SECONDS)
        assert nodes.processes[1].returncode == 0
        rows = [row for incarnation in range(grown + 2) for row in steps_of(nodes, incarnation)]
        assert {row["tokens"] for row in rows} == {32 * 128}
        assert not nodes.store.list("failures/")


def test_a_bug_ends_the_lease_after_it_struck_twice_at_one_step() -> None:
    with Nodes(1, settings=("model.vocab_size=512",)) as nodes:  # the data has 1024 tokens
        nodes.start(0)
        nodes.wait("the node ends", lambda: nodes.processes[0].poll() is not None, START_SECONDS)
        assert nodes.processes[0].returncode == 20
        first, second = (nodes.read(key) for key in nodes.store.list("failures/"))
        assert first["fingerprint"] == second["fingerprint"]
        assert (first["step"], second["step"]) == (0, 0)
        assert "set model.vocab_size to 1024" in first["message"]
        assert "two groups of workers failed alike at step 0" in nodes.log(0)
        assert not nodes.family(0)


def test_two_leases_on_one_machine_do_not_touch_each_other() -> None:
    with Nodes(1) as broken, Nodes(1) as other:
        broken.start(0)
        other.start(0)
        broken.wait("the first lease trains", lambda: broken.trains(1), START_SECONDS)
        other.wait("the second lease trains", lambda: other.trains(1), START_SECONDS)

        with Nodes(2, environ={"SLM_LEASE": "stray"}) as stray:
            stray.head_port = other.head_port
            stray.start(1)
            stray.wait("a node of another lease ends", lambda: stray.processes[1].poll() is not None, CHANGE_SECONDS)
            assert stray.processes[1].returncode == 30
            assert f"belongs to {LEASE}, not to stray" in stray.log(1)

        for worker in train_workers(broken, 0):
            worker.kill()
        broken.wait("another worker trains", lambda: broken.trains(1, 0), CHANGE_SECONDS)

        next(process for process in broken.family(0) if process.name() == "gcs_server").kill()
        began = time.monotonic()
        broken.wait("the node ends", lambda: broken.processes[0].poll() is not None, CHANGE_SECONDS)
        assert broken.processes[0].returncode == 30
        assert time.monotonic() - began < 30
        assert "gcs_server died" in broken.log(0)
        assert not broken.family(0)

        step = other.progress()["step"]
        other.wait("the other lease goes on", lambda: other.progress()["step"] > step, CHANGE_SECONDS)
        assert other.progress()["incarnation"] == 0
        other.terminate(0)
        other.wait("SIGTERM ends it", lambda: other.processes[0].poll() is not None, CHANGE_SECONDS)
        assert other.processes[0].returncode == 40
        assert other.checkpoints()[-1] == (0, last_step(other, 0))
        assert not other.family(0)
        assert not temp_dir(other, 0).exists()

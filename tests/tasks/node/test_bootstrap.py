"""A rented node before it has anything: ranks, the guard's command, the environment, and the whole for real."""

from __future__ import annotations

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.sky.backend import staged
from orchestrator.backends.sky.task import RUN
from tasks.data.store_data import SetUpError, fetch_data, offer_data
from tasks.guard.command_line import parse
from tasks.guard.processes import kill_family
from tasks.node import bootstrap as rented
from tasks.node import rented_node
from tasks.recipe.load import load_recipe
from tasks.run_store_keys import DATA_LIST
from tasks.spec import RunSpec
from tests.support.hostile_folder import write_hostile_modules
from trainer.run_store.base import DirectoryStore

ENVIRON = {
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
    "SKYPILOT_NODE_RANK": "1",
    "SLURM_JOB_ID": "77",
    "PATH": "/bin",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
    "RAY_ADDRESS": "auto",
}


def facts(**changed: Any) -> dict[str, Any]:
    return {
        "lease_id": "slm-1f2e3d-demo-1-1",
        "num_nodes": 2,
        "store_uri": "s3://bucket/run",
        "head_port": 21000,
        "first_grant_seconds": 60.0,
        "guard_period_seconds": 1.0,
        "terminators": ["family", "command:scancel {SLURM_JOB_ID}", "provider-limit:slurm-time"],
        "notice": [],
        "timer": "",
        "region": "eu-north-1",
        "credentials": "credentials",
        "ranks": {},
        **changed,
    }


# -- pure


def test_it_runs_on_any_python_from_3_8() -> None:
    ast.parse(Path(rented.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_nodes_that_live_keep_their_ranks_and_new_ones_take_what_is_free() -> None:
    assert rented.node_ranks(["a", "b"], {}) == {"a": 0, "b": 1}
    assert rented.node_ranks(["new", "head", "other"], {"head": 0, "gone": 1, "other": 2}) == {
        "head": 0,
        "other": 2,
        "new": 1,
    }


def test_the_first_rank_s_address_is_the_head_s_whatever_skypilot_s_order() -> None:
    told = rented.node_environment(facts(ranks={"10.0.0.6": 0}), ENVIRON, "/n", "m", "/code")
    assert (told["SLM_RANK"], told["SLM_NODE_IP"], told["SLM_HEAD_IP"]) == ("0", "10.0.0.6", "10.0.0.6")


def test_nodes_hear_where_credentials_lie_and_nothing_of_others_keys() -> None:
    told = rented.node_environment(facts(), ENVIRON, "/n", "m", "/code")
    assert told["AWS_SHARED_CREDENTIALS_FILE"] == "/code/credentials"
    assert "not-to-be-seen" not in told.values()
    assert not [name for name in told if name.startswith("RAY_")]


def test_the_working_folder_of_a_node_is_on_no_import_path() -> None:
    told = rented.node_environment(facts(), ENVIRON, "/n", "m", "/code")
    assert (told["PYTHONPATH"], told["PYTHONSAFEPATH"]) == ("/code", "1")
    words = rented.guard_command(facts(), ENVIRON, "/n", "m", "/code")
    bootstrap = words[words.index("--") + 1 :]
    assert bootstrap == [
        *(sys.executable, "-I", "-u", "/code/tasks/node/bootstrap.py", "bootstrap"),
        *("--facts", "/code/node.json"),
    ]
    assert Path(rented.__file__).match(bootstrap[3].removeprefix("/code/"))


def test_a_terminator_that_this_node_cannot_name_is_left_out() -> None:
    words = rented.guard_command(facts(), ENVIRON, "/n", "m", "/code")
    assert "command:scancel 77" in words
    elsewhere = {name: value for name, value in ENVIRON.items() if name != "SLURM_JOB_ID"}
    assert not [word for word in rented.guard_command(facts(), elsewhere, "/n", "m", "/code") if "scancel" in word]


def test_the_guard_accepts_its_command_line() -> None:
    options = parse(rented.guard_command(facts(), ENVIRON, "/n", "m", "/code")[4:])
    assert (options.rank, options.first_grant, options.credentials) == (1, 60.0, "/code/credentials")
    assert options.command[2] == "bootstrap" or "bootstrap" in options.command


def test_the_environment_s_name_is_made_of_what_decides_its_content() -> None:
    name = rented.environment_name(b"torch==2.13.0\n", False)
    assert name == rented.environment_name(b"torch==2.13.0\n", False)
    assert name != rented.environment_name(b"torch==2.12.0\n", False)
    assert name != rented.environment_name(b"torch==2.13.0\n", True)


def test_packages_are_asked_for_in_the_versions_of_the_lock_file() -> None:
    lock = Path(__file__).parents[3] / "constraints.txt"
    wanted = rented.wanted_packages(str(lock))
    assert len(wanted) == len(rented.PACKAGES)
    assert all("==" in name for name in wanted)
    assert next(name for name in wanted if name.startswith("ray")) == "ray[train]==2.60.0"


# -- data


def test_prepared_data_go_through_the_store_once_and_arrive_whole(tmp_path: Path) -> None:
    data = tmp_path / "data" / "abc"
    (data / "train").mkdir(parents=True)
    (data / "train" / "0.bin").write_bytes(b"tokens")
    (data / "index.json").write_text("{}")
    store = DirectoryStore(tmp_path / "store")
    assert offer_data(store, data) == "data/abc"
    store.write("data/abc/index.json", b"[]")
    offer_data(store, data)  # its list is there: nothing is brought again
    assert store.read("data/abc/index.json") == b"[]"
    found = fetch_data(store, "data/abc", tmp_path / "cache")
    assert (found / "train" / "0.bin").read_bytes() == b"tokens"
    store.delete(f"data/abc/{DATA_LIST}")
    assert fetch_data(store, "data/abc", tmp_path / "cache") == found  # kept for the next attempt


def test_data_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "abc"
    data.mkdir()
    (data / "a.bin").write_bytes(b"tokens")
    store = DirectoryStore(tmp_path / "store")
    offer_data(store, data)
    store.write("data/abc/a.bin", b"tok")
    with pytest.raises(SetUpError, match="arrived with another size"):
        fetch_data(store, "data/abc", tmp_path / "cache")
    store.delete("data/abc/a.bin")
    with pytest.raises(SetUpError, match="not whole in the run store"):
        fetch_data(store, "data/abc", tmp_path / "cache")
    assert not (tmp_path / "cache" / "data" / "abc").exists()


# -- the whole, with the environment of these tests in the place of one that is installed


class Node:
    """`bootstrap.py start` as SkyPilot runs it, on this machine."""

    def __init__(self, folder: Path, store: DirectoryStore, spec: RunSpec) -> None:
        self.store, self.folder = store, folder
        store.write("spec.json", spec.to_bytes())
        cache = folder / "cache"
        told = facts(
            lease_id="slm-1f2e3d-demo-1-1",
            num_nodes=1,
            store_uri=store.uri,
            credentials="",
            kill=["family"],
            first_grant_seconds=60.0,
        )
        told["kill"] = ["family", "provider-limit:test"]
        self.staging = staged(folder / "work", told, None)
        self.work = self.staging.__enter__()
        lock = (self.work / "constraints.txt").read_bytes()
        place = cache / rented.environment_name(lock, rented.has_gpu())
        (place / "bin").mkdir(parents=True)
        python = place / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (place / rented.COMPLETE).touch()
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLM_")},
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_NODE_RANK": "0",
            "SLM_CACHE": str(cache),
            "TMPDIR": str(folder / "tmp"),
        }
        (folder / "tmp").mkdir()
        self.node_dir = folder / "tmp" / f"slm-{os.getuid()}" / "slm-1f2e3d-demo-1-1-0"
        write_hostile_modules(self.node_dir)
        self.process = subprocess.Popen(
            [sys.executable, *shlex.split(RUN.removeprefix("exec python3"))],
            cwd=self.work,
            env=environ,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def until(self, fact: Callable[[], Any], seconds: float = 60.0) -> Any:
        until = time.monotonic() + seconds
        while not (value := fact()):
            assert time.monotonic() < until, "".join(path.read_text() for path in self.node_dir.glob("node.log"))
            time.sleep(0.1)
        return value

    def request(self) -> dict[str, Any]:
        path = self.store.root / "guard" / "slm-1f2e3d-demo-1-1" / "0" / "request.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def close(self) -> None:
        mark = json.loads((self.node_dir / "mark.json").read_text())["mark"]
        for _ in range(5):
            kill_family(mark)
            time.sleep(0.05)
        self.process.kill()
        self.process.wait()
        self.staging.__exit__(None, None, None)


def spec_for(lease_id: str, store: DirectoryStore) -> RunSpec:
    return RunSpec(
        run_id="demo-1",
        lease_id=lease_id,
        attempt=1,
        recipe=load_recipe("demo"),
        store_uri=store.uri,
        data_dir="data/none",
        num_nodes=1,
        max_workers=1,
        checkpoint_interval_seconds=10.0,
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    store = DirectoryStore(tmp_path / "store")
    node = Node(tmp_path, store, spec_for("slm-1f2e3d-demo-1-2", store))
    yield node
    node.close()


def test_the_guard_comes_first_tells_how_the_node_ended_and_outlives_skypilot_s_process(node: Node) -> None:
    node.until(lambda: node.request().get("exit_code") == rented.EXIT_BROKEN)
    log = node.until(lambda: (node.store.root / "logs" / "slm-1f2e3d-demo-1-1-0.log").exists()) and node.store.read(
        "logs/slm-1f2e3d-demo-1-1-0.log"
    )
    assert b"the run continues as slm-1f2e3d-demo-1-2; this node belongs to slm-1f2e3d-demo-1-1" in log
    before = node.request()["number"]
    os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait()
    node.until(lambda: node.request()["number"] > before)


def test_a_later_attempt_s_spec_is_not_followed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.write("spec.json", spec_for("slm-1f2e3d-demo-1-2", store).to_bytes())
    assert rented_node.spec_of(store, "slm-1f2e3d-demo-1-2").attempt == 1
    with pytest.raises(SetUpError, match="the run continues as slm-1f2e3d-demo-1-2"):
        rented_node.spec_of(store, "slm-1f2e3d-demo-1-1")

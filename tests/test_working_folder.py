"""Files in the user's working folder that carry the names of our packages are never imported in the place of ours."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.backends.sky import client, enabled_clouds
from orchestrator.prices.table import refresh_command
from orchestrator.settings import Home
from orchestrator.supervisor import background
from tasks.__main__ import TASKS
from tasks.own_module import own_module
from tests.support.hostile_folder import SAID, write_hostile_modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("orchestrator", "tasks", "trainer", "cost")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hostile_modules(tmp_path / "work")


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "SLM_HOME": str(folder.parent / "home")}
    environ.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        command, cwd=folder, env=environ, input="", capture_output=True, text=True, timeout=120, check=False
    )


def test_the_files_are_imported_where_the_path_is_not_safe(folder: Path) -> None:
    for command in (["-m", "tasks"], ["-m", "orchestrator.cli"], ["-c", "import trainer"], ["-c", "import cost"]):
        assert SAID in run([sys.executable, *command], folder).stderr


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_ours(task: str, folder: Path) -> None:
    done = run(own_module("tasks", task, "--help"), folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m tasks {task}")


def test_the_supervisor_in_the_background_is_ours(folder: Path) -> None:
    done = run([*background.PROGRAM, "plan", "demo"], folder)
    assert done.returncode == 0, done.stderr


def test_the_refresh_of_prices_is_ours(folder: Path) -> None:
    done = run([*refresh_command(Home(folder.parent / "home")), "--help"], folder)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["orchestrator.backends.local", "tasks.node.forkserver", "tasks.data.prepare"])
def test_a_module_that_is_started_by_itself_is_ours(module: str, folder: Path) -> None:
    assert SAID not in run(own_module(module, "--help"), folder).stderr


@pytest.mark.parametrize("command", [client.COMMAND, enabled_clouds.COMMAND])
def test_what_talks_to_skypilot_is_ours(command: Sequence[str], folder: Path) -> None:
    pytest.importorskip("sky", exc_type=ImportError)
    assert SAID not in run(command, folder).stderr


def test_slm_itself_is_ours(folder: Path) -> None:
    done = run([str(Path(sys.executable).with_name("slm")), "plan", "demo", "--json"], folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]


def spelled_command_lines() -> Iterator[str]:
    """Places in our packages where `-m` stands before the name of a module of ours."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                words = [getattr(word, "value", None) for word in getattr(node, "elts", ())]
                for option, module in itertools.pairwise(words):
                    if option == "-m" and str(module).partition(".")[0] in PACKAGES:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_the_command_line_of_our_modules_is_spelled_in_one_place() -> None:
    in_bootstrap = [place for place in spelled_command_lines() if place.startswith("tasks/node/bootstrap.py:")]
    assert len(in_bootstrap) == 1  # standard library only, on any python3; the environment makes its path safe
    assert [place for place in spelled_command_lines() if place not in in_bootstrap] == []

"""A supervisor in the background: found by the lock that it holds, or its last words passed on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from cost.errors import SlmError, UserError
from orchestrator.settings import Home
from orchestrator.supervisor import background

HOLDER = """
import sys, time
from pathlib import Path
from orchestrator.supervisor import background
from orchestrator.runs.records import SupervisorLock
assert background.is_child() and not background.is_child()
with SupervisorLock(Path(sys.argv[1]), "demo-1"):
    print("supervising", flush=True)
    time.sleep(60)
"""


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_the_child_is_known_by_its_lock_and_leaves_a_log(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lock = home.run_dir("demo-1") / "supervisor.lock"
    started = background.start([str(lock)], home, program=program(HOLDER))
    try:
        assert started.run_id == "demo-1"
        assert started.log == home.supervisor_log("demo-1")
        assert os.getsid(started.pid) == started.pid
        assert background.supervised_by(started.pid, home) == "demo-1"
    finally:
        os.kill(started.pid, signal.SIGKILL)
        os.waitpid(started.pid, 0)
    assert background.supervised_by(started.pid, home) is None
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]


def test_a_users_mistake_of_the_child_is_one_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the budget is too small$"):
        background.start([], Home(tmp_path), program=program("print('a\\nError: the budget is too small'); exit(2)"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_failure_of_the_child_is_one_here(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match=r"^boom$") as caught:
        background.start([], Home(tmp_path), program=program("import sys; sys.exit('boom')"))
    assert caught.value.exit_code == 1


def test_a_child_that_says_nothing_is_told_by_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="ended at once with exit code 7"):
        background.start([], Home(tmp_path), program=program("raise SystemExit(7)"))


def test_a_child_that_never_takes_its_run_over_is_ended(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match=r"did not start within 0 s; see .*\.log"):
        background.start([], Home(tmp_path), program=program("import time; time.sleep(60)"), start_seconds=0.2)


def test_only_the_child_is_the_child() -> None:
    assert not background.is_child()

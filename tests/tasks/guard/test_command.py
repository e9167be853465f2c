"""The node's command: its exit code is reported whoever was killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tasks.guard.files import read_json, recorded
from tasks.guard.processes import alive
from tests.support.guarded import (
    Node,
    node,
    until,
)

__all__ = ["node"]


def test_the_exit_code_is_told_though_the_guard_was_killed(node: Callable[..., Node], tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait_then_seven = f"import os, sys, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\nsys.exit(7)"
    kept = node([sys.executable, "-S", "-c", wait_then_seven], first_grant=30.0)
    kept.pid_of("command")
    os.kill(kept.pid_of("deadline"), signal.SIGKILL)
    kept.process.wait()
    go.touch()
    until(lambda: kept.request().get("state") == "exited")
    assert kept.request()["exit_code"] == 7
    assert read_json(str(kept.dir / "exit.json")) == {"exit_code": 7}
    assert alive(recorded(str(kept.dir / "deadline.json")))  # billing goes on, so the guard does too


def test_a_command_that_cannot_be_run_is_told(node: Callable[..., Node]) -> None:
    wrong = node(["/no/such/program"], first_grant=30.0)
    until(lambda: wrong.request().get("exit_code") == 127)

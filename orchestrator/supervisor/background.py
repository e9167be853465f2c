"""A supervisor that outlives the terminal: the same command again, in a session of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cost.errors import SlmError, UserError
from orchestrator.settings import Home
from tasks.own_module import own_module

CHILD_VARIABLE = "SLM_IN_BACKGROUND"
"""Set for the child: it neither asks nor goes to the background once more."""
PROGRAM = own_module("orchestrator.cli")
START_SECONDS = 60.0
"""Longest wait for the child to take its run over."""
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Started:
    """A run with its supervisor's process and log."""

    run_id: str
    pid: int
    log: Path


def is_child() -> bool:
    """Whether this process is the one in the background. Asked once: what it starts itself is not."""
    return os.environ.pop(CHILD_VARIABLE, None) is not None


def start(
    arguments: Sequence[str],
    home: Home,
    *,
    program: Sequence[str] = PROGRAM,
    start_seconds: float = START_SECONDS,
) -> Started:
    """Run `slm` with these arguments in the background, and return when it holds its run's lock.

    Raises:
        SlmError: It ended before, or did not get there in time; with what it said.
    """
    folder = home.root / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f".starting-{secrets.token_hex(4)}.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, CHILD_VARIABLE: "1"},
            start_new_session=True,
        )
    deadline = time.monotonic() + start_seconds
    while True:
        run_id = supervised_by(child.pid, home)
        code = child.poll()
        if run_id is not None:
            final = home.supervisor_log(run_id)
            log.replace(final)  # the child goes on writing into the same file
            return Started(run_id, child.pid, final)
        if code is not None:
            said = last_line(log)
            log.unlink()
            error = UserError if code == UserError.exit_code else SlmError
            raise error(said or f"the supervisor in the background ended at once with exit code {code}.")
        if time.monotonic() > deadline:
            child.kill()
            child.wait()
            raise SlmError(f"the supervisor in the background did not start within {start_seconds:.0f} s; see {log}")
        time.sleep(POLL_SECONDS)


def supervised_by(pid: int, home: Home) -> str | None:
    """The run whose lock a process holds."""
    from orchestrator.runs.records import is_supervised

    for path in (home.root / "runs").glob("*/supervisor.lock"):
        if path.read_text(encoding="utf-8").strip() == str(pid) and is_supervised(path):
            return path.parent.name
    return None


def last_line(log: Path) -> str:
    """What the child said last, without the prefix that it will be given again."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("Error: ") if lines else ""

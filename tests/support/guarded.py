"""One guarded node with real processes, as tests see it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.guard.clock import boottime
from tasks.guard.command_line import parse
from tasks.guard.files import read_json, write_json
from tasks.guard.processes import Identity, alive, family, kill_family
from tasks.guard.terminator import Terminator
from tasks.guard.terminators import named_terminators
from tasks.node.guard_archive import write_guard_archive

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
PYTHON = os.environ.get("SLM_TEST_NODE_PYTHON", sys.executable)
"""What runs the guard: nodes may have an older python than ours."""
SLACK_SECONDS = 15.0
"""How late a busy machine may be. What a test rules out takes for ever, or until a grant of minutes ends."""
LEASE = "lease-1"
GRANTS = f"grants/{LEASE}/0.json"
TERMINATORS = ("--terminator", "family", "--terminator", "provider-limit:test")
GUARD_OPTIONS = ("--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d")
"""What every guard must be told."""
SYSTEM_COMMANDS = ("systemctl", "systemd-run", "shutdown")


@functools.cache
def guard_program() -> str:
    """The guard's archive, as nodes get it; made once."""
    folder = Path(tempfile.mkdtemp(prefix="slm-test-guard-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(write_guard_archive(folder))


def guard_command(verb: str, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """`guard.pyz VERB`, as a supervisor runs it over ssh: the exit code and what it printed."""
    line = [PYTHON, "-I", "-S", guard_program(), verb, "--node-dir", str(folder), *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout)


def terminator_named(word: str, *options: str) -> Terminator:
    """The only terminator of a name."""
    (found,) = named_terminators(parse([*GUARD_OPTIONS, "--terminator", word, *options, "--", "true"]))
    return found


def system_of(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which the system's commands only write down how they were called."""
    bin_dir, calls = tmp_path / "bin", tmp_path / "calls"
    bin_dir.mkdir()
    for name in SYSTEM_COMMANDS:
        (bin_dir / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(calls))}\n')
        (bin_dir / name).chmod(0o755)
    calls.touch()
    return {"PATH": f"{bin_dir}:{os.environ['PATH']}"}, calls


def until(fact: Callable[[], Any], seconds: float = 40.0) -> Any:
    """Wait for a fact, bounded; its value, or a failure that names the source line of the caller."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = fact()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not true within {seconds} s")


class Node:
    """One guarded node under a folder, and what a test sees of it."""

    def __init__(
        self,
        root: Path,
        command: list[str],
        *options: str,
        first_grant: float,
        mark: str = "",
        store: str | None = None,
        env: dict[str, str] | None = None,
        python: str = PYTHON,
    ) -> None:
        self.mark = mark or f"test-{os.getpid()}-{root.name}"
        self.dir, self.store = root / "node", root / "store"
        self.store.mkdir(exist_ok=True)
        self.log = (root / "log").open("ab")
        options = options if "--terminator" in options else (*TERMINATORS, *options)
        place = str(self.store) if store is None else store
        arguments = ["--store", place, "--lease", LEASE, "--rank", "0", "--first-grant", str(first_grant)]
        arguments += ["--period", "0.1", "--mark", self.mark, "--node-dir", str(self.dir), *options, "--", *command]
        self.started = boottime()
        self.process = subprocess.Popen(
            [python, "-I", "-S", guard_program(), *arguments], stderr=self.log, env={**os.environ, **(env or {})}
        )

    def alive(self) -> set[Identity]:
        self.process.poll()
        return family(self.mark)

    def pid_of(self, name: str) -> int:
        """guard: deadline.json, watchdog: watchdog.json, command: command.json; waits until that one is alive."""

        def recorded() -> int:
            self.process.poll()
            facts = read_json(str(self.dir / f"{name}.json"))
            return facts["pid"] if facts and alive((facts["pid"], facts["start"])) else 0

        return int(until(recorded))

    def request(self) -> dict[str, Any]:
        return read_json(str(self.store / f"guard/{LEASE}/0/request.json"))

    def number_after(self, number: int) -> int:
        """Of a request by the next guard, which begins with the clock's milliseconds; the one before counted by one."""
        return int(until(lambda: (seen := self.request().get("number", 0)) > number + 100 and seen))

    def grant(self, seconds: float, *, fencing_token: int = 1, number: int | None = None) -> int:
        """Answer the newest request as a supervisor does."""
        number = until(self.request)["number"] if number is None else number
        self.store.joinpath(GRANTS).parent.mkdir(parents=True, exist_ok=True)
        write_json(
            str(self.store / GRANTS), {"fencing_token": fencing_token, "number": number, "duration_seconds": seconds}
        )
        return number

    def deadline(self) -> float:
        """Seconds from the start of the node."""
        return float(read_json(str(self.dir / "deadline.json"))["deadline"]) - self.started

    def log_lines(self) -> list[dict[str, Any]]:
        log = self.store / f"guard/{LEASE}/0/log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def events(self) -> list[str]:
        return [line["event"] for line in self.log_lines()]

    def said(self) -> str:
        """What the guard wrote to its own stderr."""
        return Path(self.log.name).read_text()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(command: list[str], *options: str, **rest: Any) -> Node:
        nodes.append(Node(tmp_path, command, *options, **rest))
        return nodes[-1]

    yield make
    for each in nodes:
        while kill_family(each.mark):
            each.process.poll()
        each.log.close()

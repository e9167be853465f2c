"""One guarded node with real processes, as tests see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import guard

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
PYTHON = os.environ.get("SLM_TEST_NODE_PYTHON", sys.executable)
"""What runs the guard: nodes may have an older python than ours."""
SLACK_SECONDS = 15.0
"""How late a busy machine may be. What a test rules out takes for ever, or until a grant of minutes ends."""
LEASE = "lease-1"
GRANTS = f"grants/{LEASE}/0.json"
KILLERS = ("--kill", "family", "--kill", "provider-limit:test")


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
        options = options if "--kill" in options else (*KILLERS, *options)
        place = str(self.store) if store is None else store
        arguments = ["--store", place, "--lease", LEASE, "--rank", "0", "--first-grant", str(first_grant)]
        arguments += ["--period", "0.1", "--mark", self.mark, "--node-dir", str(self.dir), *options, "--", *command]
        self.started = guard.boottime()
        self.process = subprocess.Popen(
            [python, "-I", "-S", guard.__file__, *arguments], stderr=self.log, env={**os.environ, **(env or {})}
        )

    def alive(self) -> set[guard.Identity]:
        self.process.poll()
        return guard.family(self.mark)

    def pid_of(self, name: str) -> int:
        """guard: deadline.json, fuse: fuse.json, command: command.json; waits until that one is alive."""

        def recorded() -> int:
            self.process.poll()
            facts = guard.read_json(str(self.dir / f"{name}.json"))
            return facts["pid"] if facts and guard.alive((facts["pid"], facts["start"])) else 0

        return int(until(recorded))

    def request(self) -> dict[str, Any]:
        return guard.read_json(str(self.store / f"guard/{LEASE}/0/request.json"))

    def number_after(self, number: int) -> int:
        """Of a request by the next guard, which begins with the clock's milliseconds; the one before counted by one."""
        return int(until(lambda: (seen := self.request().get("number", 0)) > number + 100 and seen))

    def grant(self, seconds: float, *, epoch: int = 1, number: int | None = None) -> int:
        """Answer the newest request as a supervisor does."""
        number = until(self.request)["number"] if number is None else number
        self.store.joinpath(GRANTS).parent.mkdir(parents=True, exist_ok=True)
        guard.write_json(str(self.store / GRANTS), {"epoch": epoch, "number": number, "duration_seconds": seconds})
        return number

    def deadline(self) -> float:
        """Seconds from the start of the node."""
        return float(guard.read_json(str(self.dir / "deadline.json"))["deadline"]) - self.started

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
        while guard.kill_family(each.mark):
            each.process.poll()
        each.log.close()

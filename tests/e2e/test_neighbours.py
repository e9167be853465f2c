"""Two runs and somebody else's Ray cluster on one machine: none of them notices the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SLM = Path(sys.executable).with_name("slm")
FOREIGN = """
import os, sys, time, ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)

@ray.remote
class Counter:
    def __init__(self): self.value = 0
    def add(self): self.value += 1; return self.value, os.getpid()

counter = Counter.remote()
for line in sys.stdin:
    print(*ray.get(counter.add.remote()), flush=True)
"""
SHORT = (
    *("--backend", "local", "--yes", "--set", "training.num_steps=60", "--set", "training.eval_every_steps=60"),
    *("--set", "data.max_bytes=1000000", "--set", "data.tokenizer_sample_bytes=300000"),
)


class Neighbour:
    """Somebody's Ray cluster, started as people start it, with an actor that must not forget."""

    def __init__(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLM_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FOREIGN],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self) -> tuple[int, int]:
        """The actor's counter and its pid."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        value, pid = self.process.stdout.readline().split()
        return int(value), int(pid)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    neighbour = Neighbour()
    yield neighbour
    neighbour.close()


@pytest.fixture
def homes() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="slm-a-") as first, tempfile.TemporaryDirectory(prefix="slm-b-") as second:
        yield Path(first), Path(second)


def slm(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SLM), *arguments],
        env={**os.environ, "SLM_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def only_run(home: Path) -> dict[str, Any]:
    return dict(json.loads(slm(home, "status", "--json").stdout)["runs"][0])


@pytest.mark.e2e
@pytest.mark.ray
def test_a_foreign_ray_cluster_and_a_second_slm_stay_untouched(neighbour: Neighbour, homes: tuple[Path, Path]) -> None:
    before = neighbour.ask()
    detached = slm(homes[1], "launch", "demo", *SHORT, "--market", "calm", "--detach")
    assert detached.returncode == 0, detached.stderr
    # Nodes of the first run are taken again and again, at about one a minute here.
    attacked = slm(homes[0], "launch", "demo", *SHORT, "--market", "hazard:0.5", "--time-scale", "120")
    assert attacked.returncode == 0, attacked.stderr
    assert only_run(homes[0])["state"] == "SUCCEEDED", attacked.stdout
    deadline = time.monotonic() + 300
    while only_run(homes[1])["state"] not in ("SUCCEEDED", "FAILED") and time.monotonic() < deadline:
        time.sleep(1.0)
    calm = only_run(homes[1])
    assert (calm["state"], calm["num_preemptions"], calm["num_failures"]) == ("SUCCEEDED", 0, 0)
    after = neighbour.ask()
    assert after == (before[0] + 1, before[1]), "the neighbour's actor is another one now"

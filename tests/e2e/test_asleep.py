"""A supervisor in the background that stands still longer than a grant, as one does on a laptop that sleeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.registry import local_markets
from orchestrator.settings import Home

SLM = Path(sys.executable).with_name("slm")
LEASE_SECONDS = 10
WORDS = (
    *("--backend", "local", "--yes", "--market", "calm", "--set", f"local.lease_seconds={LEASE_SECONDS}"),
    *("--set", "training.num_steps=400", "--set", "training.eval_every_steps=400"),
    *("--set", "data.max_bytes=1000000", "--set", "data.tokenizer_sample_bytes=300000"),
)
LONGEST_SECONDS = 240.0


def slm(home: Home, *words: str) -> str:
    environment = {**os.environ, "SLM_HOME": str(home.root)}
    done = subprocess.run([str(SLM), *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_of(home: Home) -> dict[str, Any]:
    return dict(json.loads(slm(home, "status", "--json"))["runs"][0])


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.5)


def alive(home: Home) -> int:
    return sum(len(market.list_alive()) for market in local_markets(home))


@pytest.mark.e2e
@pytest.mark.ray
def test_nodes_end_while_the_supervisor_sleeps_and_the_run_goes_on_when_it_wakes(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    started = json.loads(slm(home, "launch", "demo", *WORDS, "--detach", "--json"))
    pid, run_id = int(started["pid"]), str(started["run_id"])
    assert os.getsid(pid) == pid, "a session of its own survives the terminal"
    until(lambda: (run_of(home)["step"] or 0) >= 1, "it trains")
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: alive(home) == 0, "its nodes have ended by themselves")
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: run_of(home)["state"] in ("SUCCEEDED", "FAILED", "STOPPED", "OUT_OF_BUDGET"), "it has ended")
    done = run_of(home)
    assert done["state"] == "SUCCEEDED", Path(started["log"]).read_text(encoding="utf-8")[-2000:]
    assert float(done["spent_usd"]) <= float(done["cap_usd"])
    leases = json.loads(slm(home, "ledger", run_id, "--json"))["leases"]
    assert len(leases) >= 2, "it was rented again"

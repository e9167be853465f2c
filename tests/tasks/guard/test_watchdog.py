"""Guard and watchdog replace each other when killed or stopped, and the watchdog ends what a hung guard leaves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tasks.guard.clock import boottime
from tasks.guard.decision import WATCHDOG_MARGIN_SECONDS
from tasks.guard.files import read_json
from tasks.guard.processes import start_time
from tests.support.guarded import (
    SLACK_SECONDS,
    SLEEPER,
    Node,
    guard_command,
    node,
    until,
)

__all__ = ["node"]


def test_a_killed_watchdog_is_restarted(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=30.0)
    first = kept.pid_of("watchdog")
    os.kill(first, signal.SIGKILL)
    until(lambda: kept.pid_of("watchdog") != first)
    until(lambda: "watchdog restarted" in kept.events())


def test_the_watchdog_ends_the_node_of_a_stopped_guard(node: Callable[..., Node]) -> None:
    hung = node(SLEEPER, first_grant=2.0)
    assert hung.pid_of("command") != hung.pid_of("watchdog")
    os.kill(hung.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: not hung.alive())
    assert boottime() - hung.started < 2.0 + WATCHDOG_MARGIN_SECONDS + SLACK_SECONDS


def test_a_stopped_guard_is_replaced_and_the_command_lives_on(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    command, first = kept.pid_of("command"), kept.pid_of("deadline")
    kept.pid_of("watchdog")
    kept.grant(50.0, fencing_token=2)
    until(lambda: read_json(str(kept.dir / "deadline.json"))["fencing_token"] == 2)
    os.kill(first, signal.SIGSTOP)
    asked = kept.request()["number"]
    until(lambda: kept.pid_of("deadline") != first, seconds=30.0)
    kept.process.wait()  # it was ended, so that it cannot come back and hold the node to an old deadline
    assert kept.pid_of("command") == command
    assert kept.deadline() < 60.0
    number = kept.grant(40.0, fencing_token=2, number=kept.number_after(asked))
    until(lambda: guard_command("status", kept.dir)[1]["accepted"] == number)


def test_a_stopped_watchdog_is_replaced(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    first = kept.pid_of("watchdog")
    until(lambda: (kept.dir / "watchdog.beat").exists())
    os.kill(first, signal.SIGSTOP)
    until(lambda: kept.pid_of("watchdog") != first, seconds=30.0)
    assert start_time(first) is None
    until(lambda: "watchdog hangs" in kept.events())
    os.kill(kept.pid_of("deadline"), signal.SIGKILL)  # the new watchdog does what the old one did
    kept.process.wait()
    kept.pid_of("deadline")


def test_the_watchdog_fires_where_a_guard_hangs_while_firing(node: Callable[..., Node], tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    words = ("--terminator", f"command:echo one >> {fired}; sleep 600", "--escalate", "600", "--allow-unguarded")
    stuck = node(SLEEPER, *words, first_grant=1.5)
    until(lambda: fired.exists() and fired.read_text() == "one\n")
    os.kill(stuck.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: fired.read_text() == "one\none\n")
    assert (stuck.dir / "watchdog.jsonl").exists()


def test_the_watchdog_fires_the_guard_s_own_terminators(node: Callable[..., Node], tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    words = ("--terminator", f"command:echo by watchdog >> {fired}", "--terminator", "family", "--escalate", "0.3")
    hung = node(SLEEPER, *words, first_grant=2.5)
    hung.pid_of("watchdog")
    os.kill(hung.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: fired.exists())
    noted = until(lambda: [json.loads(line) for line in (hung.dir / "watchdog.jsonl").read_text().splitlines()])
    assert noted[0]["event"] == "terminator fired"
    assert noted[0]["boottime"] - hung.started >= 2.5 + WATCHDOG_MARGIN_SECONDS

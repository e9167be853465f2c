"""Terminators one after the other, and the refusal to start with too few."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.guard.agent import UNGUARDED_EXIT_CODE
from tasks.guard.command_line import parse
from tasks.guard.processes import start_time
from tasks.guard.terminator import PROVIDER, Terminator
from tasks.guard.terminators import unarmed
from tests.support.guarded import (
    GUARD_OPTIONS,
    SLEEPER,
    TERMINATORS,
    Node,
    node,
    system_of,
    until,
)
from tests.support.small_server import small_server

__all__ = ["node"]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="powering off is for root")


def test_a_provider_that_does_not_answer_is_not_armed() -> None:
    slow = Terminator("slow", PROVIDER, lambda: "", lambda: time.sleep(60))
    assert unarmed([slow], seconds=0.1) == {"slow": "no answer within 0 s"}


@as_root
def test_the_end_of_the_processes_is_followed_by_a_power_off(node: Callable[..., Node], tmp_path: Path) -> None:
    env, calls = system_of(tmp_path)
    words = ("--terminator", "family", "--terminator", "poweroff:systemctl", "--escalate", "0.5")
    real = node(SLEEPER, *words, first_grant=2.0, env=env)
    command = real.pid_of("command")
    until(lambda: calls.read_text().count("systemctl poweroff") >= 2)  # again, while the node lives
    assert start_time(command) is None
    line = next(line for line in until(lambda: results(real)) if line["terminator"] == "poweroff:systemctl")
    assert (line["ok"], line["result"]) == (True, "exit code 0")


def results(node: Node) -> list[dict[str, Any]]:
    return [line for line in node.log_lines() if line["event"] == "terminator result"]


def test_the_next_terminator_fires_where_one_fails_or_leaves_the_node_alive(
    node: Callable[..., Node], tmp_path: Path
) -> None:
    fired = tmp_path / "fired"
    terminators = [
        f"command:echo broken >> {fired}; echo no such thing; exit 3",
        f"command:echo hangs >> {fired}; sleep 600",
        f"command:echo useless >> {fired}",
    ]
    words = [word for each in terminators for word in ("--terminator", each)]
    tough = node(SLEEPER, *words, "--escalate", "3", "--allow-unguarded", first_grant=1.5)
    rounds = until(lambda: fired.exists() and (lines := fired.read_text().split()) and len(lines) >= 4 and lines)
    assert rounds[:4] == ["broken", "hangs", "useless", "broken"]
    told = until(lambda: len(results(tough)) >= 2 and tough.log_lines())
    kills = [line for line in told if line["event"] == "terminator fired"]
    assert [line["terminator"].split()[1] for line in kills[:3]] == ["broken", "hangs", "useless"]
    assert kills[1]["boottime"] - kills[0]["boottime"] < 3.0  # a failure is not waited out
    assert kills[2]["boottime"] - kills[1]["boottime"] >= 3.0
    broken = results(tough)[0]
    assert (broken["ok"], broken["result"]) == (False, "/bin/sh exited with 3: no such thing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--terminator", "family"), "1 would work here (family)"),
        (("--terminator", "family", "--terminator", "vast"), "Not armed: vast: CONTAINER_ID is not in the environment"),
        (("--terminator", "provider-limit:a", "--terminator", "provider-limit:b"), "1 would work here"),
    ],
)
def test_a_node_with_terminators_of_one_kind_does_not_start(
    node: Callable[..., Node], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    begun = tmp_path / "begun"
    bare = node(["touch", str(begun)], *words, first_grant=30.0)
    assert bare.process.wait(timeout=30) == UNGUARDED_EXIT_CODE
    assert said in bare.said()
    assert "--allow-unguarded" in bare.said()
    assert not begun.exists()
    assert not (bare.dir / "deadline.json").exists()  # the next attempt is judged anew
    assert bare.events() == ["refused"]


def test_allow_unguarded_starts_a_node_with_terminators_of_one_kind(node: Callable[..., Node]) -> None:
    bare = node(SLEEPER, "--terminator", "family", "--allow-unguarded", first_grant=30.0)
    bare.pid_of("command")
    armed = until(bare.log_lines)[0]
    assert (armed["event"], armed["terminators"], armed["kinds"]) == ("armed", ["family"], ["process"])


def test_a_restarted_guard_does_not_refuse(node: Callable[..., Node], tmp_path: Path) -> None:
    """What armed it may be out of reach by then, and a node without a guard is worse."""
    gate = tmp_path / "gate"
    gate.touch()
    with small_server({"POST /graphql": {"data": {"pod": {"id": "p"}}}}) as server:
        env = {"RUNPOD_POD_ID": "p", "RUNPOD_API_KEY": "k"}
        words = ("--terminator", "family", "--terminator", f"runpod:{server.url}/graphql")
        kept = node(SLEEPER, *words, first_grant=30.0, env=env)
        first = kept.pid_of("deadline")
    os.kill(first, signal.SIGKILL)
    kept.process.wait()
    assert until(lambda: kept.pid_of("deadline")) != first


@pytest.mark.parametrize("word", ["shoot", "poweroff:halt", "provider-limit", "command"])
def test_a_terminator_must_exist(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*GUARD_OPTIONS, "--terminator", word, "--", "true"])
    assert f"no terminator is called '{word}'; there are family, poweroff" in capsys.readouterr().err


def test_the_local_market_arms_what_a_test_node_arms() -> None:
    from orchestrator.backends.local import spawn

    assert [kind.partition(":")[0] for kind in spawn.TERMINATORS] == [
        word.partition(":")[0] for word in TERMINATORS[1::2]
    ]

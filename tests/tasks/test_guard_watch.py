"""Who answers a node by ssh, and how guard and fuse stand in for one another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import guard
from tasks.guard import Answer, Pulse
from tests.support.guarded import PYTHON, SLEEPER, Node, node, until

__all__ = ["node"]


def guard_command(verb: str, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """`guard.py VERB`, as a supervisor runs it over ssh."""
    line = [PYTHON, "-I", "-S", guard.__file__, verb, "--node-dir", str(folder), *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout)


def answer(number: int, duration: float, epoch: int) -> tuple[str, ...]:
    return ("--number", str(number), "--duration", str(duration), "--epoch", str(epoch))


# -- the command line ------------------------------------------------------------------------------


def test_a_node_without_a_store_is_kept_alive_by_command(node: Callable[..., Node], tmp_path: Path) -> None:
    kept = node(SLEEPER, first_grant=30.0, store="")
    kept.pid_of("command")
    code, facts = until(lambda: (found := guard_command("status", kept.dir)) and found[1].get("request") and found)
    assert code == 0
    assert 0 < facts["deadline_in_seconds"] <= 30.0
    assert facts["killers"] == ["family", "provider-limit:test"]
    assert facts["guard_alive"] and facts["fuse_alive"] and not facts["ending"]
    number, moment = facts["request"]["number"], facts["request"]["boottime"]
    code, told = guard_command("renew", kept.dir, *answer(number, 600.0, 4))
    assert (code, told["accepted"], told["reason"]) == (0, True, "")
    assert kept.deadline() + kept.started == pytest.approx(moment + 600.0)  # from the request, not from the answer
    assert guard_command("status", kept.dir)[1]["epoch"] == 4


def test_answers_by_command_are_held_to_the_rules_of_the_store(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    kept.pid_of("command")
    first = kept.grant(50.0, epoch=3)
    until(lambda: guard_command("status", kept.dir)[1]["epoch"] == 3)
    newer = until(lambda: (seen := kept.request()["number"]) > first and seen)
    assert guard_command("renew", kept.dir, *answer(newer, 600.0, 2)) == (1, told_off(kept, "a newer supervisor"))
    assert guard_command("renew", kept.dir, *answer(newer + 10**6, 600.0, 3))[1]["reason"].startswith(
        f"request {newer + 10**6} was never sent"
    )
    assert kept.deadline() < 60.0
    assert guard_command("renew", kept.dir, *answer(newer, 40.0, 3))[0] == 0
    assert guard_command("renew", kept.dir, *answer(first, 600.0, 3))[1]["reason"] == (
        f"request {newer} was answered already"
    )
    assert guard_command("renew", kept.dir, *answer(newer, float("nan"), 3))[1]["accepted"] is False
    by_store = kept.grant(45.0, epoch=5)  # both ways reach the same guard
    until(lambda: guard_command("status", kept.dir)[1]["epoch"] == 5)
    assert guard_command("status", kept.dir)[1]["accepted"] == by_store
    assert [line["judged"] for line in kept.log_lines() if line["event"] == "answer by command"] == [
        *("ignored", "ignored", "accepted", "ignored")
    ]


def told_off(node: Node, beginning: str) -> dict[str, Any]:
    """The refusal that begins so, whatever is left by then."""

    class Refusal(dict[str, Any]):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, dict) and not other["accepted"] and other["reason"].startswith(beginning)

        __hash__ = None  # type: ignore[assignment]

    return Refusal()


def test_a_command_may_end_a_node_at_once(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    kept.pid_of("command")
    number = until(lambda: kept.request().get("number"))
    guard_command("renew", kept.dir, *answer(number, 0.0, 1))
    until(lambda: not kept.alive())
    code, told = guard_command("renew", kept.dir, *answer(number, 60.0, 1))
    assert (code, told) == (1, {"accepted": False, "reason": f"no guard runs in {kept.dir}"})


def test_a_folder_that_no_guard_has_seen_is_said(tmp_path: Path) -> None:
    assert guard_command("status", tmp_path) == (1, {"error": f"no guard has run in {tmp_path}"})


def test_a_store_that_hangs_does_not_keep_a_command_from_answering(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "store" / "grants" / "lease-1").mkdir(parents=True)
    os.mkfifo(tmp_path / "store" / "grants" / "lease-1" / "0.json")  # whoever opens it to read waits for ever
    stuck = node(SLEEPER, first_grant=30.0)
    stuck.pid_of("command")
    first = until(lambda: guard_command("status", stuck.dir)[1].get("request", {}).get("number"))
    newer = until(lambda: (seen := guard_command("status", stuck.dir)[1]["request"]["number"]) >= first + 3 and seen)
    assert guard_command("renew", stuck.dir, *answer(newer, 90.0, 1))[0] == 0


# -- what stands still -----------------------------------------------------------------------------


def test_a_pulse_is_lost_only_by_standing_still_for_so_many_looks(tmp_path: Path) -> None:
    pulse = Pulse(str(tmp_path / "beat"))
    assert all(pulse.beats() for _ in range(2 * guard.HUNG_TICKS))  # nothing there: nothing to judge by
    guard.beat(pulse.path)
    looks = [pulse.beats() for _ in range(guard.HUNG_TICKS + 1)]
    assert looks == [True] * guard.HUNG_TICKS + [False]
    guard.beat(pulse.path)
    assert pulse.beats()
    pulse.forget()
    assert not Path(pulse.path).exists()


def test_a_stopped_guard_is_replaced_and_the_command_lives_on(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    command, first = kept.pid_of("command"), kept.pid_of("deadline")
    kept.pid_of("fuse")
    kept.grant(50.0, epoch=2)
    until(lambda: guard.read_json(str(kept.dir / "deadline.json"))["epoch"] == 2)
    os.kill(first, signal.SIGSTOP)
    asked = kept.request()["number"]
    until(lambda: kept.pid_of("deadline") != first, seconds=30.0)
    kept.process.wait()  # it was ended, so that it cannot come back and hold the node to an old deadline
    assert kept.pid_of("command") == command
    assert kept.deadline() < 60.0
    number = kept.grant(40.0, epoch=2, number=kept.number_after(asked))
    until(lambda: guard_command("status", kept.dir)[1]["accepted"] == number)


def test_a_stopped_fuse_is_replaced(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    first = kept.pid_of("fuse")
    until(lambda: (kept.dir / "fuse.beat").exists())
    os.kill(first, signal.SIGSTOP)
    until(lambda: kept.pid_of("fuse") != first, seconds=30.0)
    assert guard.start_time(first) is None
    until(lambda: "fuse hangs" in kept.events())
    os.kill(kept.pid_of("deadline"), signal.SIGKILL)  # the new fuse does what the old one did
    kept.process.wait()
    kept.pid_of("deadline")


def test_why_an_answer_was_ignored_is_told_in_words() -> None:
    state = {"epoch": 2, "accepted": 7, "ending": False}
    asked = {"number": 9}
    assert guard.why_ignored(Answer(1, 8, 1.0), state, asked) == "a newer supervisor, epoch 2, has answered this node"
    assert guard.why_ignored(Answer(2, 6, 1.0), state, asked) == "request 7 was answered already"
    assert guard.why_ignored(Answer(2, 8, 1.0), {**state, "ending": True}, asked) == "the node is ending"
    assert guard.why_ignored(Answer(2, 12, 1.0), state, asked).endswith("the newest is 9")

"""The command line: what it refuses, and `status` and `renew` as a supervisor runs them over ssh."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.guard.command_line import add_guard_options, parse
from tests.support.guarded import (
    SLEEPER,
    Node,
    guard_command,
    node,
    until,
)

__all__ = ["node"]


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        parse(["--store", "s", "--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d"])
    assert "a command must follow after --" in capsys.readouterr().err


def test_a_source_of_notices_must_exist(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d"]
    with pytest.raises(SystemExit):
        parse([*words, "--notice", "oracle", "--", "true"])
    assert "there are aws, gcp, azure and url:URL" in capsys.readouterr().err


def test_credentials_cannot_be_given_on_the_command_line() -> None:
    options = {action.dest for action in guard_parser_actions()}
    assert {"credentials", "region"} <= options
    assert not {name for name in options if "secret" in name or "access_key" in name or "token" in name}


def guard_parser_actions() -> list[Any]:
    import argparse

    parser = argparse.ArgumentParser()
    add_guard_options(parser)
    return parser._actions


def answer(number: int, duration: float, fencing_token: int) -> tuple[str, ...]:
    return ("--number", str(number), "--duration", str(duration), "--fencing-token", str(fencing_token))


def test_a_node_without_a_store_is_kept_alive_by_command(node: Callable[..., Node], tmp_path: Path) -> None:
    kept = node(SLEEPER, first_grant=30.0, store="")
    kept.pid_of("command")
    code, facts = until(lambda: (found := guard_command("status", kept.dir)) and found[1].get("request") and found)
    assert code == 0
    assert 0 < facts["deadline_in_seconds"] <= 30.0
    assert facts["terminators"] == ["family", "provider-limit:test"]
    assert facts["guard_alive"] and facts["watchdog_alive"] and not facts["ending"]
    number, moment = facts["request"]["number"], facts["request"]["boottime"]
    code, told = guard_command("renew", kept.dir, *answer(number, 600.0, 4))
    assert (code, told["accepted"], told["reason"]) == (0, True, "")
    assert kept.deadline() + kept.started == pytest.approx(moment + 600.0)  # from the request, not from the answer
    assert guard_command("status", kept.dir)[1]["fencing_token"] == 4


def test_answers_by_command_are_held_to_the_rules_of_the_store(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=60.0)
    kept.pid_of("command")
    first = kept.grant(50.0, fencing_token=3)
    until(lambda: guard_command("status", kept.dir)[1]["fencing_token"] == 3)
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
    by_store = kept.grant(45.0, fencing_token=5)  # both ways reach the same guard
    until(lambda: guard_command("status", kept.dir)[1]["fencing_token"] == 5)
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

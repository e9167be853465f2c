"""Powering the node off."""

from __future__ import annotations

import os

import pytest

from tasks.guard.command_line import parse
from tasks.guard.terminator import POWER_OFF
from tasks.guard.terminators import named_terminators, unarmed
from tests.support.guarded import (
    GUARD_OPTIONS,
    terminator_named,
)


def test_poweroff_escalates_from_systemd_to_the_kernel() -> None:
    options = parse([*GUARD_OPTIONS, "--terminator", "poweroff", "--", "true"])
    assert [each.name for each in named_terminators(options)] == [
        "poweroff:systemctl",
        "poweroff:shutdown",
        "poweroff:sysrq",
    ]
    assert POWER_OFF["shutdown"] == ["shutdown", "-P", "now"]  # -h may only halt, which goes on being billed


def test_powering_off_is_armed_for_root_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unarmed([terminator_named("poweroff:systemctl")]) == {"poweroff:systemctl": "not root"}

"""The power-off that init carries out at the deadline."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.guard.timer import timer_commands
from tests.support.guarded import (
    SLEEPER,
    Node,
    node,
    system_of,
    until,
)

__all__ = ["node"]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="powering off is for root")


def test_a_timer_in_minutes_never_ends_after_what_is_paid() -> None:
    def command(left: float) -> list[str]:
        return timer_commands("shutdown", "slm-m", 1000.0 + left, 1000.0, [])[0]

    assert command(179.9) == ["shutdown", "-P", "+2"]
    assert command(60.0) == ["shutdown", "-P", "+1"]
    assert command(59.9) == []  # +0 would be now; the one that stands fires


def test_a_timer_of_systemd_is_set_anew_before_the_old_one_goes() -> None:
    new, old = timer_commands("systemd-run", "slm-m", 190.7, 100.0, [12.5])
    assert "--on-active=90s" in new
    assert "--unit=slm-m-190700" in new
    assert new[-2:] == ["systemctl", "poweroff"]
    assert old == [["systemctl", "stop", "slm-m-12500.timer"]]
    again = timer_commands("systemd-run", "slm-m", 250.0, 110.0, [12.5, 190.7])[1]
    assert [words[-1] for words in again] == ["slm-m-12500.timer", "slm-m-190700.timer"]


def seconds_of(calls: Path) -> list[int]:
    """Of each timer that systemd was asked for."""
    return [int(part.split("s ")[0]) for part in calls.read_text().split("--on-active=")[1:]]


@as_root
def test_init_ends_the_node_at_a_time_that_moves_with_the_grants(node: Callable[..., Node], tmp_path: Path) -> None:
    env, calls = system_of(tmp_path)
    paid = node(SLEEPER, "--terminator", "family", "--timer", "systemd-run", first_grant=40.5, env=env)
    paid.pid_of("command")
    assert seconds_of(calls)[0] in range(20, 41)
    unit = calls.read_text().split("--unit=")[1].split()[0]
    paid.grant(300.0)
    until(lambda: f"systemctl stop {unit}.timer" in calls.read_text())
    assert seconds_of(calls)[1] in range(270, 301)
    second = calls.read_text().splitlines()[1].split("--unit=")[1].split()[0]
    os.kill(paid.pid_of("deadline"), signal.SIGKILL)  # the next guard knows which timer stands
    paid.process.wait()
    paid.grant(500.0, number=paid.number_after(paid.request()["number"]))
    until(lambda: f"systemctl stop {second}.timer" in calls.read_text())

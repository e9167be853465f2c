"""Billed time counts what a sleeping laptop does not see, and trusts no clock that was set back."""

from __future__ import annotations

import time

import pytest

from orchestrator.clock import SystemClock, start_ms


def test_time_begins_at_the_wall_clock_or_after_all_that_may_have_lived() -> None:
    assert start_ms(1000, 900, 5000) == 1000
    assert start_ms(800, 900, 5000) == 5000
    assert start_ms(800, 900, 850) == 900
    assert start_ms(800, 900) == 900


def test_a_laptop_that_slept_has_let_billed_time_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    counts_sleep = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    now = [50.0]
    monkeypatch.setattr(time, "clock_gettime", lambda which: now[0] if which == counts_sleep else 0.0)
    clock = SystemClock(origin_ms=0)
    before = clock.now_ms()
    now[0] += 3600.0
    assert (clock.now_ms() - before, clock.real_seconds()) == (3_600_000, 3650.0)

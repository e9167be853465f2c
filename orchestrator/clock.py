"""Two clocks: real seconds, for timeouts and grants, and billed time, for money and markets.

On a real cloud they are the same. The local cloud lets `scale` billed seconds pass in each real one. While a
supervisor lives, both follow the monotonic clock, so that a wall clock that jumps changes nothing; across restarts
billed time never goes back behind `floor_ms`, the newest moment in the ledger.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Time as an argument."""

    scale: float

    def now_ms(self) -> int:
        """Billed milliseconds since the Unix epoch."""
        ...

    def real_seconds(self) -> float:
        """Monotonic real seconds from an arbitrary start."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait real seconds."""
        ...


class SystemClock:
    """Billed time that started at `origin_ms` and runs `scale` times as fast as the wall clock.

    `went_back_ms` tells how far the wall clock stands before the newest moment in the ledger (0 when it does not). Then
    nobody knows how much time has passed, and it goes on from `last_moment_ms`, up to which all that lived is paid for.
    """

    def __init__(
        self, *, origin_ms: int, scale: float = 1.0, floor_ms: int = 0, last_moment_ms: int | None = None
    ) -> None:
        self.scale = scale
        self._started = seconds_since_boot()
        wall_ms = origin_ms + (time.time() * 1000 - origin_ms) * scale
        self.went_back_ms = max(0, int(floor_ms - wall_ms))
        self._start_ms = float(start_ms(int(wall_ms), floor_ms, last_moment_ms))

    def now_ms(self) -> int:
        return int(self._start_ms + (seconds_since_boot() - self._started) * 1000 * self.scale)

    def real_seconds(self) -> float:
        return seconds_since_boot()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class ManualClock:
    """A clock that moves only when told, or when somebody sleeps on it: for tests and simulations."""

    def __init__(self, *, now_ms: int = 1_800_000_000_000, scale: float = 1.0) -> None:
        self.scale = scale
        self._now_ms = float(now_ms)
        self._real = 0.0

    def now_ms(self) -> int:
        return int(self._now_ms)

    def real_seconds(self) -> float:
        return self._real

    def sleep(self, seconds: float) -> None:
        self._real += seconds
        self._now_ms += seconds * 1000 * self.scale


def start_ms(wall_ms: int, floor_ms: int, last_moment_ms: int | None = None) -> int:
    """Where billed time begins: at the wall clock, unless the ledger shows that it was set back."""
    if wall_ms >= floor_ms:
        return wall_ms
    return max(floor_ms, last_moment_ms or 0)


def seconds_since_boot() -> float:
    """Monotonic seconds that also pass while a laptop sleeps, as they do for the nodes and their bill.

    `time.monotonic` stands still in suspend on both systems: a lease would outlive what the ledger counts.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def wall_ms() -> int:
    """Unix time now, in milliseconds."""
    return int(time.time() * 1000)


def utc(ms: int) -> datetime:
    """Milliseconds since the Unix epoch as an aware datetime."""
    return datetime.fromtimestamp(ms / 1000, tz=UTC)

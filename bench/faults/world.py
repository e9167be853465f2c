"""True time as a queue of events, and the supervisor's imperfect view of it.

Whoever sleeps or calls lets true time pass, and with it run the events that are due: nodes live and die, networks come
and go, and a supervisor is killed by an exception out of its own wait. `trap` does so at the boundary of a named call.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

ORIGIN_MS = 1_800_000_000_000
CALL_SECONDS = (0.02, 0.2)
"""How long a call of the supervisor takes when nothing is wrong."""


class Killed(BaseException):
    """The supervisor's process ends here."""


@dataclass(slots=True)
class World:
    """True seconds since the start, and everything that will happen."""

    rng: random.Random
    t: float = 0.0
    traps: dict[str, Callable[[], None]] = field(default_factory=dict)
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (max(when, self.t), self._count, act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self.at(self.t + seconds, act)

    def advance(self, seconds: float) -> None:
        """Let true time pass. May be called from within an event: the outer wait then ends no earlier."""
        until = self.t + seconds
        while self._agenda and self._agenda[0][0] <= until:
            when, _, act = heapq.heappop(self._agenda)
            self.t = max(self.t, when)
            act()
        self.t = max(self.t, until)

    def boundary(self, name: str) -> None:
        """A moment between two instructions of the supervisor at which it may be killed or held up."""
        trap = self.traps.pop(name, None)
        if trap is not None:
            trap()

    def call(self, extra_seconds: float = 0.0) -> None:
        self.advance(self.rng.uniform(*CALL_SECONDS) + extra_seconds)


class SkewedClock:
    """A supervisor's clock: as wrong as the wall clock was when the process began, then steady."""

    def __init__(self, world: World, start_ms: int) -> None:
        self.scale = 1.0
        self._world = world
        self._since = world.t
        self._start_ms = start_ms

    def now_ms(self) -> int:
        return self._start_ms + int((self._world.t - self._since) * 1000)

    def real_seconds(self) -> float:
        return self._world.t

    def sleep(self, seconds: float) -> None:
        self._world.advance(seconds)

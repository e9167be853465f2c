"""A power-off at the deadline that the node's init carries out, even when guard and watchdog are dead."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Callable, List, Sequence, Tuple

from .clock import boottime
from .files import read_json, write_json
from .terminator import run_words


class PowerOffTimer:
    """A power-off at the deadline, carried out by init and moved with every deadline."""

    def __init__(self, means: str, mark: str, path: str, log: Callable[..., None]) -> None:
        self.means, self.path, self.log = means, path, log
        self.name = "slm-" + "".join(letter if letter.isalnum() else "-" for letter in mark)
        self.standing: List[float] = read_json(path).get("deadlines", [])
        self.target = self.standing[-1] if self.standing else 0.0
        self.moved = threading.Event()

    def arm(self, deadline: float) -> None:
        """Set the timer and wait until it is set; raises OSError."""
        if os.geteuid() != 0:
            raise OSError("not root")
        new, old = timer_commands(self.means, self.name, deadline, boottime(), self.standing)
        if not new:
            raise OSError("less than a minute is left, and shutdown counts in minutes")
        self._remember([*self.standing, deadline])  # first: a timer that is not recorded would fire too early
        run_words(new)
        for words in old:
            try:
                run_words(words)
            except OSError as error:  # it may be gone already
                self.log("timer not removed", error=str(error))
        self._remember([deadline])

    def _remember(self, deadlines: List[float]) -> None:
        self.standing = deadlines
        with contextlib.suppress(OSError):  # a full disk
            write_json(self.path, {"deadlines": deadlines})

    def move(self, deadline: float) -> None:
        """Ask the timer's own thread to set it."""
        self.target = deadline
        self.moved.set()

    def run(self) -> None:
        """The timer's own thread."""
        while True:
            self.moved.wait()
            self.moved.clear()
            target = self.target
            if self.standing[-1:] == [target]:
                continue
            try:
                self.arm(target)
            except Exception as error:  # the timer that is set fires early, which is the safe side
                self.log("timer not moved", error=str(error))


def timer_commands(
    means: str, name: str, deadline: float, now: float, standing: Sequence[float]
) -> Tuple[List[str], List[List[str]]]:
    """The command that sets a power-off at the deadline or shortly before, and those that then remove older ones.

    `shutdown` counts in minutes, rounded down so that no unpaid time is used. With less than a minute left there is no
    command, and the timer that is set stays. A second `shutdown` replaces the first.
    """
    left = deadline - now
    if means == "shutdown":
        return (["shutdown", "-P", f"+{int(left // 60)}"], []) if left >= 60 else ([], [])
    unit = f"--unit={_timer_unit(name, deadline)}"
    new = ["systemd-run", "--quiet", "--collect", unit, f"--on-active={max(0, int(left))}s"]
    new += ["--timer-property=AccuracySec=1s", "systemctl", "poweroff"]
    return new, [["systemctl", "stop", f"{_timer_unit(name, older)}.timer"] for older in standing if older != deadline]


def _timer_unit(name: str, deadline: float) -> str:
    return f"{name}-{int(deadline * 1000)}"

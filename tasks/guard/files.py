"""Files in the node's folder: JSON replaced in one step, records of processes, locks, and heartbeats.

Guard and watchdog each touch a heartbeat file once a tick, by which the other one sees that it still moves.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import Any, Dict, Optional

from .clock import boottime
from .processes import Identity


def write_json(path: str, value: object) -> None:
    """Replace a file in one step."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def read_json(path: str) -> Dict[str, Any]:
    """The object in a file; empty if there is none or it is broken."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def recorded(path: str) -> Optional[Identity]:
    """The process that a file of the node's folder names."""
    facts = read_json(path)
    return (facts["pid"], facts["start"]) if facts.get("pid") and facts.get("start") else None


def hold_lock(path: str) -> Optional[int]:
    """An exclusive lock that lasts as long as this process; None if another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


TICK_SECONDS = 0.2
"""The pause between two looks of guard and watchdog."""
HUNG_TICKS = 25
"""A partner that did not move for so many ticks of the watcher hangs; ticks, so that a suspend is no hang."""
RESTART_SECONDS = 1.0
"""The least time between two attempts to start a dead partner."""
ACTING = "acting"
"""The heartbeat file of a guard that fires the terminators."""


def beat(path: str) -> None:
    """Show that the caller moves. Needs no space on the disk once the file is there."""
    now = boottime()
    with contextlib.suppress(OSError):
        try:
            os.utime(path, (now, now))
        except FileNotFoundError:
            with open(path, "a"):
                pass


class Pulse:
    """Whether the partner behind a heartbeat file still moves, asked once a tick."""

    def __init__(self, path: str) -> None:
        self.path, self.seen, self.still = path, 0, 0

    def beats(self) -> bool:
        try:
            moment = os.stat(self.path).st_mtime_ns
        except OSError:  # not there yet, or a full disk: nothing to judge by
            return True
        self.still = 0 if moment != self.seen else self.still + 1
        self.seen = moment
        return self.still < HUNG_TICKS

    def forget(self) -> None:
        """For a new partner."""
        self.still = 0
        with contextlib.suppress(OSError):
            os.unlink(self.path)

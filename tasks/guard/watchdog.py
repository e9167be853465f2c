"""The second process: replaces a guard that is dead or hangs, and ends the node when the guard does not.

It touches the network only to end the node, and never the store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import time
from typing import Optional, Sequence

from .clock import boottime
from .decision import END_NODE, RESTART, decide_watchdog
from .files import ACTING, RESTART_SECONDS, TICK_SECONDS, Pulse, beat, read_json, recorded, write_json
from .processes import Identity, alive, send, spawn_self, start_time
from .terminators import end_node, named_terminators


def watch_guard(options: argparse.Namespace, guard_options: argparse.Namespace) -> None:
    """Watch the guard until the node ends; never returns."""
    me = {"pid": os.getpid(), "start": start_time(os.getpid())}
    with contextlib.suppress(OSError):  # on a full disk the guard still knows us as its child
        write_json(os.path.join(options.node_dir, "watchdog.json"), me)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path, deadline = os.path.join(options.node_dir, "deadline.json"), options.deadline
    pulse = Pulse(os.path.join(options.node_dir, "guard.beat"))
    guard: Optional[subprocess.Popen[bytes]] = None
    restarted = -math.inf
    while True:
        beat(os.path.join(options.node_dir, "watchdog.beat"))
        deadline = read_json(path).get("deadline", deadline)
        identity = recorded(path)
        guard_alive = alive(identity) or (guard is not None and guard.poll() is None)
        if identity is not None and alive(identity) and not pulse.beats():
            send(identity[0], signal.SIGKILL)  # it hangs; a new guard continues where it was
            guard_alive = False
        action = decide_watchdog(deadline, boottime(), guard_alive)
        if action == END_NODE and not (guard_alive and os.path.exists(os.path.join(options.node_dir, ACTING))):
            _end_node(options, guard_options, [identity] if identity is not None else [], guard)
        if action == RESTART and boottime() > restarted + RESTART_SECONDS:
            restarted = boottime()
            pulse.forget()
            guard = spawn_self(options.command, dict(os.environ))
        time.sleep(TICK_SECONDS)


def _end_node(
    options: argparse.Namespace,
    guard_options: argparse.Namespace,
    first: Sequence[Identity],
    guard: Optional[subprocess.Popen[bytes]],
) -> None:
    """Fire the guard's own terminators; the log of it stays on the node, since only the guard writes to the store."""

    def log(event: str, **facts: object) -> None:
        with contextlib.suppress(OSError), open(os.path.join(options.node_dir, "watchdog.jsonl"), "a") as file:
            file.write(json.dumps({"boottime": boottime(), "event": event, **facts}) + "\n")

    def tick() -> None:
        beat(os.path.join(options.node_dir, "watchdog.beat"))
        if guard is not None:
            guard.poll()

    end_node(named_terminators(guard_options), options.mark, guard_options.escalate, log, (), first, tick)
    os.kill(os.getpid(), signal.SIGKILL)

"""Asks `orchestrator.backends.sky.enabled_clouds_process`, a child process, with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tasks.own_module import own_module

LONGEST_SECONDS = 30.0
LONGEST_REASON = 200
COMMAND = own_module("orchestrator.backends.sky.enabled_clouds_process")


@dataclass(frozen=True, slots=True)
class Enabled:
    """The clouds that SkyPilot has credentials for, or why they are unknown."""

    enabled: tuple[str, ...] = ()
    problem: str | None = None


def enabled_clouds(command: Sequence[str] = COMMAND, *, seconds: float = LONGEST_SECONDS) -> Enabled:
    """The newest result of `sky check`; calls no cloud, and waits no longer than `seconds`."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Enabled(problem=f"did not say within {seconds:.0f} s which clouds it has credentials for")
    if child.returncode != 0:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return Enabled(problem=f"cannot say which clouds it has credentials for: {last[:LONGEST_REASON]}")
    try:
        reply = json.loads(output.decode().strip().splitlines()[-1])
        return Enabled(tuple(reply["enabled"] or ()))
    except (ValueError, LookupError, TypeError):
        return Enabled(problem=f"answered {output[:LONGEST_REASON]!r} when asked for its clouds")

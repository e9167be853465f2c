"""One means of ending the node, and those that need no provider: power-off and shell commands."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence

PROCESS, POWER, SCHEDULE, PROVIDER, COMMAND = "process", "power", "schedule", "provider", "command"
"""Who ends the node: we, by its processes; its kernel; its init, at a set time; the provider; or a shell command."""
FAMILY = "family"
"""The terminator that ends the node's processes."""


@dataclass(frozen=True)
class Terminator:
    """One means of ending the node. `fire` and `check` say what happened in words, or raise.

    Without `fire` it is the provider's own time limit, which is armed elsewhere and only counted here.
    """

    name: str
    kind: str
    fire: Optional[Callable[[], str]] = None
    check: Callable[[], object] = lambda: None


SYSRQ = "/proc/sysrq-trigger"
POWER_OFF: Dict[str, List[str]] = {
    "systemctl": ["systemctl", "poweroff"],
    "shutdown": ["shutdown", "-P", "now"],
    "sysrq": ["/bin/sh", "-c", f"sync & sleep 1; echo o > {SYSRQ}"],
}


def power_off(means: str) -> Terminator:
    """Power the node off by systemd, by `shutdown`, or by the kernel itself; all need root."""

    def check() -> None:
        if os.geteuid() != 0:
            raise OSError("not root")
        if means == "sysrq" and not os.access(SYSRQ, os.W_OK):
            raise OSError(f"{SYSRQ} cannot be written")
        if shutil.which(POWER_OFF[means][0]) is None:
            raise OSError(f"no {means} on this node")

    return Terminator(f"poweroff:{means}", POWER, functools.partial(run_words, POWER_OFF[means]), check)


def run_words(words: Sequence[str]) -> str:
    """Run a command to its end; its output must be short. Raises OSError unless it exits with 0."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    said = " ".join(done.stdout.decode(errors="replace").split())[:300]
    if done.returncode != 0:
        raise OSError(f"{words[0]} exited with {done.returncode}: {said}")
    return f"exit code 0 {said}".strip()

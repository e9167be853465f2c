"""The node's own clock. It counts suspend and ignores wall-clock jumps, so neither moves a deadline."""

from __future__ import annotations

import subprocess
import time


def boottime() -> float:
    """Seconds that also pass in suspend: CLOCK_BOOTTIME on Linux, CLOCK_MONOTONIC on macOS."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def boot_id() -> str:
    """Differs after every boot: boot times of two boots cannot be compared."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()

"""The processes that descend from this one, and a folder that names its owner: what a node must not leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEMP_PREFIX = "slm-ray-"
FAMILY_SECONDS = 1.0
"""How often descendants are recorded."""
TERM_SECONDS = 0.5
"""How long processes have between SIGTERM and SIGKILL: nothing here needs an orderly end."""
KILL_SECONDS = 5.0


class Family:
    """The processes that descend from this one, by pid and start time, so that none is lost when its parent dies."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._next = 0.0

    def remember(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + FAMILY_SECONDS
        self._look()

    def _look(self) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                self._known[process.pid] = process
        for pid in [pid for pid, process in self._known.items() if not process.is_running()]:
            del self._known[pid]

    def end(self) -> None:
        """End them all: asked first, then killed. psutil signals none whose pid was given to another since."""
        import psutil

        until = time.monotonic() + TERM_SECONDS
        signalled: set[int] = set()
        while time.monotonic() < until + KILL_SECONDS:
            self._look()
            reap_children()
            alive = [process for process in self._known.values() if _is_alive(process)]
            if not alive:
                return
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    if time.monotonic() > until:
                        process.kill()
                    elif process.pid not in signalled:
                        process.terminate()
                        signalled.add(process.pid)
            time.sleep(0.05)


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def make_temp_dir() -> Path:
    """A new folder with a short path (a unix socket's path has at most 103 bytes), named for its owner.

    Folders of owners that were killed are removed here; nobody else could.
    """
    import psutil

    for old in Path("/tmp").glob(TEMP_PREFIX + "*.*"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid, start = map(int, old.name.removeprefix(TEMP_PREFIX).split("-")[0].split("."))
            if old.stat().st_uid == os.getuid() and not _is_running(pid, start):
                shutil.rmtree(old, ignore_errors=True)
    start = int(psutil.Process().create_time())
    return Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}.{start}-", dir="/tmp"))


def _is_running(pid: int, start: int) -> bool:
    import psutil

    # The clock may have been set meanwhile: a folder too many is better than one too few.
    return psutil.pid_exists(pid) and abs(psutil.Process(pid).create_time() - start) < 3600


def become_subreaper() -> None:
    """Orphans among our descendants become our children, so that they can be found (Linux)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def reap_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

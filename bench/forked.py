"""Processes forked from this warm one, to be killed: torch and boto3 are imported once, a child starts in milliseconds.

The parent must have started no threads that a child would miss; torch runs on one thread in both.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LINE_SECONDS = 120.0


class Forked:
    """One child, in a session of its own. What it says with `say` comes back line by line."""

    def __init__(self, work: Callable[[Callable[[str], None]], None], log: Path) -> None:
        reading, writing = os.pipe()
        self.log = log
        self.exit_code: int | None = None
        self._pipe = reading
        self._text = b""
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        code = 1
        try:
            os.close(reading)
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work(lambda line: _write_all(writing, f"{line}\n".encode()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def line(self, within_seconds: float = LINE_SECONDS) -> str | None:
        """What it says next; None when it has ended, or says nothing for so long."""
        deadline = time.monotonic() + within_seconds
        while b"\n" not in self._text:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            piece = os.read(self._pipe, 65536)
            if not piece:
                return None
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def kill(self) -> None:
        """SIGKILL; quiet when it has ended already."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, negative for a signal; all that it said before can still be read."""
        if self.exit_code is None:
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def close(self) -> None:
        os.close(self._pipe)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]

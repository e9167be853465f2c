"""Our end of `orchestrator.backends.sky.worker`: one request at a time, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.backends.base import BackendError, NoCapacity
from orchestrator.backends.sky.errors import Trouble
from tasks.own_module import own_module

COMMAND = own_module("orchestrator.backends.sky.worker")
OnEvent = Callable[[Mapping[str, Any]], None]


class SkyRefusal(NoCapacity):
    """Waiting does not help: a quota, credentials or a setting. The message names it and the fix."""

    for_good = True


FIXES: Mapping[Trouble, str] = {
    Trouble.QUOTA: "ask the provider for a higher quota of this machine, or leave it out with --clouds or --gpus",
    Trouble.CREDENTIALS: "find what is missing with: sky check",
    Trouble.SETTING: "check SkyPilot's settings of this cloud (~/.sky/config.yaml), or leave it out with --clouds",
}


class SkyClient:
    """Starts the worker when it is needed, and replaces one that hangs or died."""

    def __init__(self, log: Path, command: Sequence[str] = COMMAND, environment: Mapping[str, str] | None = None):
        self._log = log
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def call(self, name: str, *, seconds: float, on_event: OnEvent = lambda _: None, **arguments: Any) -> Any:
        """The result of one call.

        Raises:
            NoCapacity, SkyRefusal: Nothing was rented.
            BackendError: SkyPilot failed, or did not answer in time; the request may have been executed.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._broken(f"SkyPilot's process ended ({error})") from error
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise self._broken(f"SkyPilot did not answer {name!r} within {seconds:.0f} s") from None
            if line is None:
                raise self._broken("SkyPilot's process ended")
            reply = json.loads(line)
            if "event" in reply:
                on_event(reply)
            elif "failure" in reply:
                raise backend_error(Trouble(reply["failure"]["trouble"]), reply["failure"]["message"])
            else:
                return reply["result"]

    def close(self) -> None:
        """End the worker; SkyPilot's API server keeps running, since others may use it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # the supervisor decides what Ctrl-C does
                env={**os.environ, **self._environment},
            )
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process

    def _broken(self, fact: str) -> BackendError:
        self.close()
        return BackendError(f"{fact}{self._last_words()}; its log is {self._log}")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()[-30:]]
            words = next((line for line in reversed(lines) if line), "")
            return f" after: {words[:200]}" if words else ""
        return ""


def backend_error(trouble: Trouble, message: str) -> BackendError:
    """The error of the backend contract for a failure of SkyPilot."""
    if trouble is Trouble.CAPACITY:
        return NoCapacity(message)
    if trouble in FIXES:
        return SkyRefusal(f"{trouble.value}: {message}; {FIXES[trouble]}.")
    if trouble is Trouble.SERVER:
        return BackendError(f"SkyPilot's API server failed: {message}; see: sky api status")
    return BackendError(message)


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)

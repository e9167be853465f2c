"""Tells a command or a webhook what a person should hear of: warnings, and how a run ends.

A supervisor must never wait for it: messages go through a short queue to a thread, each try has a time limit, and what
cannot be delivered becomes an event of the log. The target may hold a secret, so it lies in a file that only its owner
can read, is never mirrored to the run store, and never stands in an event or a message; only its host, or the name of
the program, does.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cost.errors import UserError
from orchestrator.events import Emit, Event
from orchestrator.runs.records import TERMINAL
from orchestrator.settings import Home

FILE = "notify"
WEB = ("http", "https")
MOST_WAITING = 100
TRIES = 3
PAUSES_SECONDS = (1.0, 4.0)
ANSWER_SECONDS = 10.0
COMMAND_SECONDS = 30.0
DRAIN_SECONDS = 20.0
"""At the end of a supervisor: longest wait for what is still to be told."""
EVENT_VARIABLE = "SLM_EVENT"
VERSION = 2
"""The same as `SCHEMA_VERSION` of `--json` output; a test compares them."""


class NotDelivered(Exception):
    """One try failed. `again`: another may not."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


# ---------------------------------------------------------------- the target


def checked_target(text: str) -> str:
    """The target itself.

    Raises:
        UserError: It is neither a web address nor a program that can be run; without repeating it whole.
    """
    parts = urlsplit(text)
    if parts.scheme in WEB:
        if not parts.hostname:
            raise UserError("the web address of --notify names no host; write https://HOST/PATH.")
        return text
    words = split(text)
    if not words:
        raise UserError("--notify names nothing; give a command or an https:// address.")
    if shutil.which(words[0]) is None:
        raise UserError(
            f"--notify names no program that can be run: {words[0]}; give its path, or an https:// address."
        )
    return text


def split(command: str) -> list[str]:
    """A command's words, as a shell would see them.

    Raises:
        UserError: A quote is not closed.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"the command of --notify cannot be read: {error}.") from error


def shown(target: str) -> str:
    """As much of it as may be told."""
    parts = urlsplit(target)
    return f"{parts.scheme}://{parts.hostname}" if parts.scheme in WEB else Path(split(target)[0]).name


def keep(home: Home, run_id: str, target: str) -> None:
    """Write down whom a run tells, for every supervisor that it will have; an empty target is nobody."""
    folder = home.run_dir(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{FILE}.{os.getpid()}"
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(target)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / FILE)


def kept(home: Home, run_id: str) -> str:
    """Whom the run tells; empty for nobody."""
    try:
        return (home.run_dir(run_id) / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


# ---------------------------------------------------------------- telling


def is_told(event: Event) -> bool:
    """Warnings, and the end of a run."""
    return event.kind == "warning" or (event.kind == "state" and event.data.get("state") in TERMINAL)


@contextmanager
def notified(home: Home, run_id: str, emit: Emit) -> Iterator[Emit]:
    """`emit`, and beside it whom the run tells; at the end waits, bounded, for what is still under way."""
    target = kept(home, run_id)
    if not target:
        yield emit
        return
    notifier = Notifier(target, run_id, emit)
    try:
        yield notifier
    finally:
        notifier.close()


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent: a line for a person, and the same for a program."""

    line: str
    body: str


def message_of(event: Event, run_id: str) -> Message:
    """`text` and `content` are what chat services show of a webhook."""
    line = f"slm {run_id}: {event.message}"
    facts: dict[str, Any] = {
        "version": VERSION,
        "run_id": run_id,
        "kind": event.kind,
        "message": event.message,
        "at": event.at.isoformat(),
        "data": event.data,
        "text": line,
        "content": line,
    }
    return Message(line, json.dumps(facts, default=str))


class Notifier:
    """Hands every event on, and tells the target of some, from a thread of its own."""

    def __init__(
        self,
        target: str,
        run_id: str,
        emit: Emit,
        *,
        pauses_seconds: Sequence[float] = PAUSES_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        command_seconds: float = COMMAND_SECONDS,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self._target = target
        self._run_id = run_id
        self._emit = emit
        self._pauses = tuple(pauses_seconds)
        self._answer_seconds = answer_seconds
        self._command_seconds = command_seconds
        self._drain_seconds = drain_seconds
        self._waiting: queue.Queue[Message | None] = queue.Queue(MOST_WAITING)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._emit(event)
        self._tell_failures()
        if is_told(event):
            self._put(message_of(event, self._run_id))

    def close(self) -> None:
        """Wait for what is under way, at most `drain_seconds`, and say what was not told."""
        until = time.monotonic() + self._drain_seconds
        with suppress(queue.Full):
            self._waiting.put(None, timeout=self._drain_seconds)
        self._thread.join(max(0.0, until - time.monotonic()))
        self._closing.set()
        self._tell_failures()
        if self._thread.is_alive():
            self._emit(self._event(f"{shown(self._target)} was not notified of everything: no time was left"))

    def _put(self, message: Message) -> None:
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._failures.put(f"{MOST_WAITING} messages are waiting already; not sent: {message.line}")

    def _tell_failures(self) -> None:
        """From the supervisor's own thread, since whoever shows events may not be made for two."""
        with suppress(queue.Empty):
            while True:
                self._emit(self._event(self._failures.get_nowait()))

    def _event(self, reason: str) -> Event:
        return Event("notify", reason, datetime.now(UTC))

    # -- in the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._deliver(message)
            except NotDelivered as error:
                self._failures.put(f"{shown(self._target)} could not be notified ({error}): {message.line}")
            except Exception as error:  # whatever it is, a notification ends no run
                self._failures.put(
                    f"{shown(self._target)} could not be notified ({type(error).__name__}): {message.line}"
                )

    def _deliver(self, message: Message) -> None:
        if urlsplit(self._target).scheme not in WEB:
            run_command(split(self._target), message, seconds=self._command_seconds)
            return
        for attempt in range(TRIES):
            try:
                post(self._target, message, seconds=self._answer_seconds)
                return
            except NotDelivered as error:
                if not error.again or attempt + 1 == TRIES or self._closing.is_set():
                    raise
            self._closing.wait(self._pauses[min(attempt, len(self._pauses) - 1)])


def post(url: str, message: Message, *, seconds: float) -> None:
    """POST the JSON.

    Raises:
        NotDelivered: No answer, or one that is no success; only what may pass is worth another try.
    """
    request = urllib.request.Request(
        url, message.body.encode(), {"Content-Type": "application/json", "User-Agent": "slm"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds):
            return
    except urllib.error.HTTPError as error:
        error.close()
        raise NotDelivered(f"status {error.code}", again=error.code >= 500 or error.code in (408, 429)) from None
    except urllib.error.URLError as error:
        reason = error.reason
        raise NotDelivered(str(getattr(reason, "strerror", None) or type(reason).__name__), again=True) from None
    except (OSError, ValueError) as error:
        raise NotDelivered(type(error).__name__, again=isinstance(error, OSError)) from None


def run_command(words: Sequence[str], message: Message, *, seconds: float) -> None:
    """Run it with the line as its last argument and on its input, and the JSON in its environment; once.

    Raises:
        NotDelivered: It cannot be started, fails, or does not end in time; then it is ended with all that it started.
    """
    try:
        child = subprocess.Popen(
            [*words, message.line],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, EVENT_VARIABLE: message.body},
            start_new_session=True,
        )
    except OSError as error:
        raise NotDelivered(error.strerror or "it cannot be started", again=False) from None
    try:
        child.communicate(f"{message.line}\n".encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise NotDelivered(f"it did not end within {seconds:.0f} s", again=False) from None
    if child.returncode != 0:
        raise NotDelivered(f"exit code {child.returncode}", again=False)

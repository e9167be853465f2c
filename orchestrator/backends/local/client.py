"""Sends requests to the market's process, and starts it when it does not run."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from orchestrator.backends.base import BackendError, NoCapacity
from orchestrator.backends.local.records import MarketBroken, State, load_state
from orchestrator.backends.local.server import ADDRESS_FILE
from orchestrator.backends.local.spawn import HOST, clean_environment
from tasks.guard.files import read_json
from tasks.guard.processes import alive
from tasks.own_module import own_module

ANSWER_SECONDS = 5.0
END_ANSWER_SECONDS = 25.0
"""Of requests that wait for nodes to end."""
START_SECONDS = 20.0
LOG_FILE = "market.log"


class MarketClient:
    """One run's market, in `folder`."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder.absolute()
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, **request: object) -> dict[str, Any]:
        """The reply to one request; a market that does not run is started first.

        Raises:
            NoCapacity: It has no nodes to rent.
            BackendError: It refused, or does not answer.
        """
        until = time.monotonic() + START_SECONDS
        while True:
            answer = self._ask(name, request)
            if answer is not None:
                return answer
            if time.monotonic() > until:
                raise BackendError(f"the local cloud does not start: {self._log_tail()}")
            self._launch()

    def written(self) -> State:
        """The market's state as last written, whether or not it runs.

        Raises:
            BackendError: It cannot be read.
        """
        try:
            return load_state(self.folder)
        except MarketBroken as error:
            raise BackendError(str(error)) from error

    def _ask(self, name: str, request: dict[str, object]) -> dict[str, Any] | None:
        """The reply, or None when no market runs."""
        address = read_json(str(self.folder / ADDRESS_FILE))
        if not address or not alive((address["pid"], address["start"])):
            return None
        timeout = END_ANSWER_SECONDS if name in ("start", "stop") else ANSWER_SECONDS
        connection = http.client.HTTPConnection(HOST, address["port"], timeout=timeout)
        try:
            connection.request("POST", f"/{name}", json.dumps(request), {"Authorization": f"Bearer {address['token']}"})
            reply = connection.getresponse()
            status, answer = reply.status, json.loads(reply.read())
        except TimeoutError as error:
            raise BackendError(
                f"the local cloud (pid {address['pid']}) did not answer within {timeout:.0f} s; "
                "if it was stopped by a signal, continue it or kill it, and run the command again."
            ) from error
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return _unwrapped(status, answer)

    def _launch(self) -> None:
        """Start a market unless our last one is still coming up; then give it a moment."""
        if self._process is None or self._process.poll() is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG_FILE).open("ab") as log:
                self._process = subprocess.Popen(
                    own_module("orchestrator.backends.local", "--dir", str(self.folder), python=self._python),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=clean_environment(),
                )
        time.sleep(0.05)

    def _log_tail(self) -> str:
        path = self.folder / LOG_FILE
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return f"{lines[-1] if lines else 'its log is empty'} (see {path})"


def _unwrapped(status: int, answer: dict[str, Any]) -> dict[str, Any] | None:
    if status == 200:
        return answer
    kind, message = answer.get("error"), str(answer.get("message", answer))
    if kind in ("closing", "token"):  # it ends, or a new market has written its address meanwhile
        time.sleep(0.05)
        return None
    raise NoCapacity(message) if kind == "no_capacity" else BackendError(message)

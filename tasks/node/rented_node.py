"""The `rented-node` task: what a node of a real cloud does around `python -m tasks node`.

It brings the spec and the prepared data from the run store, sends the node's log there while training runs, and says
how long each part of the set-up took. Its exit code is the node's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tasks import run_store_keys as keys
from tasks.data.store_data import SetUpError, fetch_data
from tasks.node.environment import NodeEnv, log_line
from tasks.own_module import own_module
from tasks.run_store_keys import EXIT_BROKEN
from tasks.spec import RunSpec
from tasks.stores.opening import open_store
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import Writer, wrap

LOG_SECONDS = 3.0
LONGEST_LOG_BYTES = 2_000_000
"""The end of a longer log is what is kept in the run store."""
SPEC_TRIES = 5


def main(argv: Sequence[str]) -> int:
    """`python -m tasks rented-node`: see the top of this file."""
    argparse.ArgumentParser(prog="python -m tasks rented-node", description="Set up, then be a node.").parse_args(argv)
    env = NodeEnv.from_environ()
    env.node_dir.mkdir(parents=True, exist_ok=True)
    store = open_store(env.store_uri, create=False)
    with LogShipper(store, keys.node_log(env.lease_id, env.rank), env.node_dir / "node.log"):
        try:
            began = time.time()
            spec = spec_of(store, env.lease_id)
            data_dir = fetch_data(store, spec.data_dir, Path(os.environ["SLM_CACHE"]))
            spec.model_copy(update={"data_dir": str(data_dir)}).dump(env.spec_path)
            tell_set_up(store, env, data_seconds=time.time() - began)
        except (SetUpError, StoreError) as error:
            say(str(error))
            return EXIT_BROKEN
        return run_node(own_module("tasks", "node"))


def spec_of(store: Store, lease_id: str) -> RunSpec:
    """What this lease is told; a later attempt's spec is not ours to follow.

    Raises:
        SetUpError: The run has gone on without this lease, or there is no spec.
    """
    for _ in range(SPEC_TRIES):
        try:
            spec = RunSpec.from_bytes(store.read(keys.SPEC))
        except StoreKeyMissing:
            time.sleep(1.0)
            continue
        if spec.lease_id == lease_id:
            return spec
        raise SetUpError(f"the run continues as {spec.lease_id}; this node belongs to {lease_id} and does nothing.")
    raise SetUpError(f"there is no {keys.SPEC} in {store.uri}; the lease has to be started again.")


# -- the node ------------------------------------------------------------------------------------------


def run_node(command: Sequence[str]) -> int:
    """The node as a child; a signal reaches the whole group, and what it means is the child's to decide."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return child.wait()


def tell_set_up(store: Store, env: NodeEnv, *, data_seconds: float) -> None:
    """How long this node took before its first process of ours could start; shown, and believed by later plans."""
    began = float(os.environ.get("SLM_SETUP_BEGAN") or time.time())
    facts = {
        "environment_seconds": float(os.environ.get("SLM_ENVIRONMENT_SECONDS") or 0.0),
        "data_seconds": data_seconds,
        "seconds": time.time() - began,
        "at": time.time(),
        "node_ip": env.node_ip,
    }
    with contextlib.suppress(StoreError):
        store.write(keys.set_up(env.lease_id, env.rank), wrap(facts, Writer.NODE))


class LogShipper:
    """Copies a growing file to a key of the run store, as long as it is entered and once more at the end."""

    def __init__(self, store: Store, key: str, path: Path) -> None:
        self._store, self._key, self._path = store, key, path
        self._sent = -1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="slm-log", daemon=True)

    def __enter__(self) -> LogShipper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(10.0)

    def _work(self) -> None:
        while not self._end.wait(LOG_SECONDS):
            self._send()
        self._send()

    def _send(self) -> None:
        """A log is a help: a store that is away loses nothing but some lines for a while."""
        with contextlib.suppress(OSError, StoreError):
            size = self._path.stat().st_size
            if size == self._sent:
                return
            with self._path.open("rb") as file:
                file.seek(max(0, size - LONGEST_LOG_BYTES))
                self._store.write(self._key, file.read())
            self._sent = size


def say(text: str) -> None:
    sys.stdout.write(log_line(text))
    sys.stdout.flush()

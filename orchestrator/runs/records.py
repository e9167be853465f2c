"""Run records: what was asked, how far it is, and who may act on it.

One run has one supervisor at a time: it holds a file lock that the kernel drops when the process dies, and it raises
the run's fencing token in the ledger, so that a supervisor that lost the run can write nothing more.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path

from cost.errors import SlmError, UserError
from cost.ledger.database import transaction
from cost.ledger.leases import usd
from cost.spelling import did_you_mean
from orchestrator.clock import utc, wall_ms
from orchestrator.runs.options import RunOptions

LOCK_TRIES = 5
LOCK_PAUSE_SECONDS = 0.05


class RunState(StrEnum):
    PLANNED = "PLANNED"
    LAUNCHING = "LAUNCHING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    OUT_OF_BUDGET = "OUT_OF_BUDGET"


TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.OUT_OF_BUDGET})

# Any live state may be found after a crash, so each can be entered again by LAUNCHING or RECOVERING.
MOVES: Mapping[RunState, frozenset[RunState]] = {
    RunState.PLANNED: frozenset({RunState.LAUNCHING, *TERMINAL}),
    RunState.LAUNCHING: frozenset({RunState.RUNNING, RunState.RECOVERING, RunState.STOPPING, *TERMINAL}),
    RunState.RUNNING: frozenset({RunState.RECOVERING, RunState.STOPPING, RunState.LAUNCHING, *TERMINAL}),
    RunState.RECOVERING: frozenset({RunState.RUNNING, RunState.STOPPING, RunState.LAUNCHING, *TERMINAL}),
    RunState.STOPPING: frozenset({RunState.LAUNCHING, *TERMINAL}),
    RunState.FAILED: frozenset({RunState.LAUNCHING}),
    RunState.STOPPED: frozenset({RunState.LAUNCHING}),
    RunState.OUT_OF_BUDGET: frozenset({RunState.LAUNCHING}),
    RunState.SUCCEEDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the ledger. `options` is what the launch was told beside the recipe."""

    run_id: str
    recipe_name: str
    recipe_digest: str
    recipe_json: str
    options: RunOptions
    cap_usd: Decimal
    state: RunState
    reason: str
    fencing_token: int
    stop_requested: bool
    preemptions: int
    failures: int
    created_ms: int
    updated_ms: int

    @property
    def is_finished(self) -> bool:
        return self.state in TERMINAL


class Runs:
    """All runs of one SLM_HOME."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def create(
        self,
        *,
        recipe_name: str,
        recipe_digest: str,
        recipe_json: str,
        options: RunOptions,
        cap_usd: Decimal,
    ) -> Run:
        """Write a new run named after its recipe and a number."""
        now = str(wall_ms())
        with transaction(self.db):
            number = 1 + int(self.db.execute("SELECT COUNT(*) FROM runs").fetchone()[0])
            run_id = f"{recipe_name}-{number}"
            self.db.execute(
                "INSERT INTO runs (run_id, recipe_name, recipe_digest, recipe_json, options_json, cap_micro_usd, "
                "state, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id,
                    recipe_name,
                    recipe_digest,
                    recipe_json,
                    options.to_json(),
                    int(cap_usd * 1_000_000),
                    RunState.PLANNED.value,
                    now,
                    now,
                ),
            )
        return self.get(run_id)

    def get(self, run_id: str) -> Run:
        """The run of that name.

        Raises:
            UserError: There is none; the message names the nearest.
        """
        row = self.db.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is not None:
            return run_from_row(row)
        names = [run.run_id for run in self.all()]
        if not names:
            raise UserError(f"there is no run {run_id}: nothing was launched yet; start with: slm launch demo")
        hint = did_you_mean(run_id, names) or f"; there are: {', '.join(names)}."
        raise UserError(f"there is no run {run_id}{hint}")

    def all(self) -> list[Run]:
        """Every run, oldest first."""
        return [run_from_row(row) for row in self.db.execute("SELECT * FROM runs ORDER BY CAST(created_at AS INTEGER)")]

    def pick(self, run_id: str | None) -> Run:
        """The named run, or the only one there is.

        Raises:
            UserError: No name was given and there is not exactly one run.
        """
        if run_id is not None:
            return self.get(run_id)
        runs = self.all()
        if not runs:
            raise UserError("nothing was launched yet; start with: slm launch demo")
        if len(runs) > 1:
            names = ", ".join(f"{run.run_id} ({run.state.lower()})" for run in runs)
            raise UserError(f"there are {len(runs)} runs, say which: {names}")
        return runs[0]

    def move(self, run_id: str, state: RunState, *, reason: str = "", fencing_token: int) -> None:
        """Change the state along MOVES; only the supervisor that holds `fencing_token` may.

        Raises:
            SlmError: The move is not allowed, or another supervisor took over.
        """
        with transaction(self.db):
            run = self.get(run_id)
            if run.fencing_token != fencing_token:
                raise SlmError(
                    f"run {run_id} was taken over by another supervisor; follow it with: slm status {run_id}"
                )
            if state is not run.state and state not in MOVES[run.state]:
                raise SlmError(f"run {run_id} cannot go from {run.state} to {state}.")
            self.db.execute(
                "UPDATE runs SET state = ?, reason = ?, updated_at = ? WHERE run_id = ?",
                (state.value, reason, str(wall_ms()), run_id),
            )

    def take_over(self, run_id: str) -> Run:
        """Raise the fencing token for a run whose ledger is only here; `orchestrator.runs.journal.enter` does both."""
        with transaction(self.db):
            self.db.execute("UPDATE runs SET fencing_token = fencing_token + 1 WHERE run_id = ?", (run_id,))
            return self.entered(run_id)

    def entered(self, run_id: str) -> Run:
        """The run as its new supervisor finds it, with an old request to stop forgotten."""
        with transaction(self.db):
            self.db.execute("UPDATE runs SET stop_requested = 0 WHERE run_id = ?", (run_id,))
            return self.get(run_id)

    def request_stop(self, run_id: str) -> None:
        self.db.execute("UPDATE runs SET stop_requested = 1 WHERE run_id = ?", (run_id,))

    def stop_requested(self, run_id: str) -> bool:
        row = self.db.execute("SELECT stop_requested FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return bool(row["stop_requested"])

    def count(self, run_id: str, *, preemptions: int = 0, failures: int = 0) -> None:
        """Add to the run's counters."""
        self.db.execute(
            "UPDATE runs SET preemptions = preemptions + ?, failures = failures + ? WHERE run_id = ?",
            (preemptions, failures, run_id),
        )

    def set_options(self, run_id: str, options: RunOptions) -> None:
        self.db.execute(
            "UPDATE runs SET options_json = ? WHERE run_id = ?",
            (options.to_json(), run_id),
        )


def run_from_row(row: sqlite3.Row) -> Run:
    return Run(
        run_id=row["run_id"],
        recipe_name=row["recipe_name"],
        recipe_digest=row["recipe_digest"],
        recipe_json=row["recipe_json"],
        options=RunOptions.from_json(row["options_json"]),
        cap_usd=usd(row["cap_micro_usd"]),
        state=RunState(row["state"]),
        reason=row["reason"],
        fencing_token=row["fencing_token"],
        stop_requested=bool(row["stop_requested"]),
        preemptions=row["preemptions"],
        failures=row["failures"],
        created_ms=int(row["created_at"]),
        updated_ms=int(row["updated_at"]),
    )


class SupervisorLock:
    """The right to supervise one run on this machine; the kernel gives it back when its holder dies."""

    def __init__(self, path: Path, run_id: str) -> None:
        self._path = path
        self._run_id = run_id
        self._file: int | None = None

    def __enter__(self) -> SupervisorLock:
        """Take it.

        Raises:
            UserError: Another process has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(descriptor):
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"run {self._run_id} already has a supervisor (process {holder}, since {since(self._path)}); "
                f"follow it with: slm status {self._run_id}, or end it with: slm stop {self._run_id}"
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._file = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock; a few tries, since `is_supervised` holds it shared for an instant."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_SECONDS)
        else:
            return True
    return False


def is_supervised(path: Path) -> bool:
    """Whether a living process holds the lock at `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def since(path: Path) -> str:
    return utc(int(path.stat().st_mtime * 1000)).strftime("%H:%M:%S UTC")

"""One SQLite file holds runs, leases and the ledger; numbered migrations bring an older file up to date.

WAL and `synchronous=FULL`: a committed write survives `kill -9` and a power cut. Writers take
`BEGIN IMMEDIATE`, so that a check and the write that depends on it are one step.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cost.errors import SlmError

BUSY_TIMEOUT_SECONDS = 120.0
"""Longer than a supervisor can hold the lock: it writes to the run store within a transaction."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        recipe_name TEXT NOT NULL,
        recipe_digest TEXT NOT NULL,
        recipe_json TEXT NOT NULL,
        options_json TEXT NOT NULL,
        cap_micro_usd INTEGER NOT NULL CHECK (cap_micro_usd >= 0),
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '',
        epoch INTEGER NOT NULL DEFAULT 0,
        stop_requested INTEGER NOT NULL DEFAULT 0,
        preemptions INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL
    );
    CREATE TABLE leases (
        lease_id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs(run_id),
        attempt INTEGER NOT NULL,
        offer_json TEXT NOT NULL,
        nodes_asked INTEGER NOT NULL CHECK (nodes_asked > 0),
        state TEXT NOT NULL CHECK (state IN ('open', 'settled')),
        num_nodes INTEGER NOT NULL CHECK (num_nodes >= 0),
        price_micro_usd INTEGER NOT NULL,
        worst_micro_usd INTEGER NOT NULL,
        latency_ms INTEGER NOT NULL,
        first_grant_seconds REAL NOT NULL,
        kill_latency_seconds REAL NOT NULL,
        started_ms INTEGER NOT NULL,
        accrued_until_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL,
        ended_ms INTEGER,
        accrued_units INTEGER NOT NULL DEFAULT 0,
        outcome TEXT NOT NULL DEFAULT '',
        UNIQUE (run_id, attempt)
    );
    CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL REFERENCES runs(run_id),
        lease_id TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('reserve', 'accrue', 'settle', 'release')),
        key TEXT NOT NULL UNIQUE,
        spent_micro_usd INTEGER NOT NULL,
        held_micro_usd INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        note TEXT NOT NULL
    );
    CREATE INDEX entries_by_run ON entries (run_id, seq);
    CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
    CREATE TRIGGER entries_never_go BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
    """,
    # The balance is a sum over all entries at every turn of the loop: these answer it without the rows.
    """
    CREATE INDEX entries_sums ON entries (run_id, spent_micro_usd, held_micro_usd);
    CREATE INDEX entries_by_lease ON entries (lease_id, spent_micro_usd, held_micro_usd);
    """,
    # Shortest billed times, incidental costs, and how much of the ledger's copy in the run store has been read.
    """
    ALTER TABLE leases ADD COLUMN minimum_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE leases ADD COLUMN floor_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE leases ADD COLUMN ttl_seconds REAL NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN journal_next INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN mirrored_seq INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE lines (
        run_id TEXT NOT NULL REFERENCES runs(run_id),
        name TEXT NOT NULL,
        reserved_micro_usd INTEGER NOT NULL CHECK (reserved_micro_usd >= 0),
        spent_micro_usd INTEGER NOT NULL CHECK (spent_micro_usd >= 0),
        PRIMARY KEY (run_id, name)
    );
    """,
    # The balance is asked for at every turn of the loop: each entry adds itself to the sums, in its own transaction.
    """
    ALTER TABLE runs ADD COLUMN spent_micro_usd INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN held_micro_usd INTEGER NOT NULL DEFAULT 0;
    UPDATE runs SET
        spent_micro_usd = (SELECT COALESCE(SUM(spent_micro_usd), 0) FROM entries WHERE entries.run_id = runs.run_id),
        held_micro_usd = (SELECT COALESCE(SUM(held_micro_usd), 0) FROM entries WHERE entries.run_id = runs.run_id);
    DROP INDEX entries_sums;
    CREATE TRIGGER entries_add_up AFTER INSERT ON entries BEGIN
        UPDATE runs SET
            spent_micro_usd = spent_micro_usd + NEW.spent_micro_usd,
            held_micro_usd = held_micro_usd + NEW.held_micro_usd
        WHERE run_id = NEW.run_id;
    END;
    """,
    # A run is a list of stages; all that it cost before there were any was its training.
    """
    ALTER TABLE leases ADD COLUMN stage TEXT NOT NULL DEFAULT 'pretrain';
    ALTER TABLE entries ADD COLUMN stage TEXT NOT NULL DEFAULT 'pretrain';
    """,
    # An epoch is a pass over data; a supervisor's term is known by its fencing token.
    """
    ALTER TABLE runs RENAME COLUMN epoch TO fencing_token;
    """,
)


class DatabaseError(SlmError):
    """The ledger cannot be read or written; nothing may be rented without it."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger, creating or migrating it.

    Raises:
        DatabaseError: The file cannot be opened, is no database, or was written by a newer version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        migrate(db)
    except (sqlite3.Error, OSError) as error:
        raise DatabaseError(
            f"cannot open the ledger at {path}: {error}; check the disk, or set SLM_HOME to another folder."
        ) from error
    return db


def migrate(db: sqlite3.Connection) -> None:
    """Apply the migrations that the file has not seen, all of them in one transaction."""
    with transaction(db):
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise DatabaseError(
                f"the ledger has format {version}, and this slm reads formats up to {len(MIGRATIONS)}; upgrade slm."
            )
        for script in MIGRATIONS[version:]:
            for statement in split_statements(script):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One immediate write transaction; a nested one joins the outer.

    Raises:
        DatabaseError: The disk is full, the file is locked for too long, or it is damaged.
    """
    if db.in_transaction:
        yield
        return
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            roll_back(db)
            raise
        db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        roll_back(db)
        raise DatabaseError(
            f"the ledger cannot be written: {error}; free disk space or end the process that locks it, then try again."
        ) from error


def roll_back(db: sqlite3.Connection) -> None:
    """Undo an open transaction; SQLite has already undone one that met a full disk."""
    if db.in_transaction:
        db.execute("ROLLBACK")


def split_statements(script: str) -> list[str]:
    """Single statements of a script; `executescript` would commit the transaction that surrounds it."""
    statements, current = [], ""
    for part in script.split(";"):
        current += part + ";"
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return [statement for statement in statements if statement.strip(" ;\n")]

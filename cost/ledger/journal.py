"""The copy of the ledger in the run store: numbered records, each appended by one conditional write.

Invariant: record n is written once and never changes. Whoever wants to raise what a run may cost appends the next
number first; if another supervisor has that number, it has taken the run over. So one order of events holds for all
machines, and any of them can rebuild the ledger by reading the records from 0 on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from cost.errors import SlmError
from cost.ledger.accounts import account_from_row, merged, put
from cost.ledger.leases import FIRST_STAGE

ENTRY_FIELDS = ("lease_id", "kind", "key", "spent_micro_usd", "held_micro_usd", "at_ms", "note", "stage")
INSERT_ENTRY = f"(run_id, {', '.join(ENTRY_FIELDS)}) VALUES ({', '.join('?' * (1 + len(ENTRY_FIELDS)))})"


class JournalDamaged(SlmError):
    """A record that cannot be read: the ledger after it is unknown, so nothing more may be spent."""


def damaged(number: int, error: Exception) -> JournalDamaged:
    """The error for a record of the run store that is none."""
    return JournalDamaged(
        f"record {number} of the ledger in the run store cannot be read ({error}); restore it from a backup of "
        "the store, or check the provider's console for running nodes."
    )


class Journal(Protocol):
    """Where records are kept. Both methods raise the store's own error when it cannot be reached."""

    def append(self, number: int, record: bytes) -> bool:
        """Store the record under a number that is free; False when another record has it.

        True means that the record was read back: a write that is only acknowledged does not count.
        """
        ...

    def read(self, number: int) -> bytes | None:
        """The record of that number, None where there is none yet."""
        ...


class Found(NamedTuple):
    """A record as it was read."""

    number: int
    fencing_token: int
    content: Mapping[str, Any]


def records_from(journal: Journal, number: int) -> Iterator[Found]:
    """Every record from that number on.

    Raises:
        JournalDamaged: One of them is not a record.
    """
    while (data := journal.read(number)) is not None:
        try:
            content = json.loads(data)
            yield Found(number, int(content["fencing_token"]), content)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(number, error) from error
        number += 1


def pending(db: sqlite3.Connection, run_id: str) -> tuple[dict[str, Any], int]:
    """What the records do not hold yet, and the number of the newest entry in it."""
    after = db.execute("SELECT mirrored_seq FROM runs WHERE run_id = ?", (run_id,)).fetchone()["mirrored_seq"]
    rows = db.execute("SELECT * FROM entries WHERE run_id = ? AND seq > ? ORDER BY seq", (run_id, after)).fetchall()
    touched = sorted({row["lease_id"] for row in rows})
    leases = [
        dict(row)
        for lease_id in touched
        for row in db.execute("SELECT * FROM leases WHERE run_id = ? AND lease_id = ?", (run_id, lease_id))
    ]
    lines = [dict(row) for row in db.execute("SELECT * FROM lines WHERE run_id = ?", (run_id,))] if rows else []
    content = {
        "entries": [{name: row[name] for name in ENTRY_FIELDS} for row in rows],
        "leases": leases,
        "lines": lines,
    }
    return content, rows[-1]["seq"] if rows else after


def catch_up(db: sqlite3.Connection, run_id: str, journal: Journal, *, fencing_token: int) -> int:
    """Apply every record that this ledger has not seen; returns the newest fencing token among them, 0 without any.

    Inside a transaction of the caller.
    """
    run = db.execute("SELECT journal_next, mirrored_seq FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    nothing_of_our_own = newest_seq(db, run_id) <= run["mirrored_seq"]
    newest_token = 0
    for found in records_from(journal, run["journal_next"]):
        aligned = apply(db, run_id, found, fencing_token=fencing_token)
        nothing_of_our_own = nothing_of_our_own and not aligned
        newest_token = max(newest_token, found.fencing_token)
    if nothing_of_our_own:
        db.execute("UPDATE runs SET mirrored_seq = ? WHERE run_id = ?", (newest_seq(db, run_id), run_id))
    return newest_token


def newest_seq(db: sqlite3.Connection, run_id: str) -> int:
    row = db.execute("SELECT MAX(seq) AS newest FROM entries WHERE run_id = ?", (run_id,)).fetchone()
    return row["newest"] or 0


def apply(db: sqlite3.Connection, run_id: str, found: Found, *, fencing_token: int) -> bool:
    """Apply one record to the ledger; a record that was applied before changes nothing.

    Inside a transaction of the caller. Entries that were made here and that no record holds are kept, and where the
    sums then differ from the accounts, one more entry brings them into line: then True.
    """
    content, aligned = found.content, False
    for entry in content["entries"]:
        db.execute(
            f"INSERT OR IGNORE INTO entries {INSERT_ENTRY}",
            [run_id, *({"stage": FIRST_STAGE, **entry}[name] for name in ENTRY_FIELDS)],
        )
    for row in content["leases"]:
        incoming = account_from_row(row, fencing_token=fencing_token)
        known_row = db.execute("SELECT * FROM leases WHERE lease_id = ?", (row["lease_id"],)).fetchone()
        account = incoming
        if known_row is not None:
            known = account_from_row(known_row, fencing_token=fencing_token)
            account = merged(known, incoming, its_state_counts=found.fencing_token != fencing_token)
        put(db, account)
        aligned |= _align(db, run_id, row["lease_id"], account.spent_micro_usd, account.held_micro_usd, found)
    for row in content["lines"]:
        db.execute(
            "INSERT INTO lines (run_id, name, reserved_micro_usd, spent_micro_usd) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (run_id, name) DO UPDATE SET reserved_micro_usd = excluded.reserved_micro_usd, "
            "spent_micro_usd = max(spent_micro_usd, excluded.spent_micro_usd)",
            (run_id, row["name"], row["reserved_micro_usd"], row["spent_micro_usd"]),
        )
        line = db.execute("SELECT * FROM lines WHERE run_id = ? AND name = ?", (run_id, row["name"])).fetchone()
        held = max(0, line["reserved_micro_usd"] - line["spent_micro_usd"])
        aligned |= _align(db, run_id, line_id(run_id, row["name"]), line["spent_micro_usd"], held, found)
    if "cap_micro_usd" in content:
        db.execute("UPDATE runs SET cap_micro_usd = ? WHERE run_id = ?", (content["cap_micro_usd"], run_id))
    db.execute("UPDATE runs SET journal_next = ? WHERE run_id = ?", (found.number + 1, run_id))
    return aligned


def line_id(run_id: str, name: str) -> str:
    """Under which name the entries of a line stand beside those of leases."""
    return f"{run_id}/{name}"


def _align(db: sqlite3.Connection, run_id: str, lease_id: str, spent: int, held: int, found: Found) -> bool:
    """One entry for what the sums of a lease lack against its account."""
    sums = db.execute(
        "SELECT COALESCE(SUM(spent_micro_usd), 0) AS spent, COALESCE(SUM(held_micro_usd), 0) AS held, "
        "COUNT(*) AS number, COALESCE(MAX(at_ms), 0) AS at_ms FROM entries WHERE run_id = ? AND lease_id = ?",
        (run_id, lease_id),
    ).fetchone()
    more_spent, more_held = spent - sums["spent"], held - sums["held"]
    if not more_spent and not more_held:
        return False
    kind = "reserve" if more_spent + more_held > 0 else "release"
    key = f"{lease_id}/record {found.number}.{sums['number']}"
    newest = db.execute(
        "SELECT stage FROM entries WHERE run_id = ? AND lease_id = ? ORDER BY seq DESC LIMIT 1", (run_id, lease_id)
    ).fetchone()
    stage = FIRST_STAGE if newest is None else newest["stage"]
    db.execute(
        f"INSERT INTO entries {INSERT_ENTRY}",
        (run_id, lease_id, kind, key, more_spent, more_held, sums["at_ms"], "as the run store has it", stage),
    )
    return True

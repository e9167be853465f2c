"""The copy of a run's ledger in its run store, and how another machine makes a ledger of it.

`ledger/N.json` are the records of `cost.ledger.journal`. Each supervisor's first record carries what is needed to go on
with the run elsewhere: recipe, options, cap and the name under which its nodes were rented.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cost.errors import UserError
from cost.ledger.database import transaction
from cost.ledger.journal import JournalDamaged, damaged, records_from
from cost.ledger.ledger import take_over
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs, RunState
from orchestrator.settings import Home
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer, require_current_layout, unwrap, wrap


class StoreJournal:
    """Records as objects of a run store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(self, number: int, record: bytes) -> bool:
        """See `cost.ledger.journal.Journal`."""
        key = keys.ledger_record(number)
        record = wrap(json.loads(record), Writer.SUPERVISOR)
        self._store.create(key, record)
        try:
            stored = self._store.read(key)
        except StoreKeyMissing as error:
            raise StoreError(
                f"{key} was stored in {self._store.uri} and is not there; nothing is rented on the word of such a "
                "store. Run it again, or use another store."
            ) from error
        # A create whose reply was lost and that was tried again finds its own record.
        return stored == record

    def read(self, number: int) -> bytes | None:
        """See `cost.ledger.journal.Journal`."""
        key = keys.ledger_record(number)
        try:
            return json.dumps(unwrap(self._store.read(key), key)).encode()
        except StoreKeyMissing:
            return None
        except RecordError as error:
            raise damaged(number, error) from error


def store_uri(run: Run, home: Home) -> str:
    """Where the run's store is."""
    return str(run.options.store or home.store_dir(run.run_id))


def run_id_in(store: Store) -> str:
    """The run that a store belongs to.

    Raises:
        UserError: It holds no ledger.
    """
    return str(facts_in(store)["run_id"])


def facts_in(store: Store) -> Mapping[str, Any]:
    """The newest that the records say of the run itself."""
    require_current_layout(store)
    facts: Mapping[str, Any] | None = None
    for found in records_from(StoreJournal(store), 0):
        facts = found.content.get("run", facts)
    if facts is None:
        raise UserError(
            f"{store.uri} holds no ledger of a run; give the run store itself, the folder or prefix that holds "
            f"{keys.LEDGER}, {keys.SPEC} and {keys.CHECKPOINTS}."
        )
    return facts


def enter(runs: Runs, run_id: str, store: Store, *, owner: str) -> tuple[Run, StoreJournal]:
    """Become the supervisor of a run: from now on only the caller may spend.

    The caller holds the run's `SupervisorLock`.

    Raises:
        OldRunStore: An earlier version wrote it.
        StoreError: The run store cannot be reached; nobody knows whether another machine has the run.
    """
    require_current_layout(store)
    journal = StoreJournal(store)
    run = runs.get(run_id)
    take_over(runs.db, run_id, journal, facts_of(run, owner=owner))
    return runs.entered(run_id), journal


def facts_of(run: Run, *, owner: str) -> dict[str, Any]:
    """What another machine needs to go on with the run, `owner` being the name under which this one rents."""
    owners = tuple(sorted({*run.options.owners, owner}))
    return {
        "run_id": run.run_id,
        "recipe_name": run.recipe_name,
        "recipe_digest": run.recipe_digest,
        "recipe_json": run.recipe_json,
        "options": replace(run.options, owners=owners).content(),
        "created_ms": run.created_ms,
        "preemptions": run.preemptions,
        "failures": run.failures,
    }


def recover(runs: Runs, store: Store) -> Run:
    """Make the ledger of the run that this store belongs to, as far as it is not here yet, and take it over.

    Every grant that was paid for counts to its last terminator's time. The supervisor before can grant no more.

    Raises:
        UserError: The store holds no ledger, or the ledger of another run stands here under that name.
    """
    journal, facts = StoreJournal(store), facts_in(store)
    run_id = str(facts["run_id"])
    options = replace(RunOptions.parse(facts["options"]), store=store.uri)
    with transaction(runs.db):
        row = runs.db.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            _insert(runs.db, facts, options)
        elif row["recipe_digest"] != facts["recipe_digest"] or row["created_at"] != str(facts["created_ms"]):
            raise UserError(
                f"another run stands in this ledger as {run_id}; set SLM_HOME to a folder of its own and run it again."
            )
        else:
            runs.set_options(run_id, options)
    take_over(runs.db, run_id, journal, facts)
    return runs.entered(run_id)


def _insert(db: sqlite3.Connection, facts: Mapping[str, Any], options: RunOptions) -> None:
    try:
        db.execute(
            "INSERT INTO runs (run_id, recipe_name, recipe_digest, recipe_json, options_json, cap_micro_usd, state, "
            "preemptions, failures, created_at, updated_at) VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?)",
            (
                facts["run_id"],
                facts["recipe_name"],
                facts["recipe_digest"],
                facts["recipe_json"],
                options.to_json(),
                RunState.RECOVERING.value,
                facts["preemptions"],
                facts["failures"],
                str(facts["created_ms"]),
                str(facts["created_ms"]),
            ),
        )
    except KeyError as error:
        raise JournalDamaged(f"the ledger in the run store lacks {error}; bring it back from a copy.") from error

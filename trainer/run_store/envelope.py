"""The envelope of the run store's records: which format, who wrote it, and room for an authentication tag.

A record is one JSON object. Three of its fields are the envelope, all others the payload:
  schema  number of the format; a reader refuses a newer one than it knows
  writer  which program wrote it: supervisor, trainer, node or guard
  tag     authentication of all other fields, written as JSON with sorted keys; empty, since nothing signs yet
The guard writes and reads the same three fields by its own code (standard library only).

No envelope is put around what is no record: metrics and guard logs (JSON lines), node logs, profiles, compiled code,
the parts of a checkpoint and the files of prepared data. A checkpoint's manifest has the envelope's fields in its first
line, beside the checksum of the rest. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from cost.errors import SlmError
from trainer.run_store import keys
from trainer.run_store.base import Store

SCHEMA = 1
NO_TAG = ""
FIELDS = ("schema", "writer", "tag")
RENAMED = {"epoch": "incarnation"}
"""Fields of records from before the envelope (schema 0), by the name that they have now."""


class Writer(StrEnum):
    SUPERVISOR = "supervisor"
    TRAINER = "trainer"
    NODE = "node"
    GUARD = "guard"


class RecordError(SlmError, ValueError):
    """The bytes under a key of the run store are no record that this version can read."""

    def __init__(self, key: str, reason: str, fix: str) -> None:
        super().__init__(f"{key} in the run store {reason}; {fix}.")
        self.reason = reason


class OldRunStore(SlmError):
    """A run store of an earlier version, which can be shown but not continued."""


def envelope(writer: Writer) -> dict[str, Any]:
    """The three fields of a record by this version."""
    return {"schema": SCHEMA, "writer": writer.value, "tag": NO_TAG}


def wrap(payload: Mapping[str, Any], writer: Writer, *, indent: int | None = None) -> bytes:
    """The payload as a record."""
    taken = [name for name in FIELDS if name in payload]
    assert not taken, f"a payload has no field {taken[0]!r}: it is the envelope's"
    return json.dumps({**envelope(writer), **payload}, indent=indent).encode()


def unwrap(data: bytes, key: str) -> dict[str, Any]:
    """The payload of a record; `key` names it in an error. One from before the envelope is read as well.

    Raises:
        RecordError: It is no JSON object, or a newer version wrote it.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(key, f"is not JSON ({str(error)[:80]})", "bring it back from a copy") from None
    if not isinstance(content, dict):
        raise RecordError(key, "is not a JSON object", "bring it back from a copy")
    if "schema" not in content:
        return {RENAMED.get(str(name), str(name)): value for name, value in content.items()}
    schema = content["schema"]
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise RecordError(key, f"has format {schema!r}, this slm reads up to {SCHEMA}", "upgrade slm")
    return {name: value for name, value in content.items() if name not in FIELDS}


def require_current_layout(store: Store) -> None:
    """Refuse to work on a run of an earlier version: its ledger and checkpoints lie under other keys.

    Raises:
        OldRunStore: It is one.
    """
    for prefix in keys.OLD_PREFIXES:
        if store.list(prefix):
            raise OldRunStore(
                f"the run store {store.uri} was written by an earlier slm (it holds {prefix}): `slm status` and "
                "`slm ledger` show the run; finish or export it with the slm that began it, or start a new one."
            )

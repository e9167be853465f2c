"""Opening a run store by its URI, and finding out what it can do.

`trainer.run_store.base` knows folders only, since a trainer imports no cloud's client; everything else opens stores
here. This module is torch-free, and imports boto3 only for `s3://`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cost.errors import SlmError, UserError
from tasks.stores.s3 import S3Store as S3Store
from tasks.stores.s3_client import Patience
from trainer.run_store import base as folders
from trainer.run_store.base import UNCONDITIONAL, Store, StoreError, StoreKeyMissing

PROBE_PREFIX = "probes/"


SUPERVISORS = Patience(attempts=3, first_wait_seconds=0.2, longest_wait_seconds=1.0, reply_seconds=6.0)
"""A supervisor asks again at its next turn anyway, and must not hold the ledger's lock, or a renewal, for minutes."""


def open_store(uri_or_path: str, *, create: bool = True, patience: Patience | None = None) -> Store:
    """The store at `s3://bucket/prefix`, at `file:///absolute/path` or at a plain path.

    Without `create` it must be there already; `patience` is for S3. Raises UserError for a URI that names none,
    StoreError when it refuses.
    """
    if uri_or_path.startswith("s3://"):
        return S3Store.from_uri(uri_or_path, create=create, patience=patience)
    try:
        return folders.open_store(uri_or_path, create=create)
    except UserError as error:
        if "://" in uri_or_path and not uri_or_path.startswith("file:"):
            raise UserError(
                f"no run store can be opened at {uri_or_path}; give s3://bucket/prefix, a folder or "
                "file:///absolute/path."
            ) from error
        raise


def below(uri_or_path: str, name: str) -> str:
    """Where a store of that name lies inside another; what the URI asks for behind `?` stays."""
    place, mark, query = uri_or_path.partition("?") if "://" in uri_or_path else (uri_or_path, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def open_for_training(
    uri_or_path: str, *, create: bool, single_supervisor: bool, patience: Patience | None = None
) -> Store:
    """A store that two supervisors cannot both believe to own, unless the user says that there is only one.

    Raises:
        UserError: It has no conditional writes, and `single_supervisor` was not said.
    """
    store = open_store(uri_or_path, create=create, patience=patience)
    if has_conditional_writes(store):
        return store
    if not single_supervisor:
        raise UserError(
            f"the run store {store.uri} has no conditional writes, so that two supervisors, or a node that was "
            "thought lost, could both continue the run. Use another store, or add --single-supervisor and take "
            "care that only one ever runs."
        )
    mark = "&" if "?" in store.uri else "?"
    uri = store.uri if UNCONDITIONAL in store.uri else f"{store.uri}{mark}{UNCONDITIONAL}"
    return open_store(uri, create=False, patience=patience)


@dataclass(frozen=True)
class Finding:
    """One thing that a store was asked to do: whether it does it, and in words what was seen."""

    name: str
    ok: bool
    detail: str


def probe(store: Store) -> list[Finding]:
    """Write, read back, create twice, list and delete under a name of our own; leaves nothing there."""
    key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    findings: list[Finding] = []
    with suppress(_Stopped):
        _find(findings, "write and read", lambda: _reads_back(store, key))
        _find(findings, "conditional writes", lambda: _creates_once(store, f"{key}-once"))
        _find(findings, "list", lambda: _lists(store, key))
        _find(findings, "delete", lambda: _deletes(store, key))
    for leftover in (key, f"{key}-once"):
        with suppress(StoreError):
            store.delete(leftover)
    return findings


def has_conditional_writes(store: Store) -> bool:
    """Whether of two creates of one key only the first succeeds. Raises StoreError when the store fails otherwise."""
    key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    try:
        return not _creates_once(store, key)
    finally:
        with suppress(StoreError):
            store.delete(key)


class _Stopped(Exception):
    """The store refuses, so that more questions would say the same."""


def _find(findings: list[Finding], name: str, ask: Callable[[], str]) -> None:
    """`ask` returns what is wrong, or nothing."""
    try:
        wrong = ask()
    except SlmError as error:
        findings.append(Finding(name, False, str(error)))
        raise _Stopped from error
    findings.append(Finding(name, not wrong, wrong or "as it should"))


def _reads_back(store: Store, key: str) -> str:
    store.write(key, b"first")
    store.write(key, b"second")
    found = store.read(key)
    return "" if found == b"second" else f"reads {found[:20]!r} after b'second' was written"


def _creates_once(store: Store, key: str) -> str:
    if not getattr(store, "conditional", True):
        return "its URI says that it has none: one supervisor at a time, with --single-supervisor"
    try:
        first, second = store.create(key, b"first"), store.create(key, b"second")
    except StoreError as error:
        if "conditional writes" not in str(error):
            raise
        return str(error)
    found = store.read(key)
    if (first, second, found) == (True, False, b"first"):
        return ""
    return "a second create of one key is not refused: one supervisor at a time, with --single-supervisor"


def _lists(store: Store, key: str) -> str:
    return "" if key in store.list(PROBE_PREFIX) else "a key that was just written is not listed yet"


def _deletes(store: Store, key: str) -> str:
    store.delete(key)
    try:
        store.read(key)
    except StoreKeyMissing:
        return ""
    return "a key is still there after its delete"

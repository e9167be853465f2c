"""When a stage is complete: its manifest is there, and its predecessors are still what it was made of."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from tasks.recipe.stages import usual
from tasks.run_store_keys import stage_manifest
from tasks.stages.manifest import Manifest, Outcome, inputs_of, is_complete, read_manifest, write_manifest
from trainer.run_store.base import DirectoryStore

CAP = Decimal(10)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def complete(store: DirectoryStore, name: str, outcome: Outcome = Outcome.FINISHED, **facts: object) -> None:
    cap = CAP if outcome is Outcome.CAP else None
    write_manifest(store, Manifest(name, name, outcome, inputs_of(store, usual(), name), facts, cap))


def test_a_stage_is_complete_when_its_manifest_is_in_the_store(store: DirectoryStore) -> None:
    assert not is_complete(store, usual(), "prepare", cap_usd=CAP)
    complete(store, "prepare", data_set="d1")
    assert is_complete(store, usual(), "prepare", cap_usd=CAP)
    assert not is_complete(store, usual(), "pretrain", cap_usd=CAP)


def test_a_stage_that_is_run_again_makes_those_after_it_incomplete(store: DirectoryStore) -> None:
    complete(store, "prepare", data_set="d1")
    complete(store, "pretrain", step=10)
    assert is_complete(store, usual(), "pretrain", cap_usd=CAP)
    complete(store, "prepare", data_set="d1")
    assert is_complete(store, usual(), "pretrain", cap_usd=CAP)  # the same data
    complete(store, "prepare", data_set="d2")
    assert not is_complete(store, usual(), "pretrain", cap_usd=CAP)


def test_a_stage_that_stopped_at_the_cap_is_complete_until_the_cap_is_raised(store: DirectoryStore) -> None:
    complete(store, "prepare", Outcome.CAP)
    assert is_complete(store, usual(), "prepare", cap_usd=CAP)
    assert not is_complete(store, usual(), "prepare", cap_usd=CAP + 1)


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b'{"stage": "prepare", "kind": "prepare", "outcome": "won"}'])
def test_a_damaged_manifest_completes_nothing(store: DirectoryStore, damaged: bytes) -> None:
    store.write(stage_manifest("prepare"), damaged)
    assert read_manifest(store, "prepare") is None


def test_a_manifest_survives_the_store(store: DirectoryStore) -> None:
    manifest = Manifest("count", "count", Outcome.CAP, {"prepare": "abc"}, {"num_bytes": 7}, Decimal("12.34"))
    write_manifest(store, manifest)
    assert read_manifest(store, "count") == manifest

"""Goodput counts a step once, however often it was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cost.ledger.accounts import LeaseAccount
from cost.market.offers import load_reference_offers
from orchestrator.runs.goodput import goodput, kept_seconds
from tests.support.builders import make_lease
from trainer.run_store.base import DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """Incarnation 0 did steps 1 to 3 and was lost; incarnation 1 went on from step 1."""
    made = DirectoryStore(tmp_path / "store")
    for incarnation, seconds_by_step in ((0, {1: 2.0, 2: 2.0, 3: 2.0}), (1, {2: 1.0, 3: 1.0, 4: 1.0})):
        lines = [json.dumps({"step": step, "seconds": seconds}) for step, seconds in seconds_by_step.items()]
        made.write(f"metrics/incarnation={incarnation}/part-000000.jsonl", ("\n".join(lines) + "\n").encode())
    return made


def account(number: int, *, billed_seconds: int) -> LeaseAccount:
    lease = make_lease(
        load_reference_offers().offers[0],
        lease_id=f"lease-{number}",
        attempt=number,
        num_nodes=2,
        worst_usd_per_hour=1,
        first_grant_seconds=1.0,
        kill_latency_seconds=1.0,
    )
    return LeaseAccount(
        lease=lease,
        state="settled",
        num_nodes=0,
        price_micro_usd=1,
        worst_micro_usd=1,
        latency_ms=0,
        started_ms=1000,
        accrued_until_ms=1000 + billed_seconds * 1000,
        expires_ms=0,
        ended_ms=0,
        accrued_units=0,
        outcome="",
    )


def test_a_step_that_was_done_again_counts_once(store: DirectoryStore) -> None:
    assert kept_seconds(store) == 2.0 + 1.0 + 1.0 + 1.0


def test_goodput_is_kept_time_over_billed_time(store: DirectoryStore) -> None:
    accounts = [account(1, billed_seconds=300), account(2, billed_seconds=700)]
    assert goodput(store, accounts, time_scale=100.0) == pytest.approx(5.0 * 100 / 1000)


def test_what_was_never_billed_has_no_goodput(store: DirectoryStore) -> None:
    assert goodput(store, [], time_scale=1.0) is None

"""Elapsed time is charged at the price that was read; what no reading covers, at the worst-case price."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.lease.accrual import Accrual
from orchestrator.supervisor.lease_policy import Terms
from tests.support.builders import make_lease, make_offer
from trainer.run_store.base import DirectoryStore

TERMS = Terms(price_gap_seconds=600.0, accrue_seconds=60.0)
CHEAP, WORST = Decimal(36), Decimal(72)
"""Dollars per hour: one and two cents a second."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def accrual(tmp_path: Path, clock: ManualClock) -> Accrual:
    """Of one node that is rented now."""
    runs = Runs(connect(tmp_path / "slm.db"))
    run_id = runs.create(
        recipe_name="demo", recipe_digest="d", recipe_json="{}", options=RunOptions("fake"), cap_usd=Decimal(1000)
    ).run_id
    run = runs.take_over(run_id)
    ledger = Ledger(runs.db, run_id, fencing_token=run.fencing_token)
    lease = make_lease(
        make_offer(usd_per_hour=CHEAP), run_id=run_id, worst_usd_per_hour=WORST, fencing_token=run.fencing_token
    )
    now = clock.now_ms()
    ledger.reserve(lease, expires_ms=now + 7_200_000, latency_ms=0, at_ms=now)
    store = DirectoryStore(tmp_path / "store")
    grants = Grants(ledger=ledger, backend=FakeBackend(clock), store=store, clock=clock, terms=TERMS)
    return Accrual(lease.lease_id, ledger, clock, TERMS, grants)


def spent_after(accrual: Accrual, *prices: Decimal | None, seconds: float) -> Decimal:
    """Dollars, when so many seconds pass before each of the readings."""
    for price in prices:
        accrual.clock.sleep(seconds)
        accrual.charge(price)
    return accrual.ledger.balance().spent_usd


def test_time_between_two_readings_costs_the_price_that_was_read(accrual: Accrual) -> None:
    assert spent_after(accrual, CHEAP, CHEAP, seconds=60.0) == Decimal("1.20")


def test_without_a_price_nothing_is_charged(accrual: Accrual) -> None:
    assert spent_after(accrual, None, None, seconds=60.0) == 0


def test_a_gap_without_a_reading_costs_the_worst_price(accrual: Accrual) -> None:
    assert spent_after(accrual, CHEAP, seconds=100.0) == Decimal("1.00")
    assert spent_after(accrual, CHEAP, seconds=700.0) == Decimal("1.00") + Decimal("14.00")


def test_what_was_read_is_charged_before_the_number_of_nodes_changes(accrual: Accrual) -> None:
    spent_after(accrual, CHEAP, CHEAP, seconds=30.0)
    accrual.resize(2)
    assert accrual.ledger.balance().spent_usd == Decimal("0.60")

"""Costs beside the nodes: they follow from billed time, count against the cap, and are charged once."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import BudgetExceeded
from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs
from orchestrator.supervisor.incidentals import (
    DISKS,
    DOWNLOAD,
    EGRESS,
    RUN_STORE,
    Incidentals,
    Rates,
    download_usd,
    rates_on,
)
from tests.orchestrator.runs.test_journal import HOUR_MS, START_MS, a_lease

RATES = Rates(disk_usd=Decimal("0.01"), run_store_usd=Decimal("0.02"), egress_usd=Decimal("0.50"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    runs = Runs(connect(tmp_path / "slm.db"))
    run = runs.create(
        recipe_name="tiny", recipe_digest="d", recipe_json="{}", options=RunOptions("fake"), cap_usd=Decimal(10)
    )
    return Ledger(runs.db, run.run_id, fencing_token=0)


@pytest.fixture
def incidentals(ledger: Ledger) -> Incidentals:
    return Incidentals(ledger, lambda _: RATES, lambda _: Decimal("0.30"))


def held_and_spent(ledger: Ledger) -> dict[str, tuple[Decimal, Decimal]]:
    micro = Decimal(1_000_000)
    return {line.name: (line.held_micro_usd / micro, line.spent_micro_usd / micro) for line in ledger.lines()}


def test_what_a_lease_can_come_to_is_set_aside_before_it_is_rented(ledger: Ledger, incidentals: Incidentals) -> None:
    ledger.reserve(a_lease(nodes=2), expires_ms=START_MS + 2 * HOUR_MS, latency_ms=0, at_ms=START_MS)
    incidentals.keep(at_ms=START_MS)
    held = {name: amounts[0] for name, amounts in held_and_spent(ledger).items()}
    assert held == {
        DISKS: Decimal("0.04"),  # two nodes for two hours
        RUN_STORE: Decimal("0.04"),
        EGRESS: Decimal("1.00"),
        DOWNLOAD: Decimal("0.30"),
    }


def test_elapsed_time_is_charged_once_however_often_it_is_counted(ledger: Ledger, incidentals: Incidentals) -> None:
    lease = a_lease(nodes=2)
    ledger.reserve(lease, expires_ms=START_MS + 2 * HOUR_MS, latency_ms=0, at_ms=START_MS)
    ledger.accrue(lease.lease_id, at_ms=START_MS + HOUR_MS, usd_per_hour=Decimal("1.00"))
    for _ in range(3):
        incidentals.keep(at_ms=START_MS + HOUR_MS)
    spent = {name: amounts[1] for name, amounts in held_and_spent(ledger).items()}
    assert spent == {DISKS: Decimal("0.02"), RUN_STORE: Decimal("0.02"), EGRESS: Decimal("0.50"), DOWNLOAD: 0}


def test_a_finished_run_pays_for_its_download_and_frees_the_rest(ledger: Ledger, incidentals: Incidentals) -> None:
    lease = a_lease()
    ledger.reserve(lease, expires_ms=START_MS + 2 * HOUR_MS, latency_ms=0, at_ms=START_MS)
    incidentals.keep(at_ms=START_MS)
    ledger.settle(lease.lease_id, ended_ms=START_MS + HOUR_MS, at_ms=START_MS + HOUR_MS, outcome="finished")
    incidentals.finish(at_ms=START_MS + HOUR_MS)
    ledger.close_lines(at_ms=START_MS + HOUR_MS)
    assert ledger.balance().held_usd == 0
    assert ledger.balance().spent_usd == Decimal("1.00") + Decimal("0.01") + Decimal("0.02") + Decimal("0.80")


def test_a_cap_that_covers_nodes_only_is_too_small(ledger: Ledger, incidentals: Incidentals) -> None:
    ledger.reserve(a_lease(), expires_ms=START_MS + 10 * HOUR_MS, latency_ms=0, at_ms=START_MS)
    with pytest.raises(BudgetExceeded):
        incidentals.keep(at_ms=START_MS)


def test_rates_are_those_of_the_cloud() -> None:
    offer = a_lease().offer  # nebius: no egress fee, disk $0.10 per GB and month
    rates = rates_on(offer, num_params=1_000_000_000, interval_seconds=3600.0)
    assert rates.egress_usd == 0 and download_usd(offer, num_params=1_000_000_000) == 0
    assert rates.disk_usd == pytest.approx(Decimal("0.0137"), abs=Decimal("0.0001"))  # 100 GB for an hour
    assert rates.run_store_usd == pytest.approx(Decimal("0.00074"), abs=Decimal("0.00001"))  # 3 x 12 GB at $0.015

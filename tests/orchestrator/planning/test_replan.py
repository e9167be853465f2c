"""A run's own speed moves the offers that are left."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from orchestrator.planning.replan import SpeedRatio, measured_ratio, replanned
from orchestrator.settings import Home
from tests.support.backend_contract import OFFER
from tests.support.cloud_runs import SPEED, ran_on
from trainer.run_store.base import DirectoryStore

H100 = replace(OFFER, accelerator="H100-SXM", region="a")
L4 = replace(OFFER, accelerator="L4", region="b")
CANDIDATES = [
    Candidate(H100, 2, Decimal(1), Decimal(10)),
    Candidate(L4, 2, Decimal(1), Decimal(12)),
    Candidate(H100, 1, Decimal(1), Decimal(10)),
    Candidate(L4, 1, Decimal(1), Decimal(12)),
]


def test_a_gpu_that_is_slower_than_planned_moves_behind_a_cheaper_one() -> None:
    found = replanned(CANDIDATES, [SpeedRatio("H100-SXM", 0.5)])
    assert [(entry.offer.accelerator, entry.num_nodes) for entry in found] == [
        ("L4", 2),
        ("H100-SXM", 2),
        ("L4", 1),
        ("H100-SXM", 1),
    ]
    assert found[1].expected_usd == Decimal(20)


def test_without_a_measurement_the_plan_s_order_stays() -> None:
    assert replanned(list(reversed(CANDIDATES)), []) == list(reversed(CANDIDATES))
    assert replanned(CANDIDATES, [SpeedRatio("H100-SXM", 1.0)]) == CANDIDATES


def test_the_speed_is_that_of_one_device_of_the_lease_that_trained(tmp_path: Path) -> None:
    home = Home(tmp_path / "slm")
    run = ran_on(home, H100, num_nodes=2)
    db = connect(home.database)
    accounts = Ledger(db, run.run_id, fencing_token=run.fencing_token).accounts()
    store = DirectoryStore(home.store_dir(run.run_id))
    found = measured_ratio(store, accounts, {H100.offer_id: 2 * SPEED})
    assert found == SpeedRatio("H100-SXM", 0.5)
    assert measured_ratio(store, accounts, {}) is None
    assert measured_ratio(store, accounts, {H100.offer_id: 100 * SPEED}) is None  # no GPU is a hundred times slower
    newest = json.loads(store.read("progress/latest.json"))
    store.write("progress/latest.json", json.dumps({**newest, "step": 1}).encode())
    assert measured_ratio(store, accounts, {H100.offer_id: 2 * SPEED}) is None  # compiling is no training
    db.close()

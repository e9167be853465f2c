"""The simulation of faults: the promise holds with all layers in place, and each layer is missed when it is out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEED = "5"
LAYERS = {
    "reserve before create": 22,
    "worst-case price": 22,
    "TTL reservation": 66,
    "guard": 22,
    "provider TTL": 66,
    "reconciler": 22,
    "settle at p-hat": 22,
    "fencing": 22,
    "run store first": 22,
}
"""By layer: schedules, enough to show that it is missing."""


def simulate(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "bench" / "cap_faults.py"), "--seed", SEED, "--workers", "1", "--json"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def harm(found: dict[str, Any]) -> int:
    return int(found["violations"] + found["ledger_short"] + found["overshoot_beyond_bound"])


def test_under_the_default_mix_the_bill_stays_under_the_cap() -> None:
    code, found = simulate("--schedules", "60")
    assert (code, harm(found)) == (0, 0)
    assert 50 < found["max_usd"] <= 100 and found["invariant_checks"] > 60 * 20
    assert found["kept_share"] > 0.85 and abs(sum(found["unspent_by_cause"].values()) + found["use"] - 1) < 0.05


def test_without_faults_the_cap_is_used() -> None:
    _, found = simulate("--schedules", "1", "--fault-free", "1")
    rows = {(row["ttl"], row["price_over_bound"]): row for row in found["fault_free"]}
    assert harm(found) == 0 and len(rows) == 6
    assert all(row["use"] >= 0.95 and row["of_optimum"] >= 0.97 for row in rows.values())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_out_is_missed(layer: str) -> None:
    code, found = simulate("--schedules", str(LAYERS[layer]), "--without", layer)
    assert code == 1 and harm(found) > 0


@pytest.mark.parametrize(
    "fault", ["create late", "price peaks unseen", "two machines", "supervisor moves", "hangs unarmed"]
)
def test_a_fault_alone_does_no_harm(fault: str) -> None:
    code, found = simulate("--schedules", "15", "--faults", fault)
    assert (code, harm(found)) == (0, 0)


def test_a_schedule_can_be_told_line_by_line() -> None:
    command = [sys.executable, str(ROOT / "bench" / "cap_faults.py"), "--replay", "5000001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "renting" in done.stdout and done.stdout.splitlines()[-1].startswith("Result(seed=5000001")

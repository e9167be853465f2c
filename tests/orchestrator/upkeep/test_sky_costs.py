"""`slm ledger --compare`: our charge of each lease next to SkyPilot's, and no fuss where SkyPilot knows nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.base import BackendError
from orchestrator.backends.sky.names import cluster_name
from orchestrator.runs import status as report
from orchestrator.settings import Home
from orchestrator.upkeep.sky_costs import compare
from tests.orchestrator.upkeep.test_inventory import a_run, in_the_ledger

PAGE = Path(__file__).resolve().parents[3] / "docs" / "json.md"


class Said:
    """SkyPilot's side, as the worker answers."""

    def __init__(self, *costs: tuple[str, float]) -> None:
        self._costs = costs

    def call(self, name: str, *, seconds: float, **arguments: Any) -> Any:
        assert (name, seconds > 0) == ("costs", True)
        wanted = [cost for cost in self._costs if cost[0] in arguments["clusters"]]
        return {"costs": [{"cluster": cluster, "usd": usd, "seconds": 1.0} for cluster, usd in wanted]}


class Silent:
    def call(self, name: str, *, seconds: float, **_: Any) -> Any:
        raise BackendError(f"{name} took longer than {seconds:.0f} s")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def test_each_lease_is_compared_with_all_times_that_its_cluster_was_up(home: Home) -> None:
    run_id = a_run(home)
    first, second = (f"slm-{home.owner_id()}-{run_id}-{attempt}" for attempt in (1, 2))
    in_the_ledger(home, run_id, first, settled=True)
    in_the_ledger(home, run_id, second, attempt=2, settled=True)
    accounts = report.ledger(run_id, home=home).leases
    charged = {account.lease.lease_id: Decimal(account.spent_micro_usd) / 10**6 for account in accounts}
    name = cluster_name(first)
    found = compare(accounts, Said((name, 0.0001), (name, 0.0002), ("somebody-elses", 9.0)))
    by_lease = {lease.lease_id: lease for lease in found.leases}
    assert by_lease[first].skypilot_usd == Decimal("0.0003")
    assert by_lease[first].difference_usd == charged[first] - Decimal("0.0003")
    assert (by_lease[second].skypilot_usd, by_lease[second].difference_usd) == (None, None)
    assert found.both_usd == (charged[first], Decimal("0.0003"))


def test_a_skypilot_that_does_not_answer_is_told_and_hides_nothing(home: Home) -> None:
    run_id = a_run(home)
    in_the_ledger(home, run_id, f"slm-{home.owner_id()}-{run_id}-1", settled=True)
    found = compare(report.ledger(run_id, home=home).leases, Silent())
    assert "took longer than 60 s" in found.problem
    assert [lease.skypilot_usd for lease in found.leases] == [None]


@pytest.mark.skipif(find_spec("sky") is None, reason="SkyPilot is not installed (the extra cloud)")
def test_skypilot_itself_is_asked_and_prints_what_the_page_says(home: Home, tmp_path: Path) -> None:
    run_id = a_run(home)
    in_the_ledger(home, run_id, f"slm-{home.owner_id()}-{run_id}-1", settled=True)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "ledger", run_id, "--compare", "--json"],
        env={**os.environ, "HOME": str(tmp_path), "SLM_HOME": str(home.root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["problem"] is None, document
    (lease,) = document["leases"]
    assert lease["skypilot_usd"] is None  # SkyPilot's database of this home is empty
    section = PAGE.read_text(encoding="utf-8").split("## slm ledger --compare")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| ([a-z_\[\].]+) \|", section, flags=re.MULTILINE)) - {"key"}
    printed = {key for key in document if key != "leases"} | {f"leases[].{key}" for key in lease}
    assert printed == documented

"""docs/json.md describes every key that is printed, with its type, and none that is not."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from cost.market.offers import load_reference_offers
from orchestrator import cli
from orchestrator.events import Event
from orchestrator.planning.history import record_start
from orchestrator.prices import table as prices
from orchestrator.prices.table import Prices, Unread
from orchestrator.runs import status as report
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs
from orchestrator.settings import Home
from orchestrator.supervisor.notify import message_of
from orchestrator.upkeep.doctor import Finding, Level
from orchestrator.upkeep.inventory import reconcile
from orchestrator.upkeep.stop_all import Ending
from orchestrator.views.facts.document import SCHEMA_VERSION, print_json
from orchestrator.views.facts.runs import run_facts
from orchestrator.views.facts.upkeep import ending_facts, examination_facts, inventory_facts
from tasks.recipe.load import load_recipe
from tests.orchestrator.upkeep.test_inventory import a_cloud
from tests.support.builders import make_lease
from tests.support.cloud_runs import ran_on

PAGE = Path(__file__).resolve().parents[3] / "docs" / "json.md"
ROW = re.compile(r"^\| (?P<key>[^|]+) \| (?P<type>[^|]+) \| (?P<meaning>[^|]*)\|$")
PLAIN = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
COMMANDS = {
    "slm plan RECIPE": (["plan", "1.5b", "--top", "2", "--explain", "--corpus", "fineweb"], ["plan", "demo"]),
    "slm plan --params": (["plan", "--params", "1e9..2e9", "--gpus", "H100-SXM,B200", "--explain"],),
    "slm estimate": (["estimate", "--model", "350m", "--gpu", "H100-SXM", "--gpus", "8"],),
    "slm frontier": (["frontier", "--params", "1e9..4e9", "--gpus", "H100-SXM"],),
    "slm simulate": (["simulate", "1.5b", "--gpus", "H100-SXM", "--runs", "5"],),
    "slm offers": (["offers", "--gpu", "H100-SXM"],),
    "slm gpus": (["gpus"],),
    "slm recipes": (["recipes"],),
    "slm status": (["status"],),
    "slm ledger": (["ledger", "demo-1"],),
    "slm reconcile": (["reconcile", "--dry-run"],),
    "slm doctor": (["doctor"],),
}
ELSEWHERE = {"slm export", "slm import", "slm ledger --compare"}
"""Sections that test_models.py holds to a run that was trained, and test_sky_costs.py to SkyPilot's report."""


def sections() -> dict[str, dict[str, str]]:
    """Heading to key to type."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif (row := ROW.match(line)) and row["key"].strip() != "key" and not row["key"].startswith("---"):
            assert row["key"].strip() not in found.setdefault(heading, {}), f"{heading}: {row['key']} twice"
            found[heading][row["key"].strip()] = row["type"].strip()
    return found


class Checker:
    """Compares documents with the page, and remembers which keys it has seen."""

    def __init__(self, page: dict[str, dict[str, str]]) -> None:
        self.page = page
        self.seen: dict[str, set[str]] = {}

    def check(self, value: Any, section: str, path: str = "") -> None:
        """Every key below `path` of a section."""
        keys = self.page[section]
        if path in keys:
            self.seen.setdefault(section, set()).add(path)
            self.check_type(value, keys[path], f"{section}: {path}")
        elif isinstance(value, dict):
            wild = f"{path}.*"
            named = any(key == wild or key.startswith(f"{wild}.") for key in keys)
            for name, setting in value.items():
                self.check(setting, section, wild if named else f"{path}.{name}".lstrip("."))
        elif isinstance(value, list):
            inside = f"{path}[]"
            assert any(key.startswith(inside) for key in keys), f"{section}: {path} is not documented"
            for setting in value:
                self.check(setting, section, inside)
        else:
            pytest.fail(f"{section}: {path} is printed and not documented")

    def check_type(self, value: Any, kind: str, where: str) -> None:
        """A plain type, an object of its own, or a list of either; null only where it is said."""
        kind, _, null = kind.partition(" or ")
        if value is None:
            assert null == "null", f"{where} is null"
            return
        kind, listed, _ = kind.partition(" list")
        if listed:
            assert isinstance(value, list), f"{where} is no list"
            for setting in value:
                self.check_type(setting, kind, where)
        elif kind.startswith("*"):
            self.check(value, kind.strip("*"))
        else:
            assert isinstance(value, PLAIN[kind]), f"{where}: {value!r} is no {kind}"
            assert kind == "boolean" or not isinstance(value, bool), f"{where}: {value!r} is a truth value"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A run with one lease, and a cache of prices that names everything that a cache can name."""
    home = Home(tmp_path_factory.mktemp("home")).create()
    offers = load_reference_offers().offers
    unread = (Unread("azure", "no network"),)
    prices.write_cache(Prices(offers, "test", 1, datetime.now(UTC), unread, ("aws", "verda", "vast")), home.offers)
    db = connect(home.database)
    runs = Runs(db)
    recipe = load_recipe("demo")
    created = runs.create(
        recipe_name="demo",
        recipe_digest="d",
        recipe_json=recipe.model_dump_json(),
        options=RunOptions("fake"),
        cap_usd=Decimal(100),
    )
    run = runs.take_over(created.run_id)
    lease = make_lease(
        next(offer for offer in offers if offer.cloud == "lambda"),
        lease_id=f"slm-abc123-{run.run_id}-1",
        run_id=run.run_id,
        num_nodes=2,
        worst_usd_per_hour=60,
        fencing_token=run.fencing_token,
    )
    ledger = Ledger(db, run.run_id, fencing_token=run.fencing_token)
    ledger.reserve(lease, expires_ms=1_800_000_060_000, latency_ms=0, at_ms=1_800_000_000_000)
    db.close()
    said = {"source_epochs": {"text": 0.5}, "start_seconds": {"load": 1.5, "first_step": 2.0}}
    ran_on(home, next(offer for offer in offers if offer.spot and offer.accelerator == "H100-SXM"), **said)
    record_start(home.starts, cloud="aws", seconds=90.0, parts={})
    return home


@pytest.fixture(scope="module")
def checker(home: Home) -> Checker:
    """After every command has been checked."""
    checked = Checker(sections())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_HOME", str(home.root))
        patch.setenv("SLM_REFRESH", "never")
        for section, calls in COMMANDS.items():
            for arguments in calls:
                out = io.StringIO()
                with redirect_stdout(out), pytest.raises(SystemExit) as end:
                    cli.main([*arguments, "--json"])
                assert not end.value.code, arguments
                document = json.loads(out.getvalue())
                assert next(iter(document)) == "version"
                for name, value in document.items():
                    checked.check(value, section, name)
        for section, facts in upkeep(home).items():
            out = io.StringIO()
            print_json(facts, out)
            for name, value in json.loads(out.getvalue()).items():
                checked.check(value, section, name)
    return checked


def upkeep(home: Home) -> dict[str, Any]:
    """What is printed of things that live, without any that does."""
    backend = a_cloud(f"slm-{home.owner_id()}-demo-2-1")
    backend.deaf_to_stop = True
    found = reconcile(home, [backend], sleep=lambda _: None)
    seen = replace(found, problems=("local: cannot list what is alive",))
    runs = tuple(report.status(None, home=home))
    warning = Event("warning", "80 % of the cap is spent", datetime.now(UTC), {"lease_id": "slm-abc123-demo-1-1"})
    return {
        "slm recover": {"runs": [run_facts(run) for run in runs]},
        "slm reconcile": inventory_facts(seen),
        "slm stop --all": ending_facts(Ending(runs, ("demo-1: it hangs",), False, seen)),
        "slm doctor": examination_facts([Finding("disk", Level.WARN, "full", "free some")]),
        "what --notify sends": json.loads(message_of(warning, "demo-1").body),
    }


@pytest.mark.parametrize("section", sorted(sections().keys() - ELSEWHERE))
def test_every_documented_key_is_printed(checker: Checker, section: str) -> None:
    assert set(checker.page[section]) - checker.seen.get(section, set()) == set()


def test_an_undocumented_key_is_noticed(checker: Checker) -> None:
    with pytest.raises(pytest.fail.Exception, match="spread: p99 is printed and not documented"):
        checker.check({"p99": 1.0}, "spread")
    with pytest.raises(AssertionError, match="spread: p10: 'much' is no number"):
        checker.check({"p10": "much"}, "spread")
    with pytest.raises(AssertionError, match="spread: p10 is null"):
        checker.check({"p10": None}, "spread")


def test_every_document_has_the_version_that_the_page_states() -> None:
    assert f"`version` is {SCHEMA_VERSION} in every document" in PAGE.read_text(encoding="utf-8")

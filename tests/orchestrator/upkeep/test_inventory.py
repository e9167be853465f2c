"""`slm reconcile`: what is ours and not paid for is ended, everything else stays as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.database import connect
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from orchestrator import cli
from orchestrator.backends.base import BackendError, Instance
from orchestrator.backends.fake import FakeBackend
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.backends.registry import every_backend
from orchestrator.clock import ManualClock
from orchestrator.runs.journal import enter, recover
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs, SupervisorLock
from orchestrator.runs.status import lock_path, open_runs
from orchestrator.settings import Home
from orchestrator.upkeep.inventory import Outcome, Verdict, reconcile
from tasks.recipe.load import load_recipe
from tests.support.backend_contract import OFFER, lease_of
from trainer.run_store.base import DirectoryStore

START_MS = 1_800_000_000_000
PAID_MS, LATENCY_MS = 60_000, 5_000


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def a_cloud(*names: str) -> FakeBackend:
    """Two nodes under each name, which the provider itself never ends."""
    backend = FakeBackend(ManualClock())
    for name in names:
        backend.start(replace(lease_of(name), first_grant_seconds=1e9), ["train"])
    return backend


def a_run(home: Home) -> str:
    db = connect(home.database)
    recipe = load_recipe("demo")
    created = Runs(db).create(
        recipe_name="demo",
        recipe_digest="d",
        recipe_json=recipe.model_dump_json(),
        options=RunOptions("fake"),
        cap_usd=Decimal(100),
    )
    db.close()
    return created.run_id


def in_the_ledger(home: Home, run_id: str, lease_id: str, *, attempt: int = 1, settled: bool = False) -> None:
    db = connect(home.database)
    run = Runs(db).take_over(run_id)
    ledger = Ledger(db, run_id, fencing_token=run.fencing_token)
    lease: Lease = replace(lease_of(lease_id), run_id=run_id, attempt=attempt, fencing_token=run.fencing_token)
    ledger.reserve(lease, expires_ms=START_MS + PAID_MS, latency_ms=LATENCY_MS, at_ms=START_MS)
    if settled:
        ledger.settle(lease_id, ended_ms=START_MS + 1000, at_ms=START_MS + 1000, outcome="asked")
    db.close()


def seconds_later(seconds: float) -> Callable[[Run, Ledger], int]:
    """Billed time of every run so many seconds after the reservation."""

    def now_ms(_run: Run, _ledger: Ledger) -> int:
        return START_MS + int(seconds * 1000)

    return now_ms


def verdicts(home: Home, backend: FakeBackend, *, after: float = 0.0) -> dict[str, Verdict]:
    found = reconcile(home, [backend], dry_run=True, now_ms=seconds_later(after))
    return {cluster.name: cluster.verdict for cluster in found.clusters}


def test_with_an_empty_ledger_all_that_carries_our_name_is_unknown_and_ended(home: Home) -> None:
    ours, theirs = f"slm-{home.owner_id()}-demo-1-1", "slm-ffffff-demo-1-1"
    backend = a_cloud(ours, theirs, "web-server")
    found = reconcile(home, [backend])
    assert {cluster.name: (cluster.verdict, cluster.outcome) for cluster in found.clusters} == {
        ours: (Verdict.UNKNOWN, Outcome.ENDED),
        theirs: (Verdict.FOREIGN, Outcome.KEPT),
        "web-server": (Verdict.FOREIGN, Outcome.KEPT),
    }
    assert {item.lease_id for item in backend.list_alive()} == {theirs, "web-server"}
    assert not home.database.exists(), "looking makes no ledger"


def test_what_is_paid_for_stays_until_its_last_terminator_has_had_its_time(home: Home) -> None:
    run_id = a_run(home)
    name = f"slm-{home.owner_id()}-{run_id}-1"
    in_the_ledger(home, run_id, name)
    backend = a_cloud(name)
    limit = (PAID_MS + LATENCY_MS) / 1000
    assert verdicts(home, backend, after=limit) == {name: Verdict.PAID}
    assert verdicts(home, backend, after=limit + 0.001) == {name: Verdict.EXPIRED}


def test_a_lease_of_a_living_supervisor_is_its_own_affair(home: Home) -> None:
    run_id = a_run(home)
    name = f"slm-{home.owner_id()}-{run_id}-1"
    in_the_ledger(home, run_id, name)
    with SupervisorLock(lock_path(home, run_id), run_id):
        assert verdicts(home, a_cloud(name), after=1e6) == {name: Verdict.SUPERVISED}


def test_a_run_that_another_machine_has_taken_over_is_not_ours_to_end(home: Home, tmp_path: Path) -> None:
    store = DirectoryStore(home.store_dir("demo-1"))
    name = f"slm-{home.owner_id()}-demo-1-1"
    with open_runs(home) as runs:
        a_run(home)
        run, journal = enter(runs, "demo-1", store, owner=home.owner_id())
        ledger = Ledger(runs.db, "demo-1", fencing_token=run.fencing_token, journal=journal)
        lease = replace(lease_of(name), run_id="demo-1", fencing_token=run.fencing_token)
        ledger.reserve(lease, expires_ms=START_MS + PAID_MS, latency_ms=LATENCY_MS, at_ms=START_MS)
    backend = a_cloud(name)
    assert verdicts(home, backend, after=1e6) == {name: Verdict.EXPIRED}
    other = Home(tmp_path / "other").create()
    with open_runs(other) as runs:
        recover(runs, store)
    assert verdicts(home, backend, after=1e6) == {name: Verdict.ELSEWHERE}
    found = reconcile(home, [backend], now_ms=seconds_later(1e6))
    assert [cluster.outcome for cluster in found.clusters] == [Outcome.KEPT]
    assert verdicts(other, backend, after=1) == {name: Verdict.PAID}, "and there it is, under its former name"
    unknown = a_cloud(f"slm-{home.owner_id()}-demo-1-2")
    assert set(verdicts(other, unknown).values()) == {Verdict.UNKNOWN}
    assert set(verdicts(other, a_cloud(f"slm-{home.owner_id()}-else-1-1")).values()) == {Verdict.FOREIGN}


def test_a_node_that_lives_though_the_ledger_has_settled_it_is_ended(home: Home) -> None:
    run_id = a_run(home)
    name = f"slm-{home.owner_id()}-{run_id}-1"
    in_the_ledger(home, run_id, name, settled=True)
    backend = a_cloud(name)
    found = reconcile(home, [backend], now_ms=seconds_later(1))
    assert [(cluster.verdict, cluster.outcome) for cluster in found.clusters] == [(Verdict.SETTLED, Outcome.ENDED)]
    assert not backend.list_alive()


def test_a_dry_run_ends_nothing(home: Home) -> None:
    backend = a_cloud(f"slm-{home.owner_id()}-demo-1-1")
    found = reconcile(home, [backend], dry_run=True)
    assert [cluster.outcome for cluster in found.clusters] == [Outcome.WOULD_END]
    assert found.orphans == found.clusters
    assert len(backend.list_alive()) == 2


def test_what_does_not_end_is_tried_again_and_then_told(home: Home) -> None:
    backend = a_cloud(f"slm-{home.owner_id()}-demo-1-1")
    backend.deaf_to_stop = True
    pauses: list[float] = []
    found = reconcile(home, [backend], sleep=pauses.append)
    assert len(pauses) == 2
    assert [(cluster.outcome, cluster.detail) for cluster in found.clusters] == [
        (Outcome.LEFT, "2 nodes are still listed")
    ]


def test_an_interface_that_fails_once_does_not_keep_a_node_alive(home: Home) -> None:
    backend = a_cloud(f"slm-{home.owner_id()}-demo-1-1")
    backend.fail_next = 1
    found = reconcile(home, [backend], sleep=lambda _: None)
    assert [cluster.outcome for cluster in found.clusters] == [Outcome.ENDED]


class Deaf(FakeBackend):
    """A cloud that does not even list."""

    def list_alive(self) -> Sequence[Instance]:
        raise BackendError("no route to the cloud")


def test_a_place_that_does_not_answer_hides_no_other(home: Home) -> None:
    name = f"slm-{home.owner_id()}-demo-1-1"
    found = reconcile(home, [Deaf(ManualClock()), a_cloud(name)])
    assert found.problems == ("fake: cannot list what is alive: no route to the cloud",)
    assert [cluster.outcome for cluster in found.clusters] == [Outcome.ENDED]


# ---------------------------------------------------------------- the local cloud, for real


@pytest.fixture
def market(home: Home) -> Iterator[LocalBackend]:
    """A market of a run that no ledger knows, with real processes."""
    backend = LocalBackend(
        home.run_dir("lost-1") / "market",
        "lost-1",
        store_uri=str(home.store_dir("lost-1")),
        market="calm",
        time_scale=1.0,
        seed=0,
        offers=[OFFER],
        on_notice=[],
        guard_period_seconds=0.1,
    )
    home.store_dir("lost-1").mkdir(parents=True)
    yield backend
    for node in backend.list_alive():
        backend.stop(lease_of(node.lease_id))


def rent(market: LocalBackend, name: str) -> None:
    lease = replace(lease_of(name), run_id="lost-1", first_grant_seconds=300.0)
    market.start(lease, [sys.executable, "-S", "-c", "import time; time.sleep(300)"])


def slm(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code if isinstance(end.value.code, int) else 0


def test_the_command_ends_real_nodes_of_a_run_that_no_ledger_knows(
    home: Home, market: LocalBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(home.root))
    ours = f"slm-{home.owner_id()}-lost-1-1"
    rent(market, ours)
    rent(market, "slm-ffffff-lost-1-1")
    assert slm("reconcile", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "1 would end" in said
    assert said.splitlines()[-1] == "Next: slm reconcile"
    assert len(market.list_alive()) == 4

    assert slm("reconcile", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["name"]: entry["result"] for entry in found["clusters"]} == {
        ours: "ended",
        "slm-ffffff-lost-1-1": "kept",
    }
    assert {node.lease_id for node in market.list_alive()} == {"slm-ffffff-lost-1-1"}

    assert slm("reconcile") == 0
    assert capsys.readouterr().out.startswith(f"No cluster of ours (slm-{home.owner_id()}-) is running.")


def test_a_market_whose_ledger_is_damaged_is_a_problem_and_an_exit_code(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(home.root))
    folder = home.run_dir("lost-1") / "market"
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text("{")
    assert slm("reconcile") == 1
    assert "cannot be read" in " ".join(capsys.readouterr().out.split())


def test_a_home_without_runs_has_no_place_to_look_at(home: Home) -> None:
    assert list(every_backend(home)) == []
    assert not list(home.root.iterdir())

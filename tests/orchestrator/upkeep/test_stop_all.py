"""`slm stop --all`: every unfinished run is asked first, then waited for, then whatever is left is ended."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.errors import SlmError
from cost.ledger.database import connect
from orchestrator import cli
from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from orchestrator.events import Emit, Event
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs, RunState
from orchestrator.runs.status import RunStatus, open_runs, status
from orchestrator.settings import Home
from orchestrator.supervisor import requests as launch
from orchestrator.upkeep.inventory import Inventory, reconcile
from orchestrator.upkeep.stop_all import stop_all
from tasks.recipe.load import load_recipe
from tests.orchestrator.upkeep.test_inventory import a_cloud
from tests.support.backend_contract import OFFER


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").create()


def add_runs(home: Home, *, number: int = 2) -> list[str]:
    """Runs that were asked for and never begun."""
    recipe = load_recipe("demo", ["local.market=calm"])
    db = connect(home.database)
    created = [
        Runs(db).create(
            recipe_name="demo",
            recipe_digest=str(item),
            recipe_json=recipe.model_dump_json(),
            options=RunOptions("local", offers=(OFFER,)),
            cap_usd=Decimal(5),
        )
        for item in range(number)
    ]
    db.close()
    return [run.run_id for run in created]


def requested(home: Home) -> dict[str, bool]:
    with open_runs(home) as runs:
        return {run.run_id: run.stop_requested for run in runs.all()}


class Stops:
    """Stands in for the waiting: `goes_wrong` says what happens at which run."""

    def __init__(self, **goes_wrong: BaseException) -> None:
        self.goes_wrong = {name.replace("_", "-"): error for name, error in goes_wrong.items()}
        self.told: list[Event] = []

    def __call__(self, run_id: str | None, *, home: Home, on_event: Emit) -> RunStatus:
        assert all(requested(home).values()), "all are asked before the first is waited for"
        if run_id in self.goes_wrong:
            raise self.goes_wrong[run_id]
        return status(run_id, home=home)[0]


def nothing_alive(home: Home) -> Inventory:
    return reconcile(home, [FakeBackend(ManualClock())])


def ignore(_: Event) -> None:
    pass


def test_every_unfinished_run_is_stopped_for_real(home: Home) -> None:
    names = add_runs(home)
    done = stop_all(launch.stop, home, ignore)
    assert [(run.run_id, run.state) for run in done.runs] == [(name, RunState.STOPPED) for name in names]
    assert not done.is_left
    again = stop_all(launch.stop, home, ignore)
    assert again.runs == ()
    assert not again.is_left


def test_one_that_does_not_stop_keeps_no_other_from_it(home: Home) -> None:
    add_runs(home)
    done = stop_all(Stops(demo_1=SlmError("its supervisor hangs.")), home, ignore, take_stock=nothing_alive)
    assert done.failures == ("demo-1: its supervisor hangs.",)
    assert len(done.runs) == 2
    assert done.is_left


def test_ctrl_c_ends_the_waiting_and_not_the_stopping(home: Home) -> None:
    add_runs(home)
    done = stop_all(Stops(demo_1=KeyboardInterrupt()), home, ignore, take_stock=nothing_alive)
    assert done.interrupted
    assert done.is_left
    assert requested(home) == {"demo-1": True, "demo-2": True}


def test_what_still_lives_afterwards_is_ended_and_counts_if_it_does_not(home: Home) -> None:
    backend = a_cloud(f"slm-{home.owner_id()}-gone-1-1")
    done = stop_all(Stops(), home, ignore, take_stock=lambda home: reconcile(home, [backend]))
    assert not backend.list_alive()
    assert not done.is_left
    stubborn = a_cloud(f"slm-{home.owner_id()}-gone-1-1")
    stubborn.deaf_to_stop = True
    done = stop_all(Stops(), home, ignore, take_stock=lambda home: reconcile(home, [stubborn], sleep=lambda _: None))
    assert done.is_left


def slm(*arguments: str, actions: Any = None) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments, actions=actions)
    return end.value.code if isinstance(end.value.code, int) else 0


def test_the_command_says_what_became_of_each(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    add_runs(home)
    assert slm("stop", "--all", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found["runs"]] == ["STOPPED", "STOPPED"]
    assert found["is_anything_left"] is False
    assert slm("stop", "--all") == 0
    assert capsys.readouterr().out.startswith("Nothing is running any more.")


class Hanging:
    """Actions of which no run ever stops."""

    def stop(self, *_: Any, **__: Any) -> Any:
        raise SlmError("run demo-1 did not stop within 120 s")


def test_the_exit_code_says_that_something_is_left(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    add_runs(home, number=1)
    assert slm("stop", "--all", actions=Hanging()) == 1
    said = capsys.readouterr().out
    assert said.startswith("Something may still be running.")
    assert "did not stop within 120 s" in said
    assert said.splitlines()[-1] == "Next: slm stop --all"


def test_all_and_a_name_contradict_each_other(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert slm("stop", "--all", "demo-1") == 2
    assert "remove demo-1" in capsys.readouterr().err

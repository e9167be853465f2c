"""The `slm` command: what it accepts, what it prints, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.errors import SlmError
from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from cost.market.offers import load_reference_offers
from orchestrator import cli
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs, RunState
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tests.support.builders import make_lease
from trainer.run_store.base import DirectoryStore

COMMANDS = ("plan", "launch", "status", "logs", "stop", "resume", "ledger", "recipes", "prepare", "reconcile", "doctor")


@dataclass(frozen=True)
class Ended:
    """How one command ended."""

    code: int
    out: str
    err: str


class Raising:
    """Actions of which `stop` goes wrong."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def stop(self, *_: Any, **__: Any) -> Any:
        raise self._error


Slm = Callable[..., Ended]
PROJECT = Path(cli.__file__).parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLM_REFRESH", "never")
    monkeypatch.delenv("COLUMNS", raising=False)
    return Home(tmp_path / "home")


@pytest.fixture
def slm(home: Home, capsys: pytest.CaptureFixture[str]) -> Slm:
    """Runs one command in this process."""

    def run(*arguments: str, actions: Any = None) -> Ended:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments, actions=actions)
        captured = capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def add_run(home: Home, *, name: str = "demo") -> str:
    """A run with one lease of two nodes, on which a minute of billed time was spent."""
    recipe = load_recipe("demo", ["training.num_steps=400"])
    db = connect(home.create().database)
    runs = Runs(db)
    created = runs.create(
        recipe_name=name,
        recipe_digest=name,
        recipe_json=recipe.model_dump_json(),
        options=RunOptions("fake"),
        cap_usd=Decimal(100),
    )
    run = runs.take_over(created.run_id)
    lease = make_lease(
        load_reference_offers().offers[0],
        lease_id=f"slm-abc123-{run.run_id}-1",
        run_id=run.run_id,
        num_nodes=2,
        worst_usd_per_hour=60,
        fencing_token=run.fencing_token,
    )
    ledger = Ledger(db, run.run_id, fencing_token=run.fencing_token)
    start = 1_800_000_000_000
    ledger.reserve(lease, expires_ms=start + 60_000, latency_ms=0, at_ms=start)
    ledger.accrue(lease.lease_id, at_ms=start + 30_000, usd_per_hour=Decimal(60))
    db.close()
    store = DirectoryStore(home.store_dir(run.run_id))
    progress = {"step": 100, "num_steps": 400, "tokens": 409_600, "loss": 4.5, "tokens_per_second": 20_480.0}
    store.write("progress/latest.json", json.dumps(progress).encode())
    store.write(f"logs/{lease.lease_id}-0.log", b"first\nsecond\n")
    return run.run_id


# ---------------------------------------------------------------- help, version, completion


def test_without_a_command_help_is_shown(slm: Slm) -> None:
    shown = slm()
    assert "Commands:" in shown.out + shown.err


def test_help_lists_every_command_and_an_example(slm: Slm) -> None:
    shown = slm("--help")
    assert shown.code == 0
    assert all(f"\n  {command} " in shown.out for command in COMMANDS)
    assert "slm launch demo --yes" in shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(slm: Slm, command: str) -> None:
    shown = slm(command, "--help")
    assert shown.code == 0
    assert f"Usage: slm {command} " in shown.out
    assert f"Examples:\n    slm {command}" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 110


@pytest.mark.parametrize(
    "command", ["plan", "launch", "status", "stop", "resume", "ledger", "recipes", "prepare", "reconcile", "doctor"]
)
def test_every_command_that_prints_facts_has_json(slm: Slm, command: str) -> None:
    assert "--json" in slm(command, "--help").out


def test_the_version_is_that_of_the_distribution(slm: Slm) -> None:
    from importlib.metadata import version

    assert slm("--version").out == f"slm-spot {version('slm-spot')}\n"


def test_shells_can_complete(slm: Slm) -> None:
    assert "--install-completion" in slm("--help").out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plann"], "Did you mean 'plan'?"),
        (["plan"], "name a recipe (`slm recipes` lists them), or let slm choose the size: --params max"),
        (["plan", "demo", "--bugdet", "3"], "No such option: --bugdet"),
        (["plan", "demo", "--budget", "ten"], "'ten' is not an amount of dollars such as 100 or 12.50."),
        (["plan", "demo", "--budget", "-3"], "-3 is not more than 0 dollars."),
        (["plan", "demo", "--budget", "nan"], "nan is not more than 0 dollars."),
        (["plan", "demo", "--budget", "0.0000001"], "is not more than 0 dollars."),
        (["plan", "demo", "--time-scale", "0"], "'0' should be a number above 0."),
        (["plan", "demo", "--time-scale", "fast"], "'fast' should be a number above 0."),
        (["plan", "demo", "--top", "0"], "greater than or equal to 1"),
        (["launch", "demo", "--nodes", "0"], "greater than or equal to 1"),
        (["launch", "demo", "--backend", "moon"], "'moon' is not one of 'local', 'sky'"),
        (["plan", "dmeo"], "no recipe is called 'dmeo'; did you mean demo?"),
        (["plan", "demo", "--set", "model.num_layer=2"], "did you mean model.num_layers?"),
        (["plan", "demo", "--market", "storm"], "should be calm, hazard:PER_HOUR or trace:FILE"),
        (["plan", "demo", "--market", "trace:/no/such/file"], "cannot read the market trace /no/such/file"),
        (["plan", "demo", "--gpus", "H10"], "no GPU is called 'H10'"),
        (["plan", "demo", "--clouds", "awz"], "no offer is of cloud 'awz'; did you mean aws?"),
        (["status", "demo-1"], "there is no run demo-1: nothing was launched yet; start with: slm launch demo"),
        (["logs"], "nothing was launched yet; start with: slm launch demo"),
        (["ledger"], "nothing was launched yet"),
        (["resume"], "nothing was launched yet"),
        (["stop"], "nothing was launched yet"),
    ],
)
def test_a_users_mistake_is_one_clear_message_and_exit_code_2(slm: Slm, arguments: list[str], message: str) -> None:
    ended = slm(*arguments)
    assert ended.code == 2
    assert message in ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err


def test_a_home_that_is_a_file_is_a_users_mistake(slm: Slm, home: Home) -> None:
    home.root.write_text("")
    ended = slm("status")
    assert ended.code == 2
    assert "set SLM_HOME to a folder that can be written to" in ended.err


def test_what_is_no_mistake_of_the_user_is_exit_code_1(slm: Slm) -> None:
    ended = slm("stop", actions=Raising(SlmError("the provider does not answer; try again later.")))
    assert (ended.code, ended.err) == (1, "Error: the provider does not answer; try again later.\n")


def test_a_bug_keeps_its_traceback(home: Home) -> None:
    actions: Any = Raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["stop"], actions=actions)


def test_a_reader_that_leaves_early_is_no_error(home: Home) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "plan", "demo", "--top", "400", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(cli.__file__).parents[1]
    ) as p:
        assert p.stdout is not None and p.stderr is not None
        p.stdout.read(10)
        p.stdout.close()
        assert p.stderr.read() == b""
        p.wait(timeout=60)


def test_letters_that_the_terminal_lacks_are_replaced(home: Home) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "orchestrator.cli", "plan", "demo", "--market", "calm"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


# ---------------------------------------------------------------- plan, recipes


def test_plan_answers_first_and_ends_with_the_launch_it_planned(slm: Slm, home: Home) -> None:
    shown = slm("plan", "demo", "--budget", "50", "--market", "hazard:0.5", "--top", "3", "--set", "seed=1")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0].startswith("Cheapest: 2 x ")
    assert "prices: reference table" in shown.out
    assert lines[-1] == "Next: slm launch demo --budget 50 --market hazard:0.5 --set seed=1"
    assert not home.root.exists()


def test_plan_as_json_says_the_same(slm: Slm) -> None:
    facts = json.loads(slm("plan", "demo", "--market", "calm", "--json", "--top=2", "--spot").out)
    assert facts["version"] == 2
    assert facts["next_command"] == "slm launch demo --market calm --spot"
    assert len(facts["ranked"]) == 2
    assert all(fact["offer"]["spot"] for fact in facts["ranked"])
    assert facts["best"]["layout"]["num_nodes"] == 2


def test_options_narrow_the_plan(slm: Slm) -> None:
    arguments = ["plan", "gpt2-124m", "--json", "--on-demand", "--clouds", "gcp,hyperbolic", "--gpus", "H100"]
    facts = json.loads(slm(*arguments, "--budget", "$1,000").out)
    assert facts["budget_usd"] == 1000
    assert {fact["offer"]["cloud"] for fact in facts["ranked"]} <= {"gcp", "hyperbolic"}
    assert all(fact["offer"]["accelerator"].startswith("H100") for fact in facts["ranked"])
    assert not any(fact["offer"]["spot"] for fact in facts["ranked"])


def test_nodes_are_as_many_as_asked_for(slm: Slm) -> None:
    facts = json.loads(slm("plan", "demo", "--market", "calm", "--nodes", "3", "--json").out)
    assert facts["best"]["layout"]["num_nodes"] == 3


def test_recipes_are_listed(slm: Slm) -> None:
    assert "\ndemo " in slm("recipes").out
    facts = json.loads(slm("recipes", "--json").out)
    assert {"name": "demo", "num_params": load_recipe("demo").num_params()}.items() <= facts["recipes"][0].items()


# ---------------------------------------------------------------- status, logs, ledger


def test_no_run_yet_is_said(slm: Slm) -> None:
    assert slm("status").out.startswith("There are no runs yet.")
    assert json.loads(slm("status", "--json").out)["runs"] == []


def test_the_only_run_need_not_be_named(slm: Slm, home: Home) -> None:
    run_id = add_run(home)
    assert slm("status").out.startswith(f"{run_id} is planned, unsupervised: step 100 of 400 (25 %), $1.00 of $100.00")
    assert slm("logs").out == f"slm-abc123-{run_id}-1-0: first\nslm-abc123-{run_id}-1-0: second\n"
    assert slm("ledger").out.startswith(f"{run_id} has spent $1.00 of $100.00; $1.00 reserved, $98.00 free.")


def test_of_several_runs_one_must_be_named(slm: Slm, home: Home) -> None:
    first, second = add_run(home), add_run(home, name="other")
    ended = slm("logs")
    assert ended.code == 2
    assert f"there are 2 runs, say which: {first} (planned), {second} (planned)" in ended.err
    assert slm("logs", second).code == 0
    assert slm("status").out.startswith("2 runs, 2 unfinished, $2.00 spent in total.")


def test_a_misspelt_run_is_answered_with_the_nearest(slm: Slm, home: Home) -> None:
    add_run(home)
    ended = slm("ledger", "dmeo-1")
    assert (ended.code, ended.err) == (2, "Error: there is no run dmeo-1; did you mean demo-1?\n")


def test_status_and_ledger_as_json(slm: Slm, home: Home) -> None:
    run_id = add_run(home)
    status = json.loads(slm("status", run_id, "--json").out)["runs"][0]
    assert (status["run_id"], status["step"], status["spent_usd"], status["state"]) == (run_id, 100, 1.0, "PLANNED")
    ledger = json.loads(slm("ledger", "--json").out)
    assert [entry["kind"] for entry in ledger["entries"]] == ["reserve", "accrue"]
    assert sum(entry["spent_usd"] for entry in ledger["entries"]) == ledger["spent_usd"] == 1.0


def test_logs_of_an_ended_run_can_be_followed_to_their_end(slm: Slm, home: Home) -> None:
    run_id = add_run(home)
    db = connect(home.database)
    Runs(db).move(run_id, RunState.STOPPED, fencing_token=1)
    db.close()
    assert slm("logs", "--follow").out.endswith("second\n")

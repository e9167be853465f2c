"""launch, resume, stop, prepare: what is shown and asked before anything acts, and what is told after."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.errors import UserError
from cost.market.offers import load_reference_offers
from orchestrator import cli
from orchestrator.backends.sky.enabled_clouds import Enabled
from orchestrator.commands.launching import finite, with_backend
from orchestrator.events import Emit, Event
from orchestrator.runs.options import LaunchRequest, RunOptions
from orchestrator.runs.records import RunState
from orchestrator.runs.status import RunStatus, RunSummary
from orchestrator.settings import Home
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.requests import launch as real_launch
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tests.support.cloud_runs import ran_on

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
FINISHED = RunStatus(
    run_id="demo-1",
    recipe_name="demo",
    state=RunState.SUCCEEDED,
    reason="",
    step=400,
    num_steps=400,
    tokens=1_638_400,
    loss=4.2,
    heldout_loss=4.21,
    tokens_per_second=20_000.0,
    spent_usd=Decimal(3),
    held_usd=Decimal(0),
    cap_usd=Decimal(100),
    preemptions=2,
    failures=0,
    num_nodes=0,
    eta_seconds=None,
    offer=None,
    checkpoint_step=400,
    updated_at=NOW,
    supervisor_alive=False,
)


@dataclass
class FakeActions:
    """Acts at once: tells one loss of a node, and ends with `status`."""

    status: RunStatus = FINISHED
    called: dict[str, Any] = field(default_factory=dict)

    def launch(
        self, request: LaunchRequest, *, home: Home, on_event: Emit, switch: StopSwitch | None = None
    ) -> RunSummary:
        options = request.options
        self.called = {
            "action": "launch",
            "recipe": request.recipe,
            "offers": options.offers,
            "budget_usd": request.budget_usd,
            "switch": switch,
            "interval": options.checkpoint_interval_seconds,
            "notify": request.notify_target,
            "losses": options.losses,
            "single_supervisor": options.single_supervisor,
            "store": request.store,
            "allow_unguarded": options.allow_unguarded,
        }
        return self._supervised(home, on_event)

    def resume(
        self,
        run_id: str | None,
        *,
        home: Home,
        budget_usd: Decimal | None,
        on_event: Emit,
        switch: StopSwitch | None = None,
        notify_target: str | None = None,
        single_supervisor: bool = False,
    ) -> RunSummary:
        self.called = {"action": "resume", "run_id": run_id, "budget_usd": budget_usd, "switch": switch}
        self.called["notify"] = notify_target
        self.called["single_supervisor"] = single_supervisor
        return self._supervised(home, on_event)

    def stop(self, run_id: str | None, *, home: Home, on_event: Emit) -> RunStatus:
        self.called = {"action": "stop", "run_id": run_id}
        return self._supervised(home, on_event).status

    def recover(self, store_uri: str, *, home: Home) -> RunStatus:
        self.called = {"action": "recover", "store": store_uri}
        return self.status

    def prepare(self, recipe: Recipe, *, home: Home, on_event: Emit) -> Path:
        on_event(Event("prepare", "preparing data", NOW))
        self.called = {"action": "prepare", "recipe": recipe}
        return home.data_root / "abc"

    def _supervised(self, home: Home, on_event: Emit) -> RunSummary:
        assert home.root.is_dir()
        on_event(Event("lost", "node 1 is gone", NOW, {"ranks": [1]}))
        result = {"first_heldout_loss": 6.95, "heldout_loss": 4.21, "unigram_entropy": 5.15}
        return RunSummary(self.status, result, wall_seconds=200.0, billed_seconds=48_000.0, events=())


class Terminal(io.StringIO):
    """An input at which a person sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLM_REFRESH", "never")
    monkeypatch.delenv("COLUMNS", raising=False)
    return Home(tmp_path / "home")


def slm(*arguments: str, actions: FakeActions | None = None) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments, actions=actions or FakeActions())
    return end.value.code if isinstance(end.value.code, int) else 0


# ---------------------------------------------------------------- launch


def test_launch_shows_the_plan_and_the_worst_case_then_runs_and_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    assert slm("launch", "demo", "--market", "calm", "--yes", actions=actions) == 0
    out = capsys.readouterr().out
    parts = ["Cheapest: 2 x ", "expected bill $", "Worst case: $", "node 1 is gone", "finished in 3 min 20 s", "Next: "]
    assert sorted(parts, key=out.index) == parts
    assert actions.called["recipe"].name == "demo"
    assert actions.called["budget_usd"] is None
    assert isinstance(actions.called["switch"], StopSwitch)


def test_launch_is_planned_by_the_same_objective_and_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    wishes = ("--budget", "60", "--objective", "hours", "--deadline", "30h")
    slm("plan", "350m", *wishes, "--json", "--top", "500")
    facts = json.loads(capsys.readouterr().out)
    assert facts["next_command"] == "slm launch 350m --budget 60 --objective hours --deadline 30h"
    slm("launch", "350m", *wishes, "--backend", "sky", "--yes", actions=actions)
    assert [fact["offer"]["offer_id"] for fact in facts["ranked"]] == [
        offer.offer_id for offer in actions.called["offers"]
    ]
    assert "Fastest: " in capsys.readouterr().out


def test_launch_rents_in_the_order_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    slm("launch", "demo", "--market", "calm", "--yes", "--spot", "--clouds", "gcp,aws", actions=actions)
    assert {offer.cloud for offer in actions.called["offers"]} == {"gcp", "aws"}
    assert all(offer.spot for offer in actions.called["offers"])
    capsys.readouterr()
    slm("plan", "demo", "--market", "calm", "--spot", "--clouds", "gcp,aws", "--json")
    planned = json.loads(capsys.readouterr().out)["best"]["offer"]["offer_id"]
    assert actions.called["offers"][0].offer_id == planned


def test_options_of_launch_are_fields_of_the_recipe() -> None:
    actions = FakeActions()
    options = ["--market", "hazard:0.5", "--time-scale", "30", "--nodes", "3", "--set", "seed=7", "--budget", "12.5"]
    slm("launch", "demo", "--yes", *options, actions=actions)
    recipe = actions.called["recipe"]
    assert (recipe.local.market, recipe.local.time_scale, recipe.seed) == ("hazard:0.5", 30.0, 7)
    assert (recipe.nodes.min, recipe.nodes.max) == (1, 3)
    assert actions.called["budget_usd"] == Decimal("12.5")


def test_fewer_nodes_than_the_recipes_fewest_are_possible() -> None:
    actions = FakeActions()
    arguments = ["--market", "calm", "--set", "nodes.min=2", "--nodes", "1", "--yes"]
    slm("launch", "demo", *arguments, actions=actions)
    assert (actions.called["recipe"].nodes.min, actions.called["recipe"].nodes.max) == (1, 1)


def test_a_trace_file_is_passed_on_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("- {at_seconds: 10, action: kill, rank: 1}\n")
    monkeypatch.chdir(tmp_path)
    actions = FakeActions()
    slm("launch", "demo", "--market", "trace:mine.yaml", "--yes", actions=actions)
    assert actions.called["recipe"].local.market == f"trace:{tmp_path / 'mine.yaml'}"


def test_launch_asks_and_a_no_rents_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Home
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    actions = FakeActions()
    assert slm("launch", "demo", "--market", "calm", actions=actions) == 1
    shown = capsys.readouterr()
    assert "Launch demo with a cap of 100 dollars? [y/N]" in shown.err
    assert "Nothing was rented." in shown.err
    assert actions.called == {}
    assert not home.root.exists()


def test_a_yes_at_the_terminal_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    actions = FakeActions()
    assert slm("launch", "demo", "--market", "calm", actions=actions) == 0
    assert actions.called["action"] == "launch"


def test_without_a_terminal_a_question_is_a_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    actions = FakeActions()
    assert slm("launch", "demo", "--market", "calm", actions=actions) == 2
    assert "the input is not a terminal, so nobody can confirm; add --yes" in capsys.readouterr().err
    assert actions.called == {}


def test_yes_accepts_a_budget_that_pays_for_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    assert slm("launch", "demo", "--market", "calm", "--budget", "0.10", "--yes", actions=actions) == 0
    assert "Warning: $0.100 pays for about " in capsys.readouterr().out
    assert actions.called["budget_usd"] == Decimal("0.10")


def test_yes_on_a_paid_backend_needs_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    assert slm("launch", "demo", "--backend", "sky", "--yes", actions=actions) == 2
    assert "--yes on the paid backend sky needs an explicit --budget; for example: --budget" in capsys.readouterr().err
    assert actions.called == {}
    assert slm("launch", "demo", "--backend", "sky", "--yes", "--budget", "5", actions=actions) == 0


def test_a_recipe_without_a_backend_rents_nothing_by_accident(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # a SkyPilot that has never been told of a cloud
    actions = FakeActions()
    assert slm("launch", "gpt2-124m", "--yes", "--budget", "5", actions=actions) == 2
    said = capsys.readouterr().err
    assert "names no backend, and SkyPilot has no cloud credentials, so nothing was rented; add --backend local" in said
    assert actions.called == {}


def test_a_recipe_without_a_backend_rents_where_skypilot_has_credentials() -> None:
    recipe = load_recipe("gpt2-124m")
    assert with_backend(recipe, lambda: Enabled(("gcp",))).backend == "sky"
    assert with_backend(recipe, lambda: Enabled(problem="hangs")).backend is None
    assert with_backend(load_recipe("demo"), lambda: Enabled(("gcp",))).backend == "local"


def test_a_failed_run_ends_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    failed = FakeActions(replace(FINISHED, state=RunState.FAILED, reason="training failed twice at step 3: boom"))
    assert slm("launch", "demo", "--market", "calm", "--yes", actions=failed) == 1
    assert "demo-1 failed: training failed twice at step 3: boom" in capsys.readouterr().out


@pytest.mark.parametrize("state", [RunState.STOPPED, RunState.OUT_OF_BUDGET])
def test_a_run_that_stopped_as_it_was_told_is_no_failure(state: RunState) -> None:
    assert slm("resume", actions=FakeActions(replace(FINISHED, state=state))) == 0


def test_with_json_the_output_is_the_summary_alone(capsys: pytest.CaptureFixture[str]) -> None:
    slm("launch", "demo", "--market", "calm", "--yes", "--json")
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert facts["run"]["run_id"] == "demo-1"
    assert facts["result"]["heldout_loss"] == 4.21
    assert "node 1 is gone" in shown.err


def test_a_market_without_losses_needs_no_checkpoint_interval() -> None:
    actions = FakeActions()
    slm("launch", "demo", "--market", "calm", "--spot", "--yes", actions=actions)
    assert finite(float("inf")) is None
    assert finite(15.0) == 15.0
    assert actions.called["interval"] is None or actions.called["interval"] > 0


def test_the_trainer_is_told_of_the_losses_that_the_plan_believes() -> None:
    actions = FakeActions()
    slm("launch", "demo", "--market", "hazard:0.5", "--spot", "--time-scale", "60", "--yes", actions=actions)
    losses = actions.called["losses"]
    assert losses.losses / losses.node_hours == pytest.approx(0.5)
    assert losses.time_scale == 60
    assert losses.restart_seconds > 0


def test_a_single_supervisor_is_promised_by_an_option() -> None:
    actions = FakeActions()
    slm("launch", "demo", "--market", "calm", "--yes", actions=actions)
    assert actions.called["single_supervisor"] is False
    slm("launch", "demo", "--market", "calm", "--yes", "--single-supervisor", actions=actions)
    assert actions.called["single_supervisor"] is True
    slm("resume", "demo-1", "--single-supervisor", actions=actions)
    assert actions.called["single_supervisor"] is True


# ---------------------------------------------------------------- resume, stop, prepare


def test_resume_goes_on_with_a_new_cap(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    assert slm("resume", "demo-1", "--budget", "150", actions=actions) == 0
    assert (actions.called["run_id"], actions.called["budget_usd"]) == ("demo-1", Decimal(150))
    assert "6.950 -> 4.210" in capsys.readouterr().out


def test_stop_tells_what_happens_and_ends_with_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions(replace(FINISHED, state=RunState.STOPPED))
    assert slm("stop", actions=actions) == 0
    shown = capsys.readouterr()
    assert "node 1 is gone" in shown.err
    assert shown.out.startswith("demo-1 is stopped: ")
    assert shown.out.splitlines()[-1] == "Next: slm resume demo-1"
    slm("stop", "demo-1", "--json", actions=actions)
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "STOPPED"


def test_prepare_says_where_the_data_lies(capsys: pytest.CaptureFixture[str], home: Home) -> None:
    actions = FakeActions()
    assert slm("prepare", "demo", "--set", "data.max_bytes=1000000", actions=actions) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].startswith("Data of demo: ")
    assert shown.out.splitlines()[-1] == "Next: slm launch demo --set data.max_bytes=1000000"
    assert actions.called["recipe"].data.max_bytes == 1_000_000
    slm("prepare", "demo", "--json")
    assert json.loads(capsys.readouterr().out)["data_dir"] == str(home.data_root / "abc")


# ---------------------------------------------------------------- precision


def test_a_launch_that_costs_money_says_how_likely_it_finishes(capsys: pytest.CaptureFixture[str]) -> None:
    slm("launch", "350m", "--backend", "sky", "--budget", "100", "--yes")
    assert " simulated runs train all tokens under the cap of $100.00" in " ".join(capsys.readouterr().out.split())
    slm("launch", "demo", "--market", "calm", "--yes")
    assert "simulated runs" not in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "precision"), [("H100-SXM,V100", "bf16"), ("V100", "fp32")])
def test_a_launch_fixes_the_precision_that_the_plan_left_open(gpus: str, precision: str) -> None:
    actions = FakeActions()
    wishes = ("--precision", "auto", "--gpus", gpus, "--backend", "sky", "--budget", "100", "--yes")
    assert slm("launch", "350m", *wishes, actions=actions) == 0
    assert actions.called["recipe"].precision == precision
    kinds = {offer.accelerator for offer in actions.called["offers"]}
    assert kinds == ({"H100-SXM"} if precision == "bf16" else {"V100"})


def test_a_launch_after_a_crash_goes_on_in_the_precision_that_its_run_began_with(home: Home) -> None:
    auto = load_recipe("350m", ["backend=sky", "precision=auto"])
    (v100,) = [offer for offer in load_reference_offers().offers if offer.accelerator == "V100"][:1]
    ran_on(home, v100, recipe=auto.in_precision("fp32"))
    actions = FakeActions()
    wishes = ("--precision", "auto", "--gpus", "H100-SXM", "--backend", "sky", "--budget", "100", "--yes")
    slm("launch", "350m", *wishes, actions=actions)
    assert actions.called["recipe"] == auto.in_precision("fp32")


def test_no_run_is_created_with_an_open_precision(home: Home) -> None:
    auto = load_recipe("demo", ["precision=auto"])
    with pytest.raises(UserError, match="leaves precision auto to the planner"):
        real_launch(LaunchRequest(auto, RunOptions("local")), home=home, on_event=lambda event: None)
    assert not home.database.exists()


def test_the_plan_names_the_launch_with_the_same_precision(capsys: pytest.CaptureFixture[str]) -> None:
    slm("plan", "350m", "--precision", "auto", "--gpus", "V100", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["next_command"] == "slm launch 350m --precision auto --gpus V100"
    assert facts["best"]["layout"]["precision"] == facts["model"]["precision"] == "fp32"
    assert slm("plan", "350m", "--precision", "bf16", "--gpus", "V100") == 2
    assert "V100 has no bf16 units" in capsys.readouterr().err


def test_recover_hands_over_the_whole_path_and_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    actions = FakeActions()
    assert slm("recover", "--store", "demo-store", actions=actions) == 0
    assert actions.called == {"action": "recover", "store": str(Path("demo-store").absolute())}
    assert f"Next: slm resume {FINISHED.run_id}" in capsys.readouterr().out


def test_a_bucket_is_handed_over_as_it_was_written() -> None:
    actions = FakeActions()
    assert slm("recover", "--store", "s3://bucket/run", "--json", actions=actions) == 0
    assert actions.called["store"] == "s3://bucket/run"


def test_recovering_from_a_folder_without_a_ledger_is_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        cli.main(["recover", "--store", str(tmp_path / "empty")])
    assert end.value.code == 2 and "holds no ledger of a run" in capsys.readouterr().err

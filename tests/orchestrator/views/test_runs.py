"""Tables and sentences about runs and ledger, and the same facts as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cost.ledger.accounts import LeaseAccount
from cost.ledger.ledger import Balance, EntryKind, LedgerEntry
from orchestrator.runs.records import RunState
from orchestrator.runs.status import LedgerView, RunStatus, RunSummary
from orchestrator.views import runs as render
from orchestrator.views.facts.document import SCHEMA_VERSION, plain, print_json
from orchestrator.views.facts.runs import ledger_facts, summary_facts
from tasks.recipe.load import RecipeSummary
from tests.support.builders import make_lease, make_offer

RUNNING = RunStatus(
    run_id="demo-1",
    recipe_name="demo",
    state=RunState.RUNNING,
    reason="",
    step=180,
    num_steps=400,
    tokens=737_280,
    loss=4.3,
    heldout_loss=4.41,
    tokens_per_second=20_500.0,
    spent_usd=Decimal("12.30"),
    held_usd=Decimal("3.10"),
    cap_usd=Decimal(100),
    preemptions=1,
    failures=0,
    num_nodes=2,
    eta_seconds=44.0,
    offer="aws/us-east-2/H100-SXMx8/p5/spot",
    checkpoint_step=160,
    updated_at=datetime(2026, 11, 23, 12, tzinfo=UTC),
    supervisor_alive=True,
)
RESULT = {"first_heldout_loss": 6.95, "heldout_loss": 4.21, "unigram_entropy": 5.15, "outcome": "finished"}


def shown(draw: Any, *facts: Any, width: int = 100) -> str:
    """What a pipe of that width gets, without spaces at the ends of lines."""
    stream = io.StringIO()
    draw(*facts, Console(file=stream, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def ended(state: RunState, **changes: Any) -> RunSummary:
    status = replace(RUNNING, state=state, supervisor_alive=False, eta_seconds=None, **changes)
    result = RESULT if state is RunState.SUCCEEDED else None
    return RunSummary(status=status, result=result, wall_seconds=200.0, billed_seconds=48_000.0, events=())


# ---------------------------------------------------------------- status


def test_no_run_is_answered_with_the_way_to_the_first() -> None:
    assert shown(render.statuses, []) == "There are no runs yet.\n\nNext: slm launch demo"


def test_one_run_is_answered_in_its_first_line() -> None:
    text = shown(render.statuses, [RUNNING])
    first, *_, last = text.splitlines()
    assert first == "demo-1 is running: step 180 of 400 (45 %), $12.30 of $100.00 spent, about 44 s left."
    assert last == "Next: slm logs demo-1 -f"
    assert "4.300, held-out 4.410" in text
    assert "20.5K tokens/s on 2 nodes" in text
    assert "1 preemption, 0 failures" in text


def test_a_run_that_nobody_supervises_says_so() -> None:
    text = shown(render.statuses, [replace(RUNNING, supervisor_alive=False)])
    assert text.startswith("demo-1 is running, unsupervised: ")
    assert "No supervisor is running: the nodes terminate when their grants expire." in text
    assert text.endswith("Next: slm resume demo-1")


def test_a_run_before_its_first_step_has_no_figures() -> None:
    early = replace(RUNNING, step=None, tokens=None, loss=None, heldout_loss=None, tokens_per_second=None, offer=None)
    text = shown(render.statuses, [replace(early, eta_seconds=None)])
    assert text.startswith("demo-1 is running: step - of 400, $12.30 of $100.00 spent.")


def test_a_run_without_nodes_is_not_said_to_train_on_none() -> None:
    text = shown(render.statuses, [replace(RUNNING, state=RunState.STOPPED, num_nodes=0)])
    assert "20.5K tokens/s when it last trained" in text


def test_several_runs_are_a_table() -> None:
    done = replace(RUNNING, run_id="demo-2", state=RunState.SUCCEEDED, spent_usd=Decimal("30.005"))
    lines = shown(render.statuses, [RUNNING, done]).splitlines()
    assert lines[0] == "2 runs, 1 unfinished, $42.30 spent in total."
    assert lines[2].split() == [
        "run",
        "state",
        "steps",
        "loss",
        "(nats)",
        "tokens/s",
        "spent",
        "$",
        "cap",
        "$",
        "lost",
        "left",
    ]
    assert lines[3].split() == ["demo-1", "running", "180/400", "4.410", "20.5K", "12.30", "100.00", "1", "44", "s"]
    assert lines[4].split() == ["demo-2", "succeeded", "180/400", "4.410", "20.5K", "30.00", "100.00", "1", "-"]
    assert lines[3].index("180/400") == lines[4].index("180/400")


@pytest.mark.parametrize(
    ("state", "following"),
    [
        (RunState.SUCCEEDED, "slm ledger demo-1"),
        (RunState.OUT_OF_BUDGET, "slm resume demo-1 --budget MORE   (more than $100.00)"),
        (RunState.FAILED, "slm logs demo-1"),
        (RunState.STOPPED, "slm resume demo-1"),
    ],
)
def test_the_next_command_follows_from_the_state(state: RunState, following: str) -> None:
    assert render.next_command(replace(RUNNING, state=state, supervisor_alive=False)) == following


# ---------------------------------------------------------------- summary


def test_a_finished_run_says_what_it_learnt_and_cost() -> None:
    text = shown(render.summary, ended(RunState.SUCCEEDED))
    assert text.splitlines()[1] == "demo-1 finished in 3 min 20 s; $12.30 of $100.00 spent."
    assert "6.950 -> 4.210, fell by 2.740" in text
    assert "5.150; the model ends 0.940 below it" in text
    assert "$12.30 of the $100.00 cap (12 %)" in text
    assert "13 h 20 min of node time, in 3 min 20 s here" in text


def test_goodput_is_shown_where_it_is_known() -> None:
    summary = ended(RunState.SUCCEEDED)
    assert "goodput" not in shown(render.summary, summary)
    text = shown(render.summary, replace(summary, goodput=0.714))
    assert "71 % of the billed time became training steps that were kept" in text
    assert summary_facts(replace(summary, goodput=0.714))["goodput"] == 0.714


def test_a_model_above_the_unigram_entropy_is_not_said_to_be_below() -> None:
    summary = replace(ended(RunState.SUCCEEDED), result={**RESULT, "heldout_loss": 5.25})
    assert "the model ends 0.100 above it" in shown(render.summary, summary)


def test_a_run_at_its_cap_says_what_is_saved() -> None:
    lines = shown(render.summary, ended(RunState.OUT_OF_BUDGET)).splitlines()
    assert lines[1] == "demo-1 stopped at its cap: step 160 is saved, $12.30 of $100.00 spent."
    early = shown(render.summary, ended(RunState.OUT_OF_BUDGET, checkpoint_step=None))
    assert "stopped at its cap: nothing is saved yet" in early


def test_a_failed_run_says_why() -> None:
    text = shown(render.summary, ended(RunState.FAILED, reason="training failed twice at step 3: boom"))
    assert "demo-1 failed: training failed twice at step 3: boom; $12.30" in text
    assert "demo-1 failed: see its logs" in shown(render.summary, ended(RunState.FAILED))


def test_a_stopped_run_says_where() -> None:
    assert "demo-1 is stopped: step 180 of 400 (45 %)" in shown(render.summary, ended(RunState.STOPPED))


# ---------------------------------------------------------------- ledger

OFFER = make_offer(region="us-east-2", instance_type="p5", gpus_per_node=8, usd_per_hour=8, as_of="2026-07-30")
LEASE_ID = "slm-abc123-demo-1-1"
ACCOUNT = LeaseAccount(
    lease=make_lease(OFFER, lease_id=LEASE_ID, num_nodes=2, worst_usd_per_hour=8, kill_latency_seconds=5.0),
    state="settled",
    num_nodes=0,
    price_micro_usd=8_000_000,
    worst_micro_usd=8_000_000,
    latency_ms=5000,
    started_ms=1_800_000_000_000,
    accrued_until_ms=1_800_000_450_000,
    expires_ms=1_800_000_450_000,
    ended_ms=1_800_000_450_000,
    accrued_units=2 * 8_000_000 * 450_000,
    outcome="preempted",
)
LEDGER = LedgerView(
    run_id="demo-1",
    balance=Balance(Decimal(100), Decimal(2), Decimal("0.5")),
    entries=(
        LedgerEntry(7, LEASE_ID, EntryKind.RESERVE, "k/0", 0, 2_500_000, 1_800_000_000_000, "2 x p5"),
        LedgerEntry(
            8, "slm-abc123-demo-1-1", EntryKind.ACCRUE, "k/1", 2_000_000, -2_000_000, 1_800_000_450_000, "450 s"
        ),
    ),
    leases=(ACCOUNT,),
)


def test_the_ledger_begins_with_the_balance_and_shows_every_entry() -> None:
    lines = shown(render.ledger, LEDGER).splitlines()
    assert lines[0] == "demo-1 has spent $2.00 of $100.00; $0.500 reserved, $97.50 free."
    assert lines[3].split() == ["7", "01-15", "08:00:00", "pretrain", "1", "reserve", "+2.500000", "2", "x", "p5"]
    charged = ["8", "01-15", "08:07:30", "pretrain", "1", "accrue", "+2.000000", "-2.000000", "450", "s"]
    assert lines[4].split() == charged
    assert lines[5].split() == ["balance", "2.000000", "0.500000", "97.500000", "free"]
    assert lines[-1] == "Next: slm status demo-1"


def test_the_ledger_as_json_is_in_dollars() -> None:
    facts = plain(ledger_facts(LEDGER))
    assert (facts["cap_usd"], facts["spent_usd"], facts["reserved_usd"], facts["free_usd"]) == (100, 2, 0.5, 97.5)
    assert facts["entries"][1]["spent_usd"] == 2.0
    assert facts["entries"][1]["stage"] == facts["leases"][0]["stage"] == "pretrain"
    assert facts["entries"][1]["billed_at"] == "2027-01-15T08:07:30+00:00"
    assert facts["leases"][0]["spent_usd"] == 2.0
    assert facts["leases"][0]["outcome"] == "preempted"


# ---------------------------------------------------------------- the rest


def test_recipes_are_a_table_with_sizes() -> None:
    lines = [
        RecipeSummary("demo", "Learns [fast].", 789_712, 1_638_400),
        RecipeSummary("big", "", 1_100_000_000, 22 * 10**9),
    ]
    text = shown(render.recipes, lines).splitlines()
    assert text[0] == "2 built-in recipes; commands also accept the path of a YAML file."
    assert text[3].split() == ["demo", "790K", "1.64M", "Learns", "[fast]."]
    assert text[4].split() == ["big", "1.10B", "22.0B"]
    assert text[-1] == "Next: slm plan demo"


def test_long_lines_of_a_list_go_on_under_their_beginning() -> None:
    text = shown(lambda lines, console: render.bullets(console, lines), ["one two three four", "five"], width=12)
    assert text.splitlines() == ["- one two", "  three four", "- five"]


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Facts:
    money: Decimal
    at: datetime
    colour: Colour
    path: Path
    several: tuple[float, ...]


def test_json_has_plain_values_and_a_version() -> None:
    stream = io.StringIO()
    at = datetime(2026, 11, 23, tzinfo=UTC)
    print_json(Facts(Decimal("1.5"), at, Colour.RED, Path("/a"), (1.0, float("inf"), float("nan"))), stream)
    assert json.loads(stream.getvalue()) == {
        "version": SCHEMA_VERSION,
        "money": 1.5,
        "at": "2026-11-23T00:00:00+00:00",
        "colour": "red",
        "path": "/a",
        "several": [1.0, None, None],
    }


def test_a_pipe_has_a_fixed_width_unless_columns_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert render.console_on(io.StringIO()).width == 100
    monkeypatch.setenv("COLUMNS", "133")
    assert render.console_on(io.StringIO()).width == 133

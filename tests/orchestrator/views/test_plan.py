"""What `slm plan` and `slm launch` say about a plan."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cost.market.preemption import Sighting
from cost.plan.planner import Plan
from cost.plan.plans import Chance, known_loss
from orchestrator.planning import analysis as advice
from orchestrator.planning import recipe_plan as planning
from orchestrator.planning.history import History, read_history
from orchestrator.prices.table import Prices, Unread
from orchestrator.settings import Home
from orchestrator.views import plan as render_plan
from orchestrator.views.facts import plan as plan_facts
from orchestrator.views.facts.document import plain
from tasks.recipe.load import load_recipe
from tests.support.builders import make_offer
from tests.support.cloud_runs import ran_on

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SPOT = make_offer(
    region="us-east-2",
    zone="us-east-2b",
    instance_type="p5.48xlarge",
    gpus_per_node=8,
    usd_per_hour=8,
    on_demand_usd_per_hour=32,
    as_of="2026-11-13",
)
ON_DEMAND = replace(SPOT, spot=False, usd_per_hour=Decimal(32))
UNDATED = replace(SPOT, cloud="vast", region="any", zone=None, as_of="undated", usd_per_hour=Decimal(4))
PRICES = Prices((SPOT, ON_DEMAND), "test table", num_skipped=3)


def plan_of(*overrides: str, prices: Prices = PRICES, budget: int = 100, **asked: Any) -> Plan:
    recipe = load_recipe("gpt2-124m", overrides)
    return planning.make_plan_for(recipe, prices, budget_usd=Decimal(budget), **asked)


def full(
    plan: Plan, prices: Prices = PRICES, *, width: int = 100, top: int = 10, chance: Chance | None = None
) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    render_plan.full(plan, prices, console, chance=chance, top=top, now=NOW, next_command="slm launch x")
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def short(plan: Plan, prices: Prices = PRICES) -> str:
    stream = io.StringIO()
    render_plan.short(plan, prices, Console(file=stream, width=1000, highlight=False), now=NOW)
    return stream.getvalue()


def test_the_first_line_answers_and_names_the_age_of_the_price() -> None:
    plan = plan_of()
    best = planning.winner(plan)
    first = full(plan, width=200)[0]
    cost = f"${best.total_usd:.2f}, {float(best.usd_per_param):.2e} $/param"
    assert first == f"Cheapest: 1 x 8xH100-SXM spot at aws us-east-2b: {cost} (prices: test table, 10 days old)"


def test_an_undated_price_is_said_to_be_undated_and_no_region_is_named_any() -> None:
    prices = Prices((UNDATED,), "test table")
    first = full(plan_of(prices=prices), prices, width=200)[0]
    assert "spot at vast: $" in first
    assert first.endswith("(prices: test table, undated)")


def test_the_table_shows_what_was_promised_in_aligned_columns() -> None:
    plan = plan_of()
    lines = full(plan)
    head = lines[2]
    assert " ".join(head.split()) == (
        "cloud region nodes x GPUs kind $/h tokens/s hours total $ $/param loss (nats) preempt."
    )
    rows = lines[lines.index(head) + 1 :][:2]
    assert [row.split()[5] for row in rows] == ["spot", "on-demand"]
    for column in ("total $", "$/param"):
        ends = head.index(column) + len(column)
        assert all(row[ends - 1].isdigit() and row[ends : ends + 1] in ("", " ") for row in rows)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_nothing_is_wider_than_the_console(width: int) -> None:
    assert max(len(line) for line in full(plan_of(), width=width)[1:]) <= width  # the answer is one line to copy


def test_a_narrow_console_keeps_the_columns_that_decide() -> None:
    text = "\n".join(full(plan_of(), width=80))
    assert "preempt." not in text
    assert "$/param" in text
    assert "total $" in text


def test_top_limits_the_rows() -> None:
    assert sum(line.startswith("aws ") for line in full(plan_of(), top=1)) == 1
    assert sum(line.startswith("aws ") for line in full(plan_of(), top=9)) == 2


def test_the_bill_is_the_sum_of_its_lines() -> None:
    best = planning.winner(plan_of())
    text = render_plan.bill(best)
    parts = [Decimal(word.strip("$,")) for word in text.partition(": ")[2].split() if word.startswith("$")]
    assert text.startswith(f"expected bill ${best.total_usd:.2f}: compute $")
    assert float(sum(parts)) == pytest.approx(float(best.total_usd), rel=0.01)


def test_the_winner_is_set_beside_the_others() -> None:
    found = render_plan.reasons(plan_of())
    assert any(line.startswith("spot costs 25 % of the same node on demand; ") for line in found)
    assert any(line.startswith("next offer: 1 x 8xH100-SXM on-demand at aws us-east-2b, $") for line in found)


def test_the_worst_case_is_told_with_what_stops_it() -> None:
    enough = plan_of(budget=1000)
    assert render_plan.worst_case(enough, planning.winner(enough)).endswith("under the cap of $1,000.00.")
    small = plan_of(budget=2)
    assert "but the cap of $2.00 stops the run before" in render_plan.worst_case(small, planning.winner(small))


def test_a_budget_that_is_too_small_for_the_run_is_warned_of_before_the_question() -> None:
    assert "Warning" not in short(plan_of())
    small = plan_of(budget=2)
    best = planning.winner(small)
    share = 100 * best.num_tokens / small.workload.num_tokens
    assert f"Warning: $2.00 pays for about {share:.0f} % of the run, which is expected to cost" in short(small)
    assert any("!" in line for line in full(small))
    assert any("! costs more than the budget of $2.00" in line for line in full(small))


def test_what_this_machine_plays_is_said() -> None:
    real = plan_of()
    assert render_plan.as_played(real, planning.winner(real)) is None
    played = plan_of("backend=local", "local.time_scale=60")
    best = planning.winner(played)
    assert "60 billed seconds in each real one" in (render_plan.as_played(played, best) or "")
    assert "this machine simulates the cloud" in short(played)


def test_rejected_offers_are_counted_with_their_reasons() -> None:
    notes = render_plan.footnotes(plan_of(spot=True), PRICES, 10)
    assert "rejected 1 of 2 offers: not asked for (1)" in notes
    assert "test table: 2 offers with prices from 2026-11-13 to 2026-11-13; 3 rows were skipped" in notes


def test_many_reasons_are_cut_short() -> None:
    cards = ("V100", "T4", "P100", "M60", "K80")
    many = Prices(tuple(replace(SPOT, zone=str(n), accelerator="V100") for n, _ in enumerate(cards)), "test table")
    plan = plan_of(prices=Prices((SPOT, *many.offers), "test table"))
    reasons = tuple(replace(rejection, reason=f"reason {n}") for n, rejection in enumerate(plan.rejected))
    note = render_plan.footnotes(replace(plan, rejected=reasons), PRICES, 10)
    assert any(line.endswith("reason 3 (1); 1 other reasons") for line in note)


def test_a_loss_out_of_the_laws_reach_is_not_shown() -> None:
    tiny = plan_of("training.tokens_per_param=0.01")
    assert known_loss(planning.winner(tiny)) is None
    assert any("no loss is predicted: 1.57e+06 tokens are outside" in line for line in full(tiny, width=200))
    assert render_plan.row(planning.winner(tiny))["loss"] == "-"
    facts = plain(plan_facts.estimate_facts(planning.winner(tiny)))
    assert facts["predicted_loss_nats"] is None
    assert "tokens are outside" in facts["loss_unknown_reason"]
    usual = plan_facts.estimate_facts(planning.winner(plan_of()))
    assert usual["predicted_loss_nats"] > 2
    assert usual["loss_unknown_reason"] is None


def test_what_takes_longer_than_the_deadline_is_marked_and_comes_last() -> None:
    slow = plan_of(deadline_hours=0.2)
    best = planning.winner(slow)
    assert not best.within_deadline
    assert any("? takes longer than the deadline of 12 min 00 s" in line for line in full(slow))
    assert "Warning: the whole run takes about" in short(slow)
    assert f"leaves {100 * best.num_tokens / slow.workload.num_tokens:.0f} % of its tokens" in short(slow)


@pytest.mark.parametrize(
    ("objective", "word"), [("hours", "Fastest"), ("dollars", "Cheapest"), ("loss", "Lowest loss")]
)
def test_the_answer_says_by_what_it_was_chosen(objective: str, word: str) -> None:
    plan = plan_of(objective=objective)
    assert full(plan)[0].startswith(f"{word}: ")
    assert any(f"ranked by {render_plan.RANKED_BY[plan.objective]}" in line for line in full(plan, width=200))


def test_offers_without_credentials_are_left_out_unless_asked_for() -> None:
    prices = replace(PRICES, offers=(SPOT, UNDATED), enabled=("aws",))
    plan = plan_of(prices=prices)
    assert [estimate.offer.cloud for estimate in plan.ranked] == ["aws"]
    assert [rejection.reason for rejection in plan.rejected] == [
        "there are no credentials for vast; --all-clouds ranks it too"
    ]
    assert len(plan_of(prices=prices, all_clouds=True).ranked) == 2
    assert [estimate.offer.cloud for estimate in plan_of(prices=prices, clouds=["vast"]).ranked] == ["vast"]
    assert len(plan_of("backend=local", prices=prices).ranked) == 2


def test_how_good_and_how_sure_is_said() -> None:
    text = "\n".join(full(plan_of("model.vocab_size=50257"), width=300))
    assert "our trainer has no measurement on this GPU yet" in text
    assert "nats per token (80 %: " in text
    assert "CORE: unknown, no published run on an unknown corpus" in text
    known = plan_of(belief=planning.data_belief("fineweb", None))
    assert "bits per byte; law fineweb/muon" in "\n".join(full(known, width=300))


def test_what_was_not_read_and_not_believed_is_said() -> None:
    prices = replace(PRICES, unread=(Unread("azure", "no network"),), problem="offers.json cannot be read")
    notes = render_plan.price_notes(prices)
    assert "not read at the last refresh: azure; `slm offers --refresh` tries again and says why" in notes
    assert notes[-1] == "offers.json cannot be read"


def test_facts_are_the_numbers_of_the_table() -> None:
    plan = plan_of(budget=50)
    recipe = load_recipe("gpt2-124m")
    facts = plain(plan_facts.plan_facts(plan, PRICES, recipe, top=1, next_command="slm launch x"))
    assert facts["recipe"] == "gpt2-124m"
    assert facts["budget_usd"] == 50
    assert len(facts["ranked"]) == 1
    assert facts["num_ranked"] == 2
    assert facts["ranked"][0] == facts["best"]
    assert facts["best"]["total_usd"] == pytest.approx(sum(line["usd"] for line in facts["best"]["bill"]))
    assert facts["prices"]["newest_date"] == "2026-11-13"
    assert facts["next_command"] == "slm launch x"


def test_under_the_answer_stands_how_likely_it_is_and_why_nobody_is_sure() -> None:
    plan = plan_of(deadline_hours=48.0)
    best = planning.winner(plan)
    second = full(plan, width=300, chance=Chance(0.49, 100))[1]
    limits = "the cap of $100.00 and the deadline of 2 d"
    assert second.startswith(f"49 % of 100 simulated runs train all tokens under {limits}")
    assert "; the speed on H100-SXM is not measured but pooled over other programs: " in second
    sure = replace(best, placement=replace(best.placement, throughput=replace(best.throughput, basis="measured")))
    assert "is not measured" not in render_plan.chance_text(plan, sure, Chance(0.49, 100))


def test_the_chance_falls_with_the_budget() -> None:
    recipe = load_recipe("gpt2-124m")

    def share(budget: Decimal) -> float:
        found = advice.finish_chance(planning.planned_for(recipe, PRICES, budget_usd=budget))
        assert found is not None
        return found.finished_share

    bill = planning.winner(plan_of()).total_usd
    assert share(bill * 3) > 0.9
    assert 0.1 < share(bill) < 0.9
    assert share(bill / 3) < 0.1


def test_a_plan_of_years_is_drawn_less_often_and_ends_with_its_money() -> None:
    endless = load_recipe("gpt2-124m", ["training.tokens_per_param=200000"])
    found = advice.finish_chance(planning.planned_for(endless, PRICES, budget_usd=Decimal(100)))
    assert found == Chance(0.0, advice.CHANCE_RUNS)  # twelve hours are paid for, so its hundred draws stay short
    rich = advice.finish_chance(planning.planned_for(endless, PRICES, budget_usd=Decimal(10**6)))
    assert rich is not None
    assert rich.num_runs == advice.FEWEST_CHANCE_RUNS


def test_an_on_demand_offer_and_the_local_cloud_have_the_chance_that_they_have() -> None:
    on_demand = planning.planned_for(load_recipe("gpt2-124m"), PRICES, budget_usd=Decimal(1000), spot=False)
    assert advice.finish_chance(on_demand) == Chance(1.0, advice.CHANCE_RUNS)
    local = planning.planned_for(load_recipe("demo", ["local.market=calm"]), PRICES, budget_usd=Decimal(100))
    assert advice.finish_chance(local) is None


def test_the_layout_and_what_own_runs_saw_are_said() -> None:
    seen = History((Sighting("aws", "H100-SXM", 8, 3, 12.0),), problem="nothing was learned from x")
    text = "\n".join(full(plan_of(history=seen), width=300))
    assert "our own runs had 3 preemptions in 12.0 node-hours of such nodes, which corrects the published rate" in text
    assert "- nothing was learned from x" in text
    assert ", 8 devices, micro-batch " in text.partition("- layout: ")[2]
    assert " a step, bf16" in text
    on_demand = "\n".join(full(plan_of(history=seen, spot=False), width=300))
    assert "our own runs had" not in on_demand


def test_a_plan_names_the_run_that_measured_its_speed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    run = ran_on(home, SPOT)
    prices = Prices((SPOT, ON_DEMAND), "test table")
    found = planning.planned_for(load_recipe("gpt2-124m"), prices, budget_usd=Decimal(100), history=read_history(home))
    best = planning.winner(found.plan)
    low, high = (render_plan.count(item) for item in best.tokens_per_second_interval)
    shown = render_plan.outlook(found.plan, best, planning.Belief())[0]
    assert shown.endswith(f"({low} to {high}); this program was measured on this GPU, by run {run.run_id}")
    speed = next(item for item in planning.explained(found, best) if item.name == "tokens_per_second")
    assert speed.source.endswith(f"basis: measured, all scaled to what run {run.run_id} measured on H100-SXM")

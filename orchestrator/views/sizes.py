"""`slm plan --params`: the chosen model, similar sizes, and offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cost.plan.plans import known_loss
from orchestrator.figures import UNKNOWN, count, dollars, usd_per_param
from orchestrator.planning.recipe_plan import winner
from orchestrator.prices.table import age
from orchestrator.views import plan as render_plan
from orchestrator.views.runs import bullets, say, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from cost.plan.frontier import ModelChoice
    from cost.plan.plans import Chance, Estimate, Plan
    from orchestrator.planning.recipe_plan import Belief
    from orchestrator.prices.table import Prices

MOST_SIZES = 12
"""Rows of the table of sizes; of more, some are left out evenly."""
CHOSEN_BY = {
    "params": "Largest",
    "usd_per_param": "Cheapest per parameter",
    "dollars": "Cheapest",
    "hours": "Fastest",
    "loss": "Lowest loss",
}


def full(
    plan: Plan,
    choice: ModelChoice,
    prices: Prices,
    console: Console,
    chosen_by: str,
    belief: Belief,
    chance: Chance | None = None,
    *,
    warning: str | None = None,
    top: int,
    now: datetime,
) -> None:
    """The answer, the sizes, the best offers for the chosen one, what it rests on."""
    best = winner(plan)
    tell(console, answer(best, prices, chosen_by, now))
    if warning is not None:
        say(console, f"Warning: {warning}")
    render_plan.say_chance(plan, best, chance, console)
    say(console, "", sizes_table(plan, choice), "")
    say(console, f"Offers for {count(plan.workload.num_params)} parameters:", "")
    say(console, render_plan.offers_table(plan, top, console), "")
    bullets(
        console,
        [
            shape(plan),
            *render_plan.reasons(plan),
            *render_plan.outlook(plan, best, belief),
            *render_plan.footnotes(plan, prices, top),
        ],
    )
    say(console, "", render_plan.worst_case(plan, best))


def answer(best: Estimate, prices: Prices, chosen_by: str, now: datetime) -> str:
    """The model, its offer, its dollars per parameter and its loss: one line."""
    predicted = known_loss(best)
    loss = "loss unknown" if predicted is None else f"predicted loss {predicted.nats_per_token:.2f} nats"
    return (
        f"{CHOSEN_BY[chosen_by]}: {count(best.workload.num_params)} parameters on {render_plan.cluster(best)}: "
        f"{dollars(best.total_usd)}, {usd_per_param(best.usd_per_param)} $/param, {loss} "
        f"(prices: {age(prices, best.offer, now)})"
    )


def shape(plan: Plan) -> str:
    """What the model looks like."""
    work = plan.workload
    return (
        f"shape: {work.num_layers} layers of width {work.width}, {work.num_heads} heads, hidden {work.hidden_size}, "
        f"vocabulary {work.vocab_size}, {work.sequence_length} tokens a sequence"
    )


def sizes_table(plan: Plan, choice: ModelChoice) -> Table:
    """One line for each size with its best offer; what cannot be paid for is marked."""
    heads = ("params", "tokens", "best offer", "hours", "total $", "$/param", "loss (nats)")
    shown = table(*heads, right=[head for head in heads if head != "best offer"])
    for item in evenly_chosen(choice.plans, plan):
        best = item.best
        work = item.workload
        chosen = work.num_params == plan.workload.num_params
        if best is None:
            shown.add_row(count(work.num_params), count(work.num_tokens), "none fits", *[UNKNOWN] * 4)
            continue
        predicted = known_loss(best) if best.num_tokens == work.num_tokens else None
        shown.add_row(
            count(work.num_params),
            count(work.num_tokens),
            render_plan.cluster(best),
            f"{best.hours:.3g}",
            f"{best.total_usd:.2f}{render_plan.mark(best)}",
            usd_per_param(best.usd_per_param),
            UNKNOWN if predicted is None else f"{predicted.nats_per_token:.2f}",
            style="bold" if chosen else "",
        )
    return shown


def evenly_chosen(plans: Sequence[Plan], chosen: Plan) -> list[Plan]:
    """At most about `MOST_SIZES`, evenly, always with both ends, the chosen one and its neighbour above."""
    stride = max(1, round(len(plans) / MOST_SIZES))
    place = next(index for index, plan in enumerate(plans) if plan.workload.num_params == chosen.workload.num_params)
    kept = {0, len(plans) - 1, place, min(place + 1, len(plans) - 1), *range(place % stride, len(plans), stride)}
    return [plans[index] for index in sorted(kept)]

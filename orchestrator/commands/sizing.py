"""`slm plan --params`: which size of model a budget should train, and where."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from cost.errors import UserError

if TYPE_CHECKING:
    from cost.frontier import ModelChoice
    from cost.planner import Plan
    from cost.workload import Workload
    from orchestrator.commands.options import ObjectiveName
    from orchestrator.prices import Prices

TOKENS_PER_PARAM = 20.0
"""Cerebras-GPT's and Chinchilla's rule."""
BUDGET_USD = Decimal(100)
LARGEST = "params"
NEAREST_RECIPE = "1.5b"
"""Whose optimizer, data and checkpoints the next command takes; the shape is spelt out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Sizes from low to high, or any; how long each trains, for how much."""

    sizes: tuple[float, float] | None
    tokens_per_param: float
    budget_usd: Decimal


def plan_sizes(
    asked: Asked,
    objective: ObjectiveName | None,
    wishes: dict[str, Any],
    prices: Prices,
    *,
    top: int,
    explain: bool,
    as_json: bool,
) -> None:
    """Choose the model, and show it with the sizes around it and the offers for it."""
    from orchestrator import advice, planning, render, render_explain, render_sizes

    chosen_by = objective.value if objective else LARGEST
    planned, choice = choose(asked, chosen_by, wishes, prices)
    best = planning.winner(planned.plan)
    following = next_command(planned.plan.workload, asked, wishes)
    explanations = planning.explained(planned, best) if explain else None
    chance = advice.chance_of(planned)
    if as_json:
        facts = render_sizes.facts(
            planned.plan, choice, prices, asked.tokens_per_param, chosen_by, wishes["belief"], chance, top=top
        )
        render.as_json({**facts, "explanations": explanations, "next": following})
        return
    console = render.console_on(sys.stdout)
    render_sizes.full(
        planned.plan, choice, prices, console, chosen_by, wishes["belief"], chance, top=top, now=datetime.now(UTC)
    )
    if explanations is not None:
        render_explain.explanations(explanations, console)
    render.following(console, following)


def choose(asked: Asked, chosen_by: str, wishes: dict[str, Any], prices: Prices) -> tuple[Any, ModelChoice]:
    """The sizes that were looked at, and the plan of the chosen one over all offers.

    Raises:
        UserError: The budget pays for none of them.
    """
    from dataclasses import replace

    from cost.frontier import choose_model
    from cost.planner import make_plan
    from cost.sizes import largest_range
    from orchestrator import planning
    from orchestrator.experience import Experience

    offers, options, locked = planning.options_without_recipe(prices, **wishes)
    wanted = planning.offers_wanted(offers, options)
    sizes = asked.sizes or largest_range(
        wanted,
        budget_usd=asked.budget_usd,
        tokens_per_param=asked.tokens_per_param,
        **options,
    )
    choice = choose_model(
        wanted,
        low=sizes[0],
        high=sizes[1],
        budget_usd=asked.budget_usd,
        tokens_per_param=asked.tokens_per_param,
        objective=chosen_by,
        **options,
    )
    if choice.chosen is None:
        raise UserError(none_affordable(choice, asked))
    by: Any = "usd_per_param" if chosen_by == LARGEST else chosen_by
    plan = make_plan(choice.chosen.workload, offers, budget_usd=asked.budget_usd, objective=by, **options)
    experience = wishes.get("experience") or Experience()
    plan = replace(plan, rejected=(*plan.rejected, *locked), seen=experience.seen)
    return planning.Planned(plan, options["market"].hazards), choice


def none_affordable(choice: ModelChoice, asked: Asked) -> str:
    """Why the smallest model of the range cannot be trained, and what would change it."""
    from orchestrator.figures import count, dollars, duration

    smallest: Plan = choice.plans[0]
    size = count(smallest.workload.num_params)
    if smallest.best is None:
        return f"no offer can train {size} parameters; allow more clouds, GPUs or nodes, or name smaller models."
    cost = f"{dollars(smallest.best.total_usd)} and {duration(smallest.best.hours * 3600)}"
    return (
        f"the smallest model of the range, {size} parameters on {asked.tokens_per_param:g} tokens each, takes {cost} "
        f"at best, over a budget of {dollars(asked.budget_usd)} or the deadline; raise one, lower --tokens-per-param, "
        "or ask with --params max what the budget trains."
    )


def next_command(work: Workload, asked: Asked, wishes: dict[str, Any]) -> str:
    """The same model as a recipe with its shape spelt out."""
    shape = {
        "model.num_layers": work.num_layers,
        "model.width": work.width,
        "model.num_heads": work.num_heads,
        "model.num_kv_heads": work.num_kv_heads,
        "model.hidden_size": work.hidden_size,
        "model.vocab_size": work.vocab_size,
        "model.sequence_length": work.sequence_length,
        "training.global_batch_size": work.global_batch_size,
        "training.tokens_per_param": f"{asked.tokens_per_param:g}",
    }
    sets = [part for key, value in shape.items() for part in ("--set", f"{key}={value}")]
    kinds = {None: [], True: ["--spot"], False: ["--on-demand"]}[wishes["spot"]]
    deadline = ["--deadline", f"{wishes['deadline_hours']:g}h"] if wishes["deadline_hours"] is not None else []
    precision = ["--precision", wishes["precision"]] if wishes.get("precision") else []
    command = ["slm", "plan", NEAREST_RECIPE, "--budget", f"{asked.budget_usd}", *kinds, *deadline, *precision, *sets]
    return shlex.join(command)

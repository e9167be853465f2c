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
    from collections.abc import Sequence

    from cost.market.offers import Offer
    from cost.performance.workload import Workload
    from cost.plan.frontier import ModelChoice
    from cost.plan.planner import Plan
    from orchestrator.commands.options import ObjectiveName
    from orchestrator.planning.recipe_plan import Planned
    from orchestrator.prices.table import Prices

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
    allow_unguarded: bool,
    top: int,
    explain: bool,
    as_json: bool,
) -> None:
    """Choose the model, and show it with the sizes around it and the offers for it."""
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.views import explain as render_explain
    from orchestrator.views import runs as render
    from orchestrator.views import sizes as render_sizes
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.sizes import sizes_facts

    chosen_by = objective.value if objective else LARGEST
    planned, choice, warning = choose(asked, chosen_by, wishes, prices, allow_unguarded=allow_unguarded)
    best = planning.winner(planned.plan)
    unguarded = allow_unguarded or warning is not None
    following = next_command(planned.plan.workload, asked, {**wishes, "allow_unguarded": unguarded})
    explanations = planning.explained(planned, best) if explain else None
    chance = advice.finish_chance(planned)
    if as_json:
        facts = sizes_facts(
            planned.plan,
            choice,
            prices,
            asked.tokens_per_param,
            chosen_by,
            wishes["belief"],
            chance,
            warning=warning,
            top=top,
        )
        print_json({**facts, "explanations": explanations, "next_command": following})
        return
    console = render.console_on(sys.stdout)
    render_sizes.full(
        planned.plan,
        choice,
        prices,
        console,
        chosen_by,
        wishes["belief"],
        chance,
        warning=warning,
        top=top,
        now=datetime.now(UTC),
    )
    if explanations is not None:
        render_explain.explanations(explanations, console)
    render.following(console, following)


def choose(
    asked: Asked, chosen_by: str, wishes: dict[str, Any], prices: Prices, *, allow_unguarded: bool
) -> tuple[Planned, ModelChoice, str | None]:
    """The sizes that were looked at, the plan of the chosen one over all offers, and what is wrong with it.

    Where no guarded offer trains any size of the range, the answer is one of an unguarded offer, and the warning says
    so: launch refuses it.

    Raises:
        UserError: The budget pays for none of them.
    """
    from dataclasses import replace

    from cost.plan.planner import make_plan
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.planning.history import History

    offers, options, locked = planning.options_without_recipe(prices, **wishes)
    planning.offers_wanted(offers, options)
    pools = [offers] if allow_unguarded else [planning.guarded_offers(offers), offers]
    choices = [choose_size(asked, chosen_by, planning.offers_for(pools[0], options), options)]
    if choices[-1].chosen is None and len(pools) > 1:
        choices.append(choose_size(asked, chosen_by, planning.offers_for(pools[1], options), options))
    choice = choices[-1]
    if choice.chosen is None:
        raise UserError(none_affordable(choice, asked))
    by: Any = "usd_per_param" if chosen_by == LARGEST else chosen_by
    plan = make_plan(choice.chosen.workload, offers, budget_usd=asked.budget_usd, objective=by, **options)
    warning = None
    if len(choices) > 1:
        best = planning.winner(plan)
        warning = f"{planning.guard_refusal(best.offer)}. Among the other offers, {none_affordable(choices[0], asked)}"
    elif not allow_unguarded:
        plan = planning.guarded(plan)
    history = wishes.get("history") or History()
    plan = replace(plan, rejected=(*plan.rejected, *locked), seen=history.seen)
    return planning.Planned(plan, options["market"].hazards), choice, warning


def choose_size(asked: Asked, chosen_by: str, offers: Sequence[Offer], options: dict[str, Any]) -> ModelChoice:
    """The best size that these offers train; none where there are no offers."""
    from cost.plan.frontier import ModelChoice, choose_model
    from cost.plan.sizes import largest_range

    if not offers:
        return ModelChoice((), None)
    money: dict[str, Any] = {"budget_usd": asked.budget_usd, "tokens_per_param": asked.tokens_per_param}
    low, high = asked.sizes or largest_range(offers, **money, **options)
    return choose_model(offers, low=low, high=high, objective=chosen_by, **money, **options)


def none_affordable(choice: ModelChoice, asked: Asked) -> str:
    """Why the smallest model of the range cannot be trained, and what would change it."""
    from orchestrator.figures import count, dollars, duration

    if not choice.plans:
        return "there are no offers for these clouds, GPUs and kinds (spot or on-demand)."
    smallest: Plan = choice.plans[0]
    size = count(smallest.workload.num_params)
    if smallest.best is None:
        return f"no offer can train {size} parameters; allow more clouds, GPUs or nodes, or choose smaller models."
    cost = f"{dollars(smallest.best.total_usd)} and {duration(smallest.best.hours * 3600)}"
    return (
        f"the smallest model of the range, {size} parameters on {asked.tokens_per_param:g} tokens each, takes at "
        f"least {cost}, which is over the budget of {dollars(asked.budget_usd)} or the deadline; raise one of "
        "them, lower --tokens-per-param, or use --params max to find the largest affordable model."
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
    unguarded = ["--allow-unguarded"] if wishes.get("allow_unguarded") else []
    precision = ["--precision", wishes["precision"]] if wishes.get("precision") else []
    command = ["slm", "plan", NEAREST_RECIPE, "--budget", f"{asked.budget_usd}", *kinds, *deadline]
    return shlex.join([*command, *unguarded, *precision, *sets])

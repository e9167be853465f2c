"""plan, recipes, prepare: everything before money is spent."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cost.errors import UserError
from orchestrator.commands import options
from orchestrator.commands.actions import given_actions, given_invocation
from orchestrator.settings import home_from

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from orchestrator.planning.recipe_plan import Belief, Planned
    from orchestrator.prices.table import Prices
    from tasks.recipe.schema import Recipe

DEFAULT_TOP = 10
WITHOUT_MEANING_FOR_LAUNCH = ("--top", "--corpus", "--unique-tokens")
FLAGS_WITHOUT_MEANING_FOR_LAUNCH = ("--json", "--explain")


def plan(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Name or path of a recipe; omit it with --params.")
    ] = None,
    budget: options.BudgetOption = None,
    objective: options.ObjectiveOption = None,
    deadline: options.DeadlineOption = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params",
            metavar="LOW..HIGH",
            help="Let slm choose the model size from a range such as 1.1e9..3e9, or max.",
        ),
    ] = None,
    tokens_per_param: options.TokensPerParamOption = None,
    spot: options.SpotOption = None,
    clouds: options.CloudsOption = None,
    all_clouds: options.AllCloudsOption = False,
    allow_unguarded: options.AllowUnguardedOption = False,
    gpus: options.GpusOption = None,
    nodes: options.NodesOption = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Number of offers to show.")] = DEFAULT_TOP,
    corpus: options.CorpusOption = None,
    unique_tokens: options.UniqueTokensOption = None,
    backend: options.BackendOption = None,
    market: options.MarketOption = None,
    time_scale: options.TimeScaleOption = None,
    precision: options.PrecisionOption = None,
    sets: options.SetOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show formula, inputs and source of every number of the best offer.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Rank GPU offers by dollars per trained parameter.

    With --params, also chooses the model size: the largest that the budget pays for.

    \b
    Examples:
      slm plan demo
      slm plan tinyllama-1.1b --budget 20 --spot --gpus H100,A100 --top 5
      slm plan 1.5b --objective hours --deadline 48h --explain
      slm plan --budget 100 --params 1.1e9..3e9 --tokens-per-param 20
      slm plan --budget 100 --params max --json
    """
    from orchestrator.planning import processor
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.planning.history import read_history

    home = home_from(os.environ)
    belief = planning.data_belief(corpus, unique_tokens)
    wishes: dict[str, Any] = {
        "spot": spot,
        "clouds": options.names_in(clouds),
        "gpus": options.names_in(gpus),
        "nodes": nodes,
        "deadline_hours": deadline,
        "all_clouds": all_clouds,
        "belief": belief,
        "history": read_history(home),
    }
    if params is not None:
        if recipe is not None or sets:
            raise UserError(
                "--params chooses the model, so it cannot be combined with a recipe or --set; remove either."
            )
        if backend is not None or market is not None or time_scale is not None:
            raise UserError("--backend, --market and --time-scale need a recipe; --params plans for real clouds only.")
        from orchestrator.commands.sizing import BUDGET_USD, TOKENS_PER_PARAM, Asked, plan_sizes

        asked = Asked(options.parse_range(params), tokens_per_param or TOKENS_PER_PARAM, budget or BUDGET_USD)
        wishes["precision"] = precision and precision.value
        plan_sizes(
            asked,
            objective,
            wishes,
            prices_now(),
            allow_unguarded=allow_unguarded,
            top=top,
            explain=explain,
            as_json=as_json,
        )
        return
    if recipe is None:
        raise UserError("name a recipe (`slm recipes` lists them), or let slm choose the size: --params max.")
    if tokens_per_param is not None:
        raise UserError("--tokens-per-param needs --params; for a recipe use --set training.tokens_per_param=20.")
    fields = options.overrides(sets, backend=backend, market=market, time_scale=time_scale, precision=precision)
    asked_for = recipe_with(recipe, fields, nodes)
    speed = processor.known_speed(home, asked_for)
    chosen = processor.in_known_precision(asked_for, speed)
    prices = prices_now(chosen)
    planned = planning.planned_for(
        chosen,
        prices,
        budget_usd=budget or chosen.budget_usd,
        objective=objective.value if objective else "usd_per_param",
        measured_tokens_per_second=planning.measured_here(home, chosen),
        processor=speed,
        allow_unguarded=allow_unguarded,
        **wishes,
    )
    show_plan(context, planned, prices, chosen, belief, top=top, explain=explain, as_json=as_json)


def show_plan(
    context: typer.Context,
    planned: Planned,
    prices: Prices,
    recipe: Recipe,
    belief: Belief,
    *,
    top: int,
    explain: bool,
    as_json: bool,
) -> None:
    """A recipe's plan as tables or as JSON."""
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.views import explain as render_explain
    from orchestrator.views import plan as render_plan
    from orchestrator.views import runs as render
    from orchestrator.views.facts import plan as plan_facts
    from orchestrator.views.facts.document import print_json

    best = planning.winner(planned.plan)
    following = launch_like(given_invocation(context).arguments)
    explanations = planning.explained(planned, best) if explain else None
    chance = advice.finish_chance(planned)
    if as_json:
        facts = plan_facts.plan_facts(planned.plan, prices, recipe, belief, chance, top=top, next_command=following)
        print_json({**facts, "explanations": explanations})
        return
    console, now = render.console_on(sys.stdout), datetime.now(UTC)
    ending = None if explain else following
    render_plan.full(planned.plan, prices, console, belief, chance, top=top, now=now, next_command=ending)
    if explanations is not None:
        render_explain.explanations(explanations, console)
        render.following(console, following)


def prices_now(recipe: Recipe | None = None) -> Prices:
    """The prices of this machine; a recipe that rents, or none, has an old cache refreshed for the next time."""
    from orchestrator.prices import table as prices

    home = home_from(os.environ)
    if recipe is None or recipe.backend != "local":
        prices.refresh_when_stale(home, datetime.now(UTC), os.environ)
    return prices.current_prices(home)


def recipes(as_json: options.JsonOption = False) -> None:
    """List the built-in recipes.

    \b
    Examples:
      slm recipes
      slm recipes --json
    """
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from tasks.recipe.load import list_recipes

    found = list_recipes()
    if as_json:
        print_json({"recipes": found})
    else:
        render.recipes(found, render.console_on(sys.stdout))


def prepare(
    context: typer.Context,
    recipe: options.RecipeArgument,
    sets: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Prepare a recipe's data: train the tokenizer and write token shards.

    Returns quickly if the data is ready. `slm launch` does this automatically.

    \b
    Examples:
      slm prepare demo
      slm prepare my.yaml --set data.max_bytes=100000000
    """
    from orchestrator.views import live
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from tasks.recipe.load import load_recipe

    chosen = load_recipe(recipe, options.overrides(sets))
    lines = live.PlainLines(render.console_on(sys.stderr), chosen.name)
    folder = given_actions(context).prepare(chosen, home=home_from(os.environ).create(), on_event=lines)
    if as_json:
        print_json({"recipe": chosen.name, "data_dir": folder})
        return
    console = render.console_on(sys.stdout)
    render.tell(console, f"Data of {chosen.name}: {folder}")
    render.following(console, launch_like(given_invocation(context).arguments))


def recipe_with(recipe: str, overrides: Sequence[str], nodes: int | None) -> Recipe:
    """A recipe with all overrides; `nodes` is how many it wants, and no more than it goes on with."""
    from tasks.recipe.load import load_recipe

    chosen = load_recipe(recipe, overrides)
    if nodes is None:
        return chosen
    fewest = min(nodes, chosen.nodes.min)
    return load_recipe(recipe, [*overrides, f"nodes.max={nodes}", f"nodes.min={fewest}"])


def launch_like(arguments: Sequence[str]) -> str:
    """The `slm launch` that rents what this `slm plan` or `slm prepare` was asked about."""
    kept: list[str] = []
    left = iter(arguments[1:])
    for argument in left:
        if argument in WITHOUT_MEANING_FOR_LAUNCH:
            next(left, None)
        elif argument not in FLAGS_WITHOUT_MEANING_FOR_LAUNCH and not argument.startswith(
            tuple(f"{name}=" for name in WITHOUT_MEANING_FOR_LAUNCH)
        ):
            kept.append(argument)
    return shlex.join(["slm", "launch", *kept])

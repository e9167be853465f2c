"""plan, recipes, prepare: everything before money is spent."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands import options
from orchestrator.commands.actions import actions_of, invocation_of
from orchestrator.settings import home_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks.recipe import Recipe

DEFAULT_TOP = 10


def plan(
    context: typer.Context,
    recipe: options.RecipeArgument,
    budget: options.BudgetOption = None,
    spot: options.SpotOption = None,
    clouds: options.CloudsOption = None,
    gpus: options.GpusOption = None,
    nodes: options.NodesOption = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="How many offers to show.")] = DEFAULT_TOP,
    backend: options.BackendOption = None,
    market: options.MarketOption = None,
    time_scale: options.TimeScaleOption = None,
    sets: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Rank GPU offers by dollars per trained parameter.

    \b
    Examples:
      slm plan demo
      slm plan demo --budget 20 --spot --gpus H100,A100 --top 5
      slm plan my.yaml --set training.tokens_per_param=20 --json
    """
    from orchestrator import planning, render, render_plan

    chosen = recipe_with(recipe, options.overrides(sets, backend=backend, market=market, time_scale=time_scale), nodes)
    prices = planning.current_prices()
    made = planning.make_plan_for(
        chosen,
        prices,
        budget_usd=budget or chosen.budget_usd,
        spot=spot,
        clouds=options.names_in(clouds),
        gpus=options.names_in(gpus),
        nodes=nodes,
    )
    planning.winner(made)
    following = launch_like(invocation_of(context).arguments)
    if as_json:
        render.as_json(render_plan.facts(made, prices, chosen, top=top, next_command=following))
        return
    console, today = render.console_on(sys.stdout), datetime.now(UTC).date()
    render_plan.full(made, prices, console, top=top, today=today, next_command=following)


def recipes(as_json: options.JsonOption = False) -> None:
    """List the recipes that have a name.

    \b
    Examples:
      slm recipes
      slm recipes --json
    """
    from orchestrator import render
    from tasks.recipe import list_recipes

    found = list_recipes()
    if as_json:
        render.as_json({"recipes": found})
    else:
        render.recipes(found, render.console_on(sys.stdout))


def prepare(
    context: typer.Context,
    recipe: options.RecipeArgument,
    sets: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Make a recipe's vocabulary and token shards.

    Quick where they are there already; `slm launch` does the same.

    \b
    Examples:
      slm prepare demo
      slm prepare my.yaml --set data.max_bytes=100000000
    """
    from orchestrator import live, render
    from tasks.recipe import load_recipe

    chosen = load_recipe(recipe, options.overrides(sets))
    lines = live.PlainLines(render.console_on(sys.stderr), chosen.name)
    folder = actions_of(context).prepare(chosen, home=home_from(os.environ).create(), on_event=lines)
    if as_json:
        render.as_json({"recipe": chosen.name, "data_dir": folder})
        return
    console = render.console_on(sys.stdout)
    render.tell(console, f"Data of {chosen.name}: {folder}")
    render.following(console, launch_like(invocation_of(context).arguments))


def recipe_with(recipe: str, overrides: Sequence[str], nodes: int | None) -> Recipe:
    """A recipe with all overrides; `nodes` is how many it wants, and no more than it goes on with."""
    from tasks.recipe import load_recipe

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
        if argument == "--top":
            next(left, None)
        elif argument != "--json" and not argument.startswith("--top="):
            kept.append(argument)
    return shlex.join(["slm", "launch", *kept])

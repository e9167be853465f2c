"""estimate, frontier, simulate: what a plan is made of, and what it hides."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import options
from orchestrator.commands.planning import prices_now, recipe_with
from orchestrator.settings import home_from

if TYPE_CHECKING:
    from cost.market.hardware import Precision
    from cost.performance.software import Software
    from cost.performance.workload import Workload

PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the result to a .png, .svg or .html file.")
]


def estimate(
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A recipe's name or path, or a size such as 1.1e9.")
    ],
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="A GPU name from `slm gpus`.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="Number of GPUs per node.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Number of nodes.")] = 1,
    tokens_per_param: options.TokensPerParamOption = None,
    sets: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Estimate how fast a model trains on one machine, and what limits its speed.

    Shows tokens per second, utilization, memory by kind and hours, with intervals.

    \b
    Examples:
      slm estimate --model tinyllama-1.1b --gpu H100-SXM --gpus 8
      slm estimate --model 350m --gpu RTX4090 --set model.sequence_length=4096
      slm estimate --model 3e9 --gpu A100-80GB-SXM --gpus 8 --nodes 2 --json
    """
    from orchestrator.planning import analysis as advice
    from orchestrator.planning.history import read_history
    from orchestrator.views import analysis as render_advice
    from orchestrator.views import runs as render
    from orchestrator.views.facts.analysis import machine_facts
    from orchestrator.views.facts.document import print_json

    name, work, software, precisions = named_model(model, tokens_per_param, sets)
    prices = prices_now()
    made = advice.estimate_machine(
        name,
        work,
        software,
        prices,
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        precisions=precisions,
        history=read_history(home_from(os.environ)),
    )
    if as_json:
        print_json(machine_facts(made, prices))
        return
    render_advice.machine(made, prices, render.console_on(sys.stdout), now=datetime.now(UTC))


def frontier(
    budget: options.BudgetOption = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params", metavar="LOW..HIGH", help="Range of model sizes, in total parameters. [default: 1e8..1e10]"
        ),
    ] = None,
    deadline: options.DeadlineOption = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Show dense models only, without mixtures of experts.")
    ] = False,
    spot: options.SpotOption = None,
    clouds: options.CloudsOption = None,
    all_clouds: options.AllCloudsOption = False,
    allow_unguarded: options.AllowUnguardedOption = False,
    gpus: options.GpusOption = None,
    nodes: options.NodesOption = None,
    corpus: options.CorpusOption = None,
    unique_tokens: options.UniqueTokensOption = None,
    plot: PlotOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show the loss that a budget buys at each model size.

    Compares dense models and mixtures of experts, each trained on as many tokens as the whole budget buys.

    \b
    Examples:
      slm frontier --budget 100
      slm frontier --budget 100 --deadline 48h --plot frontier.png
      slm frontier --budget 500 --params 5e8..2e10 --dense --json
    """
    from orchestrator.commands.sizing import BUDGET_USD
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.planning.history import read_history
    from orchestrator.views import analysis as render_advice
    from orchestrator.views import plots
    from orchestrator.views import runs as render
    from orchestrator.views.facts.analysis import frontier_facts
    from orchestrator.views.facts.document import print_json

    if plot is not None:
        plots.check(plot)
    wishes: dict[str, Any] = {
        "spot": spot,
        "clouds": options.names_in(clouds),
        "gpus": options.names_in(gpus),
        "nodes": nodes,
        "deadline_hours": deadline,
        "all_clouds": all_clouds,
        "belief": planning.data_belief(corpus, unique_tokens),
        "history": read_history(home_from(os.environ)),
    }
    prices = prices_now()
    cap = budget or BUDGET_USD
    sizes = None if params is None else options.parse_range(params)
    points = advice.frontier_points(
        prices, budget_usd=cap, sizes=sizes, mixtures=not dense, allow_unguarded=allow_unguarded, wishes=wishes
    )
    if plot is not None:
        plots.frontier(points, float(cap), plot)
    if as_json:
        print_json(frontier_facts(points, prices, cap, deadline, plot))
        return
    render_advice.frontier(points, prices, cap, render.console_on(sys.stdout), now=datetime.now(UTC), plot=plot)


def simulate(
    recipe: options.RecipeArgument,
    market: Annotated[
        str | None,
        typer.Option(
            "--market",
            metavar="KIND",
            help="Spot market: calm, hazard:PER_HOUR, trace:FILE or trace:FOLDER. [default: published rates]",
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, max=100_000, metavar="N", help="Number of simulated runs.")
    ] = 1000,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Random seed; the same seed gives the same result.")
    ] = 0,
    zones: Annotated[
        int, typer.Option("--zones", min=1, metavar="N", help="Number of zones that have this offer.")
    ] = 1,
    budget: options.BudgetOption = None,
    deadline: options.DeadlineOption = None,
    objective: options.ObjectiveOption = None,
    spot: options.SpotOption = None,
    clouds: options.CloudsOption = None,
    all_clouds: options.AllCloudsOption = False,
    allow_unguarded: options.AllowUnguardedOption = False,
    gpus: options.GpusOption = None,
    nodes: options.NodesOption = None,
    sets: options.SetOption = None,
    plot: PlotOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Simulate the best plan a thousand times on a spot market.

    Shows dollars, hours, tokens, preemptions and waste as P10, P50 and P90, for slm's own policy and for others.
    Preemption rate, capacity and speed are drawn at random, so that the spread shows the uncertainty of the plan.

    \b
    Examples:
      slm simulate tinyllama-1.1b --set training.tokens_per_param=10
      slm simulate 1.5b --market hazard:0.5 --zones 3 --plot simulation.png
      slm simulate 350m --market trace:traces/aws-v100 --deadline 120h --json
    """
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import processor
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.planning.history import read_history
    from orchestrator.views import analysis as render_advice
    from orchestrator.views import plots
    from orchestrator.views import runs as render
    from orchestrator.views.facts.analysis import simulation_facts
    from orchestrator.views.facts.document import print_json

    if plot is not None:
        plots.check(plot)
    asked_for = recipe_with(recipe, options.overrides(sets), nodes)
    speed = processor.known_speed(home_from(os.environ), asked_for)
    chosen = processor.in_known_precision(asked_for, speed)
    prices = prices_now(chosen)
    planned = planning.planned_for(
        chosen,
        prices,
        budget_usd=budget or chosen.budget_usd,
        spot=spot,
        clouds=options.names_in(clouds),
        gpus=options.names_in(gpus),
        nodes=nodes,
        objective=objective.value if objective else "usd_per_param",
        deadline_hours=deadline,
        all_clouds=all_clouds,
        allow_unguarded=allow_unguarded,
        measured_tokens_per_second=planning.measured_here(home_from(os.environ), chosen),
        processor=speed,
        history=read_history(home_from(os.environ)),
    )
    done = advice.simulate_plan(planned, market=market, num_zones=zones, runs=runs, seed=seed, deadline_hours=deadline)
    if plot is not None:
        plots.simulation(done.simulation, float(planned.plan.budget_usd), chosen.name, plot)
    if as_json:
        print_json(simulation_facts(done, planned.plan, chosen.name, prices, plot))
        return
    console = render.console_on(sys.stdout)
    render_advice.simulation(done, planned.plan, chosen.name, prices, console, now=datetime.now(UTC), plot=plot)


def named_model(
    model: str, tokens_per_param: float | None, sets: list[str] | None
) -> tuple[str, Workload, Software, tuple[Precision, ...]]:
    """A recipe by name or path, or a model that only its size describes; and the precisions to choose from."""
    from cost.errors import UserError
    from cost.performance.software import our_trainer
    from orchestrator.commands.sizing import TOKENS_PER_PARAM
    from orchestrator.figures import count
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import recipe_plan as planning
    from tasks.recipe.load import list_recipes, load_recipe

    try:  # a recipe may be called 350m
        size = None if model in {recipe.name for recipe in list_recipes()} else options.parse_count(model)
    except typer.BadParameter:
        size = None
    if size is None:
        if tokens_per_param is not None:
            sets = [*(sets or ()), f"training.tokens_per_param={tokens_per_param:g}"]
        recipe = load_recipe(model, options.overrides(sets))
        return (
            recipe.name,
            recipe.workload(),
            our_trainer(optimizer=recipe.optimizer.name, compiled=recipe.training.compile),
            planning.allowed_precisions(recipe.precision),
        )
    if sets:
        raise UserError(f"--set changes a recipe, but {model} is a size; name a recipe, or remove --set.")
    work, software = advice.work_of_size(size, tokens_per_param or TOKENS_PER_PARAM)
    return f"{count(work.num_params)} parameters", work, software, ()

"""launch and resume: everything that leads to spending, so both show what it can cost, and launch asks first."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cost.errors import UserError
from orchestrator.commands import options
from orchestrator.commands.actions import given_actions, given_invocation
from orchestrator.commands.planning import prices_now, recipe_with
from orchestrator.settings import home_from

if TYPE_CHECKING:
    from orchestrator.backends.sky.enabled_clouds import Enabled
    from orchestrator.events import Emit
    from orchestrator.runs.status import RunSummary
    from orchestrator.supervisor.lease.stopping import StopSwitch
    from tasks.recipe.schema import Recipe

FAILED_EXIT_CODE = 1


def launch(
    context: typer.Context,
    recipe: options.RecipeArgument,
    backend: options.BackendOption = None,
    budget: options.BudgetOption = None,
    objective: options.ObjectiveOption = None,
    deadline: options.DeadlineOption = None,
    nodes: options.NodesOption = None,
    spot: options.SpotOption = None,
    clouds: options.CloudsOption = None,
    all_clouds: options.AllCloudsOption = False,
    allow_unguarded: options.AllowUnguardedOption = False,
    gpus: options.GpusOption = None,
    market: options.MarketOption = None,
    time_scale: options.TimeScaleOption = None,
    precision: options.PrecisionOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Save a profiler trace of a few steps in the run store.")
    ] = False,
    sets: options.SetOption = None,
    notify: options.NotifyOption = None,
    store: options.StoreOption = None,
    single_supervisor: options.SingleSupervisorOption = False,
    yes: options.YesOption = False,
    detach: options.DetachOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Rent nodes and train a model within a spending cap.

    Shows the plan and asks before it rents. Recovers from preemptions; after a crash, the same command continues the
    run. Ctrl-C saves a checkpoint and stops; a second Ctrl-C terminates the nodes at once. Exit code 1 means that the
    run failed.

    \b
    Examples:
      slm launch demo --yes
      slm launch demo --budget 30 --market hazard:0.5 --nodes 2
      slm launch my.yaml --budget 100 --set model.num_layers=12 --detach
      slm launch my.yaml --store s3://my-bucket/runs
    """
    from orchestrator.planning import analysis as advice
    from orchestrator.planning import processor
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.planning.history import read_history
    from orchestrator.runs.options import LOCAL, LaunchRequest, RunOptions
    from orchestrator.supervisor import background
    from orchestrator.supervisor.losses import believed
    from orchestrator.views import plan as render_plan
    from orchestrator.views import runs as render

    home = home_from(os.environ)
    fields = options.overrides(
        sets, backend=backend, market=market, time_scale=time_scale, precision=precision, profile=profile
    )
    chosen = with_backend(recipe_with(recipe, fields, nodes))
    asked = planning.as_begun(home, chosen)
    speed = processor.timed_speed(home, asked)
    chosen = processor.in_known_precision(asked, speed)
    refuse_unasked_spending(chosen, budget, yes=yes)
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
        measured_tokens_per_second=planning.measured_here(home, chosen),
        processor=speed,
        history=read_history(home),
    )
    plan = planned.plan
    best = planning.winner(plan)
    console = render.console_on(sys.stderr if as_json else sys.stdout)
    render_plan.short(plan, prices, console, advice.finish_chance(planned), now=datetime.now(UTC))
    is_child = background.is_child()
    ask(f"Launch {chosen.name} with a cap of {plan.budget_usd} dollars?", yes=yes or is_child)
    if detach and not is_child:
        in_background(context, as_json=as_json)
        return
    actions = given_actions(context)
    trained, offers = planning.fixed(chosen, plan)
    run_options = RunOptions(
        backend=trained.backend or LOCAL,
        offers=tuple(offers),
        checkpoint_interval_seconds=finite(best.checkpoint_interval_seconds),
        expected_usd={estimate.offer.offer_id: estimate.bill.total_usd for estimate in reversed(plan.ranked)},
        planned_speed={
            estimate.offer.offer_id: estimate.tokens_per_second / estimate.layout.world_size
            for estimate in reversed(plan.ranked)
        },
        precision_reason=None if speed is None or chosen == asked else speed.reason,
        single_supervisor=single_supervisor,
        allow_unguarded=allow_unguarded,
    )
    losses = believed(best, planned.hazards.for_offer(best.offer), time_scale=run_options.time_scale(trained))
    request = LaunchRequest(
        recipe=trained,
        options=replace(run_options, losses=losses),
        budget_usd=budget,
        store=absolute(store),
        notify_target=notify,
    )
    watched(
        lambda emit, switch: actions.launch(request, home=home.create(), on_event=emit, switch=switch),
        chosen.name,
        as_json=as_json,
    )


def resume(
    context: typer.Context,
    run: options.RunArgument = None,
    budget: Annotated[
        Decimal | None,
        typer.Option(
            "--budget", parser=options.parse_usd, metavar="USD", help="New spending cap in dollars for the whole run."
        ),
    ] = None,
    notify: options.NotifyOption = None,
    single_supervisor: options.SingleSupervisorOption = False,
    detach: options.DetachOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Continue a run that stopped, failed or reached its cap.

    Also continues a run whose supervisor is gone. --budget sets the cap for everything that the run has cost and will
    cost; it is not added to the old cap.

    \b
    Examples:
      slm resume
      slm resume demo-1 --budget 150
    """
    from orchestrator.supervisor import background

    if detach and not background.is_child():
        in_background(context, as_json=as_json)
        return
    actions = given_actions(context)
    watched(
        lambda emit, switch: actions.resume(
            run,
            home=home_from(os.environ).create(),
            budget_usd=budget,
            on_event=emit,
            switch=switch,
            notify_target=notify,
            single_supervisor=single_supervisor,
        ),
        run or "",
        as_json=as_json,
    )


def with_backend(recipe: Recipe, ask_skypilot: Callable[[], Enabled] | None = None) -> Recipe:
    """A recipe that names no backend rents through SkyPilot where that has credentials for some cloud."""
    if recipe.backend is not None:
        return recipe
    from orchestrator.backends.sky.enabled_clouds import enabled_clouds

    found = (ask_skypilot or enabled_clouds)()
    return recipe.model_copy(update={"backend": "sky"}) if found.enabled else recipe


def refuse_unasked_spending(recipe: Recipe, budget: Decimal | None, *, yes: bool) -> None:
    """Real money needs a backend that was named, and without a question a budget that was.

    Raises:
        UserError: One of them is missing.
    """
    if recipe.backend is None:
        raise UserError(
            f"recipe {recipe.name} names no backend, and SkyPilot has no cloud credentials, so nothing was rented; "
            "add --backend local to train on this machine, or set up a cloud with `sky check` and add --backend "
            "sky."
        )
    if recipe.backend != "local" and yes and budget is None:
        raise UserError(
            f"--yes on the paid backend {recipe.backend} needs an explicit --budget; for example: --budget "
            f"{recipe.budget_usd}"
        )


def ask(question: str, *, yes: bool) -> None:
    """Go on only if a person says so.

    Raises:
        UserError: Nobody is there to answer.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("the input is not a terminal, so nobody can confirm; add --yes to continue without a question.")
    if not typer.confirm(question, err=True):
        typer.echo("Nothing was rented.", err=True)
        raise typer.Exit(FAILED_EXIT_CODE)


def watched(supervise: Callable[[Emit, StopSwitch], RunSummary], name: str, *, as_json: bool) -> None:
    """Supervise in the foreground and show it; ends with the summary."""
    from orchestrator.supervisor.lease.stopping import StopSwitch
    from orchestrator.views import live
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.runs import summary_facts

    switch = StopSwitch()
    console = render.console_on(sys.stderr if as_json else sys.stdout)
    with live.watcher(console, name, switch) as watcher:
        summary = supervise(watcher, switch)
    if as_json:
        print_json(summary_facts(summary))
    else:
        render.summary(summary, console)
    if summary.status.state == "FAILED":
        raise typer.Exit(FAILED_EXIT_CODE)


def in_background(context: typer.Context, *, as_json: bool) -> None:
    """Do what this command line says in a session of its own, and say how to follow it."""
    from orchestrator.supervisor import background
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json

    started = background.start(given_invocation(context).arguments, home_from(os.environ).create())
    if as_json:
        print_json(started)
        return
    console = render.console_on(sys.stdout)
    render.tell(console, f"{started.run_id} is supervised in the background by process {started.pid}.")
    render.tell(console, f"Log: {started.log}")
    render.tell(console, f"To save a checkpoint and stop: slm stop {started.run_id}")
    render.following(console, f"slm status {started.run_id}")


def finite(seconds: float) -> float | None:
    """None for an interval that never ends: a market without losses needs no checkpoint but the last."""
    return seconds if seconds < float("inf") else None


def recover(
    context: typer.Context,
    store: Annotated[
        str, typer.Option("--store", metavar="URI", help="Run store of one run: a folder or s3://bucket/prefix.")
    ],
    as_json: options.JsonOption = False,
) -> None:
    """Take over a run on another machine: rebuild its ledger from its run store.

    The previous supervisor can no longer rent or renew nodes; its open leases stay reserved until their last terminator
    has fired. This command neither rents nor terminates anything: continue with slm resume, or end the run with slm
    stop.

    \b
    Examples:
      slm recover --store s3://my-bucket/runs/slm-1f2e3d-demo-1
      slm recover --store /mnt/shared/demo-1 --json
    """
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.runs import run_facts

    found = given_actions(context).recover(absolute(store) or store, home=home_from(os.environ).create())
    if as_json:
        print_json({"runs": [run_facts(found)]})
    else:
        console = render.console_on(sys.stdout)
        render.statuses([found], console)
        console.print(f"\nNext: slm resume {found.run_id}")


def absolute(store: str | None) -> str | None:
    """A folder by its whole path, so that a command from elsewhere finds it too."""
    return str(Path(store).expanduser().absolute()) if store is not None and "://" not in store else store

"""status, logs, stop, ledger: looking at runs and ending them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cost.errors import UserError
from orchestrator.commands.actions import given_actions
from orchestrator.commands.options import JsonOption, RunArgument
from orchestrator.settings import home_from

LEFT_EXIT_CODE = 1


def status(run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Show the progress and cost of one run or of all runs.

    \b
    Examples:
      slm status
      slm status demo-1 --json
    """
    from orchestrator.runs import status as report
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.runs import run_facts

    found = report.status(run, home=home_from(os.environ).create())
    if as_json:
        print_json({"runs": [run_facts(entry) for entry in found]})
    else:
        render.statuses(found, render.console_on(sys.stdout))


def logs(
    run: RunArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
) -> None:
    """Print the logs of a run's nodes.

    \b
    Examples:
      slm logs
      slm logs demo-1 -f
    """
    from orchestrator.runs import status as report

    for line in report.logs(run, home=home_from(os.environ).create(), follow=follow):
        typer.echo(line)


def stop(
    context: typer.Context,
    run: RunArgument = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Stop every unfinished run, then terminate orphans as `slm reconcile` does."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Save a checkpoint and stop a run.

    Returns when all its nodes are terminated. With --all, the exit code is 1 if anything may still run.

    \b
    Examples:
      slm stop
      slm stop demo-1
      slm stop --all
    """
    from orchestrator.views import live
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.runs import run_facts

    if everything:
        stop_all(context, run, as_json=as_json)
        return
    lines = live.PlainLines(render.console_on(sys.stderr), run or "")
    stopped = given_actions(context).stop(run, home=home_from(os.environ).create(), on_event=lines)
    if as_json:
        print_json({"runs": [run_facts(stopped)]})
    else:
        render.statuses([stopped], render.console_on(sys.stdout))


def stop_all(context: typer.Context, run: str | None, *, as_json: bool) -> None:
    """Every unfinished run, then everything that should not live."""
    from orchestrator.upkeep import stop_all as ending
    from orchestrator.views import live
    from orchestrator.views import runs as render
    from orchestrator.views import upkeep as render_upkeep
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.upkeep import ending_facts

    if run is not None:
        raise UserError(f"--all stops every run; remove {run}, or remove --all.")
    lines = live.PlainLines(render.console_on(sys.stderr), "")
    done = ending.stop_all(given_actions(context).stop, home_from(os.environ).create(), lines)
    if as_json:
        print_json(ending_facts(done))
    else:
        render_upkeep.ending(done, render.console_on(sys.stdout))
    if done.is_left:
        raise typer.Exit(LEFT_EXIT_CODE)


def ledger(
    run: RunArgument = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare each lease with SkyPilot's own cost report.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a run's ledger: every reservation and charge.

    \b
    Examples:
      slm ledger
      slm ledger demo-1 --json
      slm ledger 1.5b-1 --compare
    """
    from orchestrator.runs import status as report
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.runs import ledger_facts
    from orchestrator.views.facts.upkeep import comparison_facts

    home = home_from(os.environ).create()
    view = report.ledger(run, home=home)
    if compare:
        from orchestrator.backends.sky.client import SkyClient
        from orchestrator.upkeep import sky_costs
        from orchestrator.views import upkeep as render_upkeep

        found = sky_costs.compare(view.leases, SkyClient(home.root / "sky-costs.log"))
        if as_json:
            print_json({"run_id": view.run_id, **comparison_facts(found)})
        else:
            render_upkeep.comparison(view.run_id, found, render.console_on(sys.stdout))
    elif as_json:
        print_json(ledger_facts(view))
    else:
        render.ledger(view, render.console_on(sys.stdout))

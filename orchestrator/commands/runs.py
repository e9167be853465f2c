"""status, logs, stop, ledger: looking at runs and ending them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from orchestrator.commands.actions import actions_of
from orchestrator.commands.options import JsonOption, RunArgument
from orchestrator.settings import home_from


def status(run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Show where a run is, or all runs.

    \b
    Examples:
      slm status
      slm status demo-1 --json
    """
    from orchestrator import render, report

    found = report.status(run, home=home_from(os.environ).create())
    if as_json:
        render.as_json({"runs": found})
    else:
        render.statuses(found, render.console_on(sys.stdout))


def logs(
    run: RunArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a run's nodes wrote.

    \b
    Examples:
      slm logs
      slm logs demo-1 -f
    """
    from orchestrator import report

    for line in report.logs(run, home=home_from(os.environ).create(), follow=follow):
        typer.echo(line)


def stop(context: typer.Context, run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Ask a run for a checkpoint and its end.

    Returns when nothing of it is left running.

    \b
    Examples:
      slm stop
      slm stop demo-1
    """
    from orchestrator import live, render

    lines = live.PlainLines(render.console_on(sys.stderr), run or "")
    stopped = actions_of(context).stop(run, home=home_from(os.environ).create(), on_event=lines)
    if as_json:
        render.as_json({"runs": [stopped]})
    else:
        render.statuses([stopped], render.console_on(sys.stdout))


def ledger(run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Show every entry of a run's books.

    \b
    Examples:
      slm ledger
      slm ledger demo-1 --json
    """
    from orchestrator import render, report

    view = report.ledger(run, home=home_from(os.environ).create())
    if as_json:
        render.as_json(render.ledger_facts(view))
    else:
        render.ledger(view, render.console_on(sys.stdout))

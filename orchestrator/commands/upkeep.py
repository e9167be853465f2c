"""reconcile, doctor: what lives, and whether everything is as it must be before money is spent."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from orchestrator.commands.options import JsonOption
from orchestrator.settings import home_from

WRONG_EXIT_CODE = 1


def reconcile(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be terminated.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List our cloud resources and terminate orphans.

    Our resources have names that begin with slm-OWNER-; nothing else is touched. An orphan is a cluster that the ledger
    does not know, has settled, or whose paid time is over. Supervisors do the same at their start and every few
    minutes. Exit code 1 means that an orphan is still running or that a cloud could not be checked.

    \b
    Examples:
      slm reconcile --dry-run
      slm reconcile
    """
    from orchestrator.backends.registry import every_backend
    from orchestrator.upkeep import inventory
    from orchestrator.views import runs as render
    from orchestrator.views import upkeep as render_upkeep
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.upkeep import inventory_facts

    home = home_from(os.environ).create()
    found = inventory.reconcile(home, every_backend(home), dry_run=dry_run)
    if as_json:
        print_json(inventory_facts(found))
    else:
        render_upkeep.inventory(found, render.console_on(sys.stdout))
    if found.problems or (found.orphans and not dry_run):
        raise typer.Exit(WRONG_EXIT_CODE)


def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URI", help="Run store to check. [default: the local one]")
    ] = None,
    iam: Annotated[bool, typer.Option("--iam", help="Print the minimal IAM policy for an AWS user and exit.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the set-up before money is spent.

    Checks credentials, the terminators of each cloud, the clock, the permissions of the run store, disk space, orphans
    and the ledger, and says how to fix each problem. Exit code 1 means that a check failed.

    \b
    Examples:
      slm doctor
      slm doctor --store /mnt/shared/runs --json
      slm doctor --iam --store s3://my-bucket/runs
    """
    if iam:
        from orchestrator.upkeep import iam_policy

        typer.echo(json.dumps(iam_policy.policy(store), indent=2))
        return
    from orchestrator.backends.registry import every_backend
    from orchestrator.upkeep import doctor as examination
    from orchestrator.views import runs as render
    from orchestrator.views import upkeep as render_upkeep
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.upkeep import examination_facts

    home = home_from(os.environ).create()
    console = render.console_on(sys.stdout)
    found = []
    for finding in examination.examine(home, every_backend(home), store_uri=store):
        found.append(finding)
        if not as_json:
            render_upkeep.finding(finding, console)
    if as_json:
        print_json(examination_facts(found))
    else:
        render_upkeep.verdict(found, console)
    if any(entry.level is examination.Level.FAIL for entry in found):
        raise typer.Exit(WRONG_EXIT_CODE)

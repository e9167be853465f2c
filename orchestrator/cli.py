"""The `slm` command: which commands there are, and the only place where an error becomes an exit code.

Start-up is part of the interface: this module imports typer and little else, and every command imports what it needs
when it runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cost.errors import SlmError
from orchestrator.commands import analysis as advice
from orchestrator.commands import launching, models, planning, runs, tables, upkeep
from orchestrator.commands.actions import Invocation

if TYPE_CHECKING:
    from orchestrator.commands.actions import Actions

WIDEST_HELP = 110

# Plain help: drawing it with rich would double the time that `slm --help` takes.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"max_content_width": WIDEST_HELP, "help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the installed version and end."""
    if wanted:
        from importlib.metadata import version

        from orchestrator.settings import DISTRIBUTION

        typer.echo(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def slm(
    _version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pre-train a small language model on the cheapest spot GPUs within a spending cap.

    \b
    Examples:
      slm plan demo                      show cost, offers and predicted loss
      slm plan --params max              plan the largest model that 100 dollars pay for
      slm launch demo --yes              train on this machine, in minutes, without a GPU
      slm status                         show progress, speed and cost
      slm resume --budget 150            continue a run that reached its cap
    """


for command in (
    planning.plan,
    launching.launch,
    runs.status,
    runs.logs,
    runs.stop,
    launching.resume,
    launching.recover,
    runs.ledger,
    models.generate,
    models.export,
    planning.recipes,
    planning.prepare,
    advice.estimate,
    advice.frontier,
    advice.simulate,
    tables.offers,
    tables.gpus,
    upkeep.reconcile,
    upkeep.doctor,
):
    app.command()(command)
app.command("import")(models.import_)


def main(arguments: Sequence[str] | None = None, *, actions: Actions | None = None) -> None:
    """Run one command and end the process: 0 done, 1 it went wrong, 2 the request cannot be met."""
    with contextlib.suppress(AttributeError):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=given, prog_name="slm", obj=Invocation(tuple(given), actions))
    except SlmError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

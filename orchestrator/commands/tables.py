"""offers, gpus: the tables that every plan rests on."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from cost.errors import SlmError, UserError
from orchestrator.commands import options
from orchestrator.settings import home_from

DEFAULT_TOP = 25
REFRESH_SECONDS = 900
"""Longest that all clouds together may take."""


def offers(
    gpus: Annotated[
        list[str] | None,
        typer.Option("--gpu", "--gpus", metavar="NAMES", help="Show only these GPUs, such as H100-SXM."),
    ] = None,
    clouds: Annotated[
        list[str] | None,
        typer.Option("--cloud", "--clouds", metavar="NAMES", help="Show only these clouds, such as aws."),
    ] = None,
    spot: options.SpotOption = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Number of offers to show.")] = DEFAULT_TOP,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Download SkyPilot's price catalogs first; needs the extra `cloud`.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """List GPU offers, cheapest GPU-hour first.

    Every price has its date and source. --refresh needs no cloud credentials.

    \b
    Examples:
      slm offers --gpu H100-SXM --spot
      slm offers --cloud aws,gcp --top 50
      slm offers --refresh
    """
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.prices import table as prices
    from orchestrator.views import runs as render
    from orchestrator.views import tables as render_tables
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.tables import offers_facts

    home = home_from(os.environ)
    if refresh:
        refresh_now(as_json=as_json)
    known = prices.current_prices(home)
    chosen = planning.offers_for(
        known.offers,
        {
            "clouds": planning.known_clouds(options.names_in(clouds), known.offers),
            "gpus": planning.known_gpus(options.names_in(gpus)),
            "spot": spot,
        },
    )
    if as_json:
        print_json(offers_facts(chosen, known))
        return
    render_tables.offers(chosen, known, render.console_on(sys.stdout), top=top, now=datetime.now(UTC))


def gpus(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Show only these GPUs.")] = None,
    as_json: options.JsonOption = False,
) -> None:
    """List the supported GPUs with their data-sheet figures and sources.

    Peaks are dense tensor-core figures; MFU is measured against them.

    \b
    Examples:
      slm gpus
      slm gpus H100-SXM A100
      slm gpus --json
    """
    from cost.market.hardware import accelerators
    from orchestrator.planning import recipe_plan as planning
    from orchestrator.prices import table as prices
    from orchestrator.views import runs as render
    from orchestrator.views import tables as render_tables
    from orchestrator.views.facts.document import print_json
    from orchestrator.views.facts.tables import gpus_facts

    wanted = planning.known_gpus(names) or tuple(accelerators())
    known = prices.current_prices(home_from(os.environ))
    cards = [accelerators()[name] for name in wanted]
    if as_json:
        print_json(gpus_facts(cards, known))
        return
    render_tables.gpus(cards, known, render.console_on(sys.stdout), now=datetime.now(UTC))


def refresh_now(*, as_json: bool) -> None:
    """Run the child that reads the catalogs, and pass on what it says.

    Raises:
        UserError: SkyPilot is not installed.
        SlmError: No cloud could be read.
    """
    from orchestrator.prices import table as prices
    from orchestrator.prices.sources.skypilot import BUSY, NO_SKYPILOT

    if not prices.has_skypilot():
        raise UserError(
            "--refresh reads prices through SkyPilot, which is not installed: pip install 'slm-spot[cloud]'"
        )
    home = home_from(os.environ).create()
    with home.offers_log.open("wb") as log:
        try:
            done = subprocess.run(
                prices.refresh_command(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                timeout=REFRESH_SECONDS,
                check=False,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise SlmError(
                f"reading the catalogs took longer than {REFRESH_SECONDS} s and was ended; see {home.offers_log}"
            ) from None
    if done.returncode == BUSY:
        raise SlmError("another price refresh is running; try again in a minute.")
    if done.returncode == NO_SKYPILOT:
        raise SlmError(f"SkyPilot is installed but cannot be imported; see {home.offers_log}")
    print(done.stdout, end="", file=sys.stderr if as_json else sys.stdout)
    if done.returncode != 0:
        raise SlmError(f"no cloud's catalog could be read, so prices were not changed; see {home.offers_log}")

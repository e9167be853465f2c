"""Options that several commands share, and how their text becomes a value."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST_USD = Decimal("0.000001")
"""The ledger counts in millionths of a dollar."""


UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
HOURS_PER_UNIT = {"min": 1 / 60, "h": 1.0, "d": 24.0}
MAX = "max"


class ObjectiveName(StrEnum):
    """What the best offer has least of."""

    USD_PER_PARAM = "usd_per_param"
    LOSS = "loss"
    DOLLARS = "dollars"
    HOURS = "hours"


class PrecisionName(StrEnum):
    """Of the arithmetic; auto is the faster of the two on each offer."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class BackendName(StrEnum):
    """Where nodes come from: a spot market on this machine, or any cloud that SkyPilot serves."""

    LOCAL = "local"
    SKY = "sky"


def parse_usd(text: str) -> Decimal:
    """100, 100.50 or $100 as an amount above zero, in whole millionths."""
    try:
        amount = Decimal(text.strip().removeprefix("$").replace(",", ""))
    except InvalidOperation:
        raise typer.BadParameter(f"{text!r} is not an amount of dollars such as 100 or 12.50.") from None
    if not amount.is_finite() or amount < SMALLEST_USD:
        raise typer.BadParameter(f"{text} is not more than 0 dollars.")
    return amount.quantize(SMALLEST_USD) if amount != amount.to_integral_value() else Decimal(int(amount))


def parse_positive(text: str) -> float:
    """A number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise typer.BadParameter(f"{text!r} should be a number above 0.")
    return number


def parse_count(text: str) -> float:
    """1.1e9, 1.1B, 350M or 40K as a number above zero."""
    shown = text.strip()
    unit = UNITS.get(shown[-1:].upper(), 1.0)
    try:
        number = float(shown[:-1] if unit > 1 else shown) * unit
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a count such as 1.1e9, 1.1B or 350M.")
    return number


def parse_range(text: str) -> tuple[float, float] | None:
    """1.1e9..3e9 as both ends, one count as a range of one, `max` as None."""
    if text.strip().lower() == MAX:
        return None
    low, dots, high = text.partition("..")
    ends = parse_count(low), parse_count(high if dots else low)
    if ends[0] > ends[1]:
        raise typer.BadParameter(f"{text!r} goes down; write the smaller count first.")
    return ends


def parse_hours(text: str) -> float:
    """48, 48h, 3d or 90min as hours above zero."""
    match = re.fullmatch(r"([0-9.]+)\s*(min|h|d)?", text.strip())
    try:
        hours = float(match[1]) * HOURS_PER_UNIT[match[2] or "h"] if match else 0.0
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a time such as 48h, 3d or 90min.")
    return hours


def parse_notify(text: str) -> str:
    """A command or a web address; empty for nobody."""
    from orchestrator.supervisor.notify import checked_target

    return checked_target(text) if text.strip() else ""


def names_in(texts: Sequence[str] | None) -> tuple[str, ...] | None:
    """`--gpus A,B --gpus C` as three names; None where the option was not given."""
    if not texts:
        return None
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def overrides(
    sets: Sequence[str] | None,
    *,
    backend: BackendName | None = None,
    market: str | None = None,
    time_scale: float | None = None,
    precision: PrecisionName | None = None,
    profile: bool = False,
) -> list[str]:
    """Options that stand for a recipe's field, as `--set` would say them; `--set` itself has the last word.

    A market's trace file gets its whole path, so that a resume from another folder finds it too.
    """
    from orchestrator.backends.local import schedule

    named: dict[str, object] = {
        "backend": backend and backend.value,
        "local.market": market and json.dumps(schedule.resolve(market)),
        "local.time_scale": time_scale,
        "precision": precision and precision.value,
        "training.profile": "true" if profile else None,
    }
    return [f"{key}={value}" for key, value in named.items() if value is not None] + list(sets or ())


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or the path of its YAML file.")]
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Name of the run; may be omitted if there is only one.", show_default=False),
]
BudgetOption = Annotated[
    Decimal | None,
    typer.Option("--budget", parser=parse_usd, metavar="USD", help="Spending cap in dollars. [default: the recipe's]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe; may be repeated."),
]
SpotOption = Annotated[bool | None, typer.Option("--spot/--on-demand", help="Use only spot or only on-demand offers.")]
CloudsOption = Annotated[
    list[str] | None, typer.Option("--clouds", metavar="NAMES", help="Use only these clouds, such as aws,gcp.")
]
GpusOption = Annotated[
    list[str] | None, typer.Option("--gpus", metavar="NAMES", help="Use only these GPUs, such as H100-SXM,A100.")
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, metavar="N", help="Number of nodes to rent. [default: the recipe's]")
]
ObjectiveOption = Annotated[
    ObjectiveName | None,
    typer.Option("--objective", help="How to rank offers. [default: usd_per_param; the largest model with --params]"),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option("--deadline", parser=parse_hours, metavar="TIME", help="Maximum duration of the run: 48h, 3d, 90min."),
]
AllCloudsOption = Annotated[
    bool, typer.Option("--all-clouds", help="Include clouds for which SkyPilot has no credentials.")
]
AllowUnguardedOption = Annotated[
    bool,
    typer.Option(
        "--allow-unguarded", help="Allow clouds on which nothing ends a hung node; it can exceed the cap there."
    ),
]
CorpusOption = Annotated[
    str | None,
    typer.Option(
        "--corpus", metavar="NAME", help="Training corpus for the predicted loss: fineweb, fineweb-edu, pile."
    ),
]
UniqueTokensOption = Annotated[
    float | None,
    typer.Option(
        "--unique-tokens",
        parser=parse_count,
        metavar="N",
        help="Number of unique tokens in the data; training on more repeats them.",
    ),
]
TokensPerParamOption = Annotated[
    float | None,
    typer.Option(
        "--tokens-per-param",
        parser=parse_positive,
        metavar="X",
        help="Training tokens per parameter, if a size is given. [default: 20]",
    ),
]
BackendOption = Annotated[
    BackendName | None,
    typer.Option(
        "--backend",
        help="Where to rent nodes: local simulates a cloud on this machine, sky uses SkyPilot. [default: the recipe's]",
    ),
]
PrecisionOption = Annotated[
    PrecisionName | None,
    typer.Option("--precision", help="Precision of training; auto chooses per offer. [default: the recipe's]"),
]
MarketOption = Annotated[
    str | None,
    typer.Option(
        "--market", metavar="KIND", help="Spot market of the local backend: calm, hazard:PER_HOUR or trace:FILE."
    ),
]
TimeScaleOption = Annotated[
    float | None,
    typer.Option(
        "--time-scale", parser=parse_positive, metavar="X", help="Billed seconds per real second on the local backend."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; docs/json.md describes the keys.")]
NotifyOption = Annotated[
    str | None,
    typer.Option(
        "--notify",
        parser=parse_notify,
        envvar="SLM_NOTIFY",
        metavar="COMMAND|URL",
        help="Command or URL to notify of warnings (also at 50, 80 and 95 % of the cap) and of the end of the run.",
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask for confirmation; a paid backend then needs --budget.")
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        help="Folder or s3://bucket/prefix in which to create the run store. [default: in SLM_HOME]",
    ),
]
SingleSupervisorOption = Annotated[
    bool,
    typer.Option(
        "--single-supervisor",
        help="For a run store without conditional writes: promise that only this machine supervises the run.",
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Supervise the run in the background and return.")]

"""From a recipe to a plan: which prices, which constraints, and what this machine stands for.

The arithmetic is `cost.planner`; this module brings it what a person said and what a recipe says. Torch-free, and it
reads no network: prices come from a table on disk that knows its own dates.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from cost.errors import UserError
from cost.hardware import accelerators, canonical_name
from cost.offers import Offer, load_reference_offers
from cost.planner import Emulation, Estimate, Market, Plan, make_plan
from cost.preemption import SECONDS_PER_HOUR, Hazards
from orchestrator.figures import plural
from orchestrator.market import schedule
from tasks.recipe import Recipe

REFERENCE_TABLE = "reference table"
NOT_ASKED_FOR = "was not asked for"
SHOWN_REASONS = 3

_DATE = re.compile(r"(?:>=)?(\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True, slots=True)
class Prices:
    """Offers, and where their prices come from."""

    offers: tuple[Offer, ...]
    source: str
    num_skipped: int = 0
    """Rows of the source that are no offers."""

    def dates(self) -> tuple[date, date] | None:
        """The oldest and the newest price that states its day; None where none does."""
        known = sorted(day for offer in self.offers if (day := day_of(offer)) is not None)
        return (known[0], known[-1]) if known else None

    @property
    def num_undated(self) -> int:
        """Offers whose source states no day."""
        return sum(day_of(offer) is None for offer in self.offers)


def day_of(offer: Offer) -> date | None:
    """The day from which a price is known; None where the source is undated."""
    found = _DATE.match(offer.as_of)
    return date.fromisoformat(found[1]) if found else None


def current_prices() -> Prices:
    """The newest prices on this machine: the dated table that ships with slm."""
    quotes = load_reference_offers()
    return Prices(quotes.offers, REFERENCE_TABLE, len(quotes.skipped))


def make_plan_for(
    recipe: Recipe,
    prices: Prices,
    *,
    budget_usd: Decimal,
    spot: bool | None = None,
    clouds: Collection[str] | None = None,
    gpus: Collection[str] | None = None,
    nodes: int | None = None,
) -> Plan:
    """Rank the offers for a recipe; what is None here is as the recipe says.

    Raises:
        UserError: A cloud or a GPU that no offer has, or a market that cannot be played.
    """
    emulation = emulation_of(recipe)
    # The local cloud starts with all nodes that the recipe wants; elsewhere fewer may be the better buy.
    fewest = recipe.nodes.max if emulation is not None else recipe.nodes.min

    def planned(hazards: Hazards) -> Plan:
        return make_plan(
            recipe.workload(),
            prices.offers,
            budget_usd=budget_usd,
            min_nodes=nodes or fewest,
            max_nodes=nodes or recipe.nodes.max,
            clouds=known_clouds(recipe.offers.clouds if clouds is None else clouds, prices.offers),
            gpus=known_gpus(recipe.offers.gpus if gpus is None else gpus),
            spot=recipe.offers.spot if spot is None else spot,
            emulation=emulation,
            market=Market(hazards=hazards),
        )

    if emulation is None:
        return planned(Hazards())
    played = schedule.load(recipe.local.market, seed=recipe.local.seed, time_scale=recipe.local.time_scale)
    if isinstance(played, schedule.Hazard):
        return planned(Hazards(fixed_per_node_hour=played.per_hour))
    if isinstance(played, schedule.Script):
        undisturbed = planned(Hazards(fixed_per_node_hour=0.0))
        return planned(Hazards(fixed_per_node_hour=scripted_rate(played, undisturbed, recipe.local.time_scale)))
    return planned(Hazards())


def scripted_rate(script: schedule.Script, undisturbed: Plan, time_scale: float) -> float:
    """Losses per node and billed hour that a written trace brings while the best plan would run."""
    best = undisturbed.best
    if best is None:
        return 0.0
    real_seconds = best.hours * SECONDS_PER_HOUR / time_scale
    losses = [one for one in script.events if one.action != "capacity" and one.at_seconds < real_seconds]
    return len(losses) / (best.num_nodes * best.hours)


def emulation_of(recipe: Recipe) -> Emulation | None:
    """What this machine plays for a recipe of the local backend; None for real clouds."""
    if recipe.backend != "local":
        return None
    cores = float(usable_cores())
    if recipe.training.num_threads is not None:
        cores = min(cores, float(recipe.training.num_threads * recipe.nodes.max))
    return Emulation(
        num_cores=cores,
        time_scale=recipe.local.time_scale,
        micro_batch_size=recipe.training.micro_batch_size,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def known_clouds(names: Collection[str] | None, offers: Sequence[Offer]) -> tuple[str, ...] | None:
    """Names of clouds in the spelling of the price table.

    Raises:
        UserError: No offer is of such a cloud; names the nearest.
    """
    if names is None:
        return None
    known = sorted({offer.cloud for offer in offers})
    for name in names:
        if name.lower() not in known:
            raise UserError(
                f"no offer is of cloud {name!r}{nearest(name.lower(), known)} There are {', '.join(known)}."
            )
    return tuple(name.lower() for name in names)


def known_gpus(names: Collection[str] | None) -> tuple[str, ...] | None:
    """Names of the hardware table; a family such as A100 stands for all of its members.

    Raises:
        UserError: No accelerator is called so; names the nearest.
    """
    if names is None:
        return None
    known = list(accelerators())
    found: list[str] = []
    for name in names:
        family = [one for one in known if one.upper().startswith(name.upper() + "-")]
        single = canonical_name(name)
        if not family and single is None:
            raise UserError(f"no GPU is called {name!r}{nearest(name.upper(), known)} There are {', '.join(known)}.")
        found += family or [single or name]
    return tuple(dict.fromkeys(found))


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that names the most similar one."""
    from difflib import get_close_matches  # only on the way to an error

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def winner(plan: Plan) -> Estimate:
    """The best estimate.

    Raises:
        UserError: No offer can run the workload; tells why and what would change it.
    """
    if plan.best is not None:
        return plan.best
    reasons = "; ".join(f"{reason} ({plural(number, 'offer')})" for reason, number in rejections(plan)[:SHOWN_REASONS])
    offers = plural(len(plan.rejected), "offer")
    raise UserError(
        f"none of {offers} can run this recipe: {reasons}. Make the model or the micro-batch smaller, or allow more "
        "clouds, GPUs or nodes."
    )


def rejections(plan: Plan) -> list[tuple[str, int]]:
    """Reasons and how many offers each turned away, the commonest first."""
    reasons = Counter("not asked for" if one.reason.endswith(NOT_ASKED_FOR) else one.reason for one in plan.rejected)
    return reasons.most_common()


def offers_in_order(plan: Plan) -> list[Offer]:
    """What to rent, best first."""
    return [estimate.offer for estimate in plan.ranked]

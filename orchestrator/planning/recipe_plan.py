"""From a recipe to a plan: prices, constraints, and the speed of this machine for the local cloud.

The arithmetic is in `cost.plan.planner`; this module passes it the options of the command and the recipe. It is
torch-free and makes no network calls: prices come from a dated table on disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import Any, Literal

from cost.errors import UserError
from cost.market.hardware import accelerators, canonical_name
from cost.market.offers import Offer
from cost.market.preemption import SECONDS_PER_HOUR, Hazards
from cost.market.providers import FIX, provider, refusal
from cost.outcome.scaling_law import LossLaw, law_for, laws
from cost.performance.software import our_trainer
from cost.performance.throughput import Calibration, default_calibration
from cost.plan.explain import Explanation, explain
from cost.plan.planner import Emulation, Estimate, Market, Objective, Plan, Rejected, make_plan
from cost.plan.plans import known_loss
from cost.spelling import did_you_mean
from orchestrator.backends.local import schedule
from orchestrator.backends.registry import cloud_supports
from orchestrator.backends.sky.terminators import armed_provider
from orchestrator.figures import plural
from orchestrator.planning.history import History, begun_precision, measured_tokens_per_second
from orchestrator.prices.table import Prices
from orchestrator.settings import Home
from tasks.recipe.schema import AUTO, PRECISIONS, ConcretePrecision, Recipe
from trainer.processor import ProcessorSpeed, assumed_speed

NOT_ASKED_FOR = "was not asked for"
UNGUARDED = f"nothing ends a hung node there; {FIX}"
SHOWN_REASONS = 3
USUAL_OPTIMIZER: Literal["muon"] = "muon"
EMULATED_SPEED = 0.5
"""Share of the modelled speed that workers of the local cloud reach beside Ray, the guards and each other: two workers
of the demo recipe on two cores made at best 15 of the 31 thousand tokens/s that the model says (2026-11-23)."""


@dataclass(frozen=True, slots=True)
class Belief:
    """What the options say about the data: its corpus, if it is a known one, and how many tokens it has."""

    corpus: str | None = None
    unique_tokens: int | None = None

    def law(self, preset: str) -> LossLaw:
        """The loss law of this corpus and way of training; nanochat's where Muon was measured only there."""
        known = laws()
        only_there = f"{self.corpus}/adamw" not in known and f"{self.corpus}/nanochat" in known
        return law_for(self.corpus, "nanochat" if only_there and preset == USUAL_OPTIMIZER else preset)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with what it believed of the market: `cost.plan.explain` and `cost.plan.simulate` need both."""

    plan: Plan
    hazards: Hazards


def make_plan_for(recipe: Recipe, prices: Prices, *, budget_usd: Decimal, **wishes: Any) -> Plan:
    """Rank the offers for a recipe; see `planned_for`."""
    return planned_for(recipe, prices, budget_usd=budget_usd, **wishes).plan


def planned_for(
    recipe: Recipe,
    prices: Prices,
    *,
    budget_usd: Decimal,
    spot: bool | None = None,
    clouds: Collection[str] | None = None,
    gpus: Collection[str] | None = None,
    nodes: int | None = None,
    objective: Objective = "usd_per_param",
    deadline_hours: float | None = None,
    all_clouds: bool = False,
    allow_unguarded: bool = False,
    belief: Belief | None = None,
    measured_tokens_per_second: float | None = None,
    processor: ProcessorSpeed | None = None,
    history: History | None = None,
) -> Planned:
    """Rank the offers for a recipe; an option that is None is taken from the recipe.

    `measured_tokens_per_second`: the speed of this machine for a recipe of this shape; `history`: what earlier runs on
    clouds measured, which says nothing about the local cloud. Offers of clouds where nothing would end a hung node are
    rejected unless `allow_unguarded`; the local cloud has limits of its own.

    Raises:
        UserError: A cloud or a GPU that no offer has, or a market that cannot be simulated.
    """
    emulation = local_emulation(recipe, measured_tokens_per_second, processor)
    known = History() if history is None or emulation is not None else history
    calibration = known.calibrated()
    # The local cloud starts with all nodes that the recipe wants; elsewhere fewer may be the better buy.
    fewest = recipe.nodes.max if emulation is not None else recipe.nodes.min
    asked = recipe.offers.clouds if clouds is None else clouds
    offered, locked = usable(prices, everywhere=all_clouds or asked is not None or emulation is not None)

    def planned(hazards: Hazards) -> Planned:
        plan = make_plan(
            recipe.workload(),
            offered,
            budget_usd=budget_usd,
            objective=objective,
            min_nodes=nodes or fewest,
            max_nodes=nodes or recipe.nodes.max,
            clouds=known_clouds(asked, prices.offers),
            gpus=known_gpus(recipe.offers.gpus if gpus is None else gpus),
            spot=recipe.offers.spot if spot is None else spot,
            deadline_hours=deadline_hours,
            emulation=emulation,
            market=planner_market(recipe, hazards, belief or Belief(), calibration, starts=known.starts),
            speed=1.0 if emulation is None else EMULATED_SPEED,
        )
        plan = plan if allow_unguarded or emulation is not None else guarded(plan)
        return Planned(replace(plan, rejected=(*plan.rejected, *locked), seen=known.seen), hazards)

    if emulation is None:
        return planned(Hazards(known.sightings))
    market = schedule.load(recipe.local.market, seed=recipe.local.seed, time_scale=recipe.local.time_scale)
    if isinstance(market, schedule.Hazard):
        return planned(Hazards(fixed_per_node_hour=market.per_hour))
    if isinstance(market, schedule.Script):
        undisturbed = planned(Hazards(fixed_per_node_hour=0.0)).plan
        return planned(Hazards(fixed_per_node_hour=scripted_rate(market, undisturbed, recipe.local.time_scale)))
    return planned(Hazards())


def options_without_recipe(
    prices: Prices,
    *,
    spot: bool | None = None,
    clouds: Collection[str] | None = None,
    gpus: Collection[str] | None = None,
    nodes: int | None = None,
    deadline_hours: float | None = None,
    all_clouds: bool = False,
    belief: Belief | None = None,
    precision: str | None = None,
    history: History | None = None,
) -> tuple[tuple[Offer, ...], dict[str, Any], tuple[Rejected, ...]]:
    """Offers, options of `make_plan`, and offers without credentials, for models that no recipe describes.

    They are trained as the recipes of their size are: compiled, with Muon, in bf16 where no `precision` is asked for.
    """
    offered, locked = usable(prices, everywhere=all_clouds or clouds is not None)
    if not offered:
        raise UserError(
            f"there is no offer on a cloud for which SkyPilot has credentials ({', '.join(prices.enabled or ())}); "
            "--all-clouds ranks the others too."
        )
    known = history or History()
    options = {
        "spot": spot,
        "clouds": known_clouds(clouds, prices.offers),
        "gpus": known_gpus(gpus),
        "min_nodes": nodes or 1,
        "max_nodes": nodes or 1,
        "deadline_hours": deadline_hours,
        "market": Market(
            hazards=Hazards(known.sightings),
            calibration=known.calibrated(),
            starts=known.starts,
            precisions=allowed_precisions(precision),
            law=(belief or Belief()).law(USUAL_OPTIMIZER),
            unique_tokens=None if belief is None else belief.unique_tokens,
            software=our_trainer(optimizer=USUAL_OPTIMIZER, compiled=True),
        ),
    }
    return offered, options, locked


def guarded(plan: Plan) -> Plan:
    """The plan without what may not be rented, which stands among the rejected with the reason, and in `unguarded`."""
    refused = {
        estimate.offer.cloud: reason
        for estimate in plan.ranked
        if (reason := guard_refusal(estimate.offer)) is not None
    }
    unguarded = tuple(estimate for estimate in plan.ranked if estimate.offer.cloud in refused)
    return replace(
        plan,
        ranked=tuple(estimate for estimate in plan.ranked if estimate.offer.cloud not in refused),
        rejected=(*plan.rejected, *(Rejected(estimate.offer, refused[estimate.offer.cloud]) for estimate in unguarded)),
        unguarded=unguarded,
    )


def guarded_offers(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    """Offers of clouds where something ends a hung node."""
    return tuple(offer for offer in offers if guard_refusal(offer) is None)


def guard_refusal(offer: Offer) -> str | None:
    """Why its cloud may not be rented from without --allow-unguarded: only terminators that we arm count."""
    return _refusal_of_cloud(offer.cloud)


@cache
def _refusal_of_cloud(cloud: str) -> str | None:
    """Asked for each of thousands of offers; what we arm does not change while we run."""
    return refusal(armed_provider(provider(cloud), cloud_supports()), allow_unguarded=False)


def offers_wanted(offers: Sequence[Offer], options: dict[str, Any]) -> tuple[Offer, ...]:
    """Offers of the wanted clouds, GPUs and kind.

    Raises:
        UserError: There is none.
    """
    found = offers_for(offers, options)
    if not found:
        raise UserError(
            f"none of {plural(len(offers), 'offer')} matches these clouds, GPUs and kinds (spot or on-demand); allow "
            "more, or see `slm offers`."
        )
    return found


def offers_for(offers: Sequence[Offer], options: dict[str, Any]) -> tuple[Offer, ...]:
    """The same, or none."""
    return tuple(
        offer
        for offer in offers
        if (options["clouds"] is None or offer.cloud in options["clouds"])
        and (options["gpus"] is None or offer.accelerator in options["gpus"])
        and (options["spot"] is None or offer.spot == options["spot"])
    )


def data_belief(corpus: str | None, unique_tokens: float | None) -> Belief:
    """What the options say about the data.

    Raises:
        UserError: No loss law knows this corpus; names those that are known.
    """
    known = sorted({name.partition("/")[0] for name in laws() if "/" in name})
    if corpus is not None and corpus not in known:
        raise UserError(f"there is no scaling law for corpus {corpus!r}; choose one of {', '.join(known)}.")
    return Belief(corpus, None if unique_tokens is None else int(unique_tokens))


def measured_here(home: Home, recipe: Recipe) -> float | None:
    """What a run of this shape reached on this machine, for the local backend."""
    return measured_tokens_per_second(home, recipe) if recipe.backend == "local" else None


def explained(planned: Planned, best: Estimate) -> tuple[Explanation, ...]:
    """Every number of an estimate with formula, inputs and source; no loss where its law does not hold."""
    numbers = explain(planned.plan, best, planned.hazards.for_offer(best.offer))
    return (
        numbers
        if known_loss(best) is not None
        else tuple(number for number in numbers if number.name != "predicted_loss")
    )


def usable(prices: Prices, *, everywhere: bool) -> tuple[tuple[Offer, ...], tuple[Rejected, ...]]:
    """Offers of clouds that SkyPilot has credentials for, and the others with the reason; all where it is unknown."""
    enabled = prices.enabled
    if everywhere or not enabled:
        return prices.offers, ()
    offered = tuple(offer for offer in prices.offers if offer.cloud in enabled)
    locked = tuple(
        Rejected(offer, f"there are no credentials for {offer.cloud}; --all-clouds ranks it too")
        for offer in prices.offers
        if offer.cloud not in enabled
    )
    return offered, locked


def allowed_precisions(name: str | None) -> tuple[ConcretePrecision, ...]:
    """What the planner may choose from; nothing where the workload's own stays."""
    return PRECISIONS if name == AUTO else tuple(precision for precision in PRECISIONS if precision == name)


def fixed(recipe: Recipe, plan: Plan) -> tuple[Recipe, list[Offer]]:
    """What a launch trains, and on which offers, best first.

    A recipe that leaves its precision to the planner gets the winner's, from the first step to the last; offers that
    would compute in another are not rented.

    Raises:
        UserError: No offer can run the recipe.
    """
    if recipe.precision != AUTO:
        return recipe, offers_in_order(plan)
    precision = winner(plan).layout.precision
    chosen = next(each_precision for each_precision in PRECISIONS if each_precision == precision)
    return recipe.in_precision(chosen), [
        estimate.offer for estimate in plan.ranked if estimate.layout.precision == precision
    ]


def as_begun(home: Home, recipe: Recipe) -> Recipe:
    """A recipe whose run was cut off keeps the precision that the run began with."""
    begun = begun_precision(home, recipe)
    return recipe if begun is None else recipe.in_precision(begun)


def planner_market(
    recipe: Recipe,
    hazards: Hazards,
    belief: Belief,
    calibration: Calibration | None = None,
    *,
    starts: Mapping[str, float] | None = None,
) -> Market:
    """What the planner believes for a recipe: its way of training decides the law and the kernels."""
    optimizer = recipe.optimizer.name
    return Market(
        hazards=hazards,
        law=belief.law(optimizer),
        unique_tokens=belief.unique_tokens,
        software=our_trainer(optimizer=optimizer, compiled=recipe.training.compile),
        calibration=default_calibration() if calibration is None else calibration,
        precisions=allowed_precisions(recipe.precision),
        starts=starts or {},
    )


def scripted_rate(script: schedule.Script, undisturbed: Plan, time_scale: float) -> float:
    """Losses per node and billed hour that a written trace brings while the best plan would run."""
    best = undisturbed.best
    if best is None:
        return 0.0
    real_seconds = best.hours * SECONDS_PER_HOUR / time_scale
    losses = [event for event in script.events if event.action != "capacity" and event.at_seconds < real_seconds]
    return len(losses) / (best.num_nodes * best.hours)


def local_emulation(
    recipe: Recipe, measured_tokens_per_second: float | None = None, processor: ProcessorSpeed | None = None
) -> Emulation | None:
    """What the local cloud simulates for a recipe of the local backend; None for real clouds.

    `processor` is the speed of its processor, which is assumed where it is not given.
    """
    if recipe.backend != "local":
        return None
    cores = float(usable_cores())
    if recipe.training.num_threads is not None:
        cores = min(cores, float(recipe.training.num_threads * recipe.nodes.max))
    speed = processor or assumed_speed()
    return Emulation(
        num_cores=cores,
        time_scale=recipe.local.time_scale,
        micro_batch_size=recipe.training.micro_batch_size,
        tokens_per_second=measured_tokens_per_second,
        bf16_flops_per_core=speed.square_bf16_flops,
        fp32_flops_per_core=speed.square_fp32_flops,
        is_timed=speed.is_measured,
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
            hint = did_you_mean(name.lower(), known) or "."
            raise UserError(f"no offer is of cloud {name!r}{hint} There are {', '.join(known)}.")
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
        family = [member for member in known if member.upper().startswith(name.upper() + "-")]
        single = canonical_name(name)
        if not family and single is None:
            hint = did_you_mean(name.upper(), known) or "."
            raise UserError(f"no GPU is called {name!r}{hint} There are {', '.join(known)}.")
        found += family or [single or name]
    return tuple(dict.fromkeys(found))


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
    return Counter(short_reason(rejection.reason) for rejection in plan.rejected).most_common()


def short_reason(reason: str) -> str:
    """One text for reasons that differ only in their offer."""
    if reason.endswith(NOT_ASKED_FOR):
        return "not asked for"
    return UNGUARDED if reason.endswith(FIX) else reason


def offers_in_order(plan: Plan) -> list[Offer]:
    """What to rent, best first."""
    return [estimate.offer for estimate in plan.ranked]

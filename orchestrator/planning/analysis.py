"""What `slm estimate`, `slm frontier` and `slm simulate` compute: from options to the arithmetic of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from cost.errors import UserError
from cost.market.hardware import Precision, accelerator
from cost.market.offers import Offer
from cost.market.preemption import SECONDS_PER_HOUR, Hazard
from cost.performance.layouts import Cluster, NoLayout, Placement, fastest_precision
from cost.performance.software import Software, our_trainer
from cost.performance.throughput import NODE_NETWORK_BYTES_PER_SECOND
from cost.performance.workload import Workload
from cost.plan.frontier import Point, frontier, ladder, model_shape
from cost.plan.plans import Chance, Estimate
from cost.plan.policy import DEFAULT, POLICIES, Traces, read_traces
from cost.plan.simulate import PATIENCE, Simulation, simulate
from orchestrator.planning import recipe_plan as planning
from orchestrator.planning.history import History
from orchestrator.planning.recipe_plan import USUAL_OPTIMIZER, Planned
from orchestrator.prices.table import Prices

FRONTIER_SIZES = (1e8, 1e10)
CHANCE_RUNS = 100
"""Draws beside a plan: enough to tell a coin from a safe bet."""
FEWEST_CHANCE_RUNS = 20
MOST_CHANCE_HOURS = 100_000
"""Simulated hours of all draws beside a plan together, about a third of a second; a plan of months is drawn less."""
ON_DEMAND = "on_demand"
RUNGS_PER_POINT = 6
"""The frontier shows every so many sizes of the ladder: each a third larger than the one before."""


# ---------------------------------------------------------------- one shape on one machine


@dataclass(frozen=True, slots=True)
class MachineEstimate:
    """A model on a number of equal machines."""

    name: str
    workload: Workload
    gpu: str
    gpus_per_node: int
    num_nodes: int
    placement: Placement
    cheapest: tuple[Offer, ...]
    """Of this very machine, the cheapest spot and the cheapest on-demand offer, where there is one."""
    measured_by: str | None = None
    """Our own run whose measured speed on this GPU is used."""

    @property
    def hours(self) -> float:
        """Hours of training, without start-up and losses."""
        return self.workload.num_tokens / self.placement.tokens_per_second / SECONDS_PER_HOUR

    def usd(self, offer: Offer) -> Decimal:
        """Dollars of these hours, without start-up, losses, disks and downloads."""
        return offer.usd_per_hour * self.num_nodes * Decimal(self.hours)


def estimate_machine(
    name: str,
    work: Workload,
    software: Software,
    prices: Prices,
    *,
    gpu: str,
    gpus: int,
    nodes: int,
    precisions: Sequence[Precision] = (),
    history: History | None = None,
) -> MachineEstimate:
    """The fastest layout on one kind of machine, in the fastest of `precisions` where there are any.

    Raises:
        UserError: No such GPU, or the model does not fit.
    """
    names = planning.known_gpus([gpu]) or ()
    if len(names) != 1:
        raise UserError(f"{gpu} is a family of GPUs; choose one of {', '.join(names)}.")
    (card,) = names
    cluster = Cluster(accelerator(card), gpus, nodes, NODE_NETWORK_BYTES_PER_SECOND)
    known = history or History()
    placed = fastest_precision(work, cluster, known.calibrated(), software, precisions=precisions)
    if isinstance(placed, NoLayout):
        raise UserError(f"{name} cannot run on {nodes} x {gpus}x{card}: {placed.reason}.")
    same = [offer for offer in prices.offers if offer.accelerator == card and offer.gpus_per_node == gpus]
    kinds = ([offer for offer in same if offer.spot], [offer for offer in same if not offer.spot])
    cheapest = tuple(min(kind, key=lambda item: item.usd_per_hour) for kind in kinds if kind)
    work = replace(work, precision=placed.layout.precision)
    return MachineEstimate(name, work, card, gpus, nodes, placed, cheapest, known.seen.measured_by.get(card))


def work_of_size(num_params: float, tokens_per_param: float) -> tuple[Workload, Software]:
    """A model that only its size describes, trained as the recipes of its size are."""
    shape = model_shape(num_params, tokens_per_param=tokens_per_param)
    return shape, our_trainer(optimizer=USUAL_OPTIMIZER, compiled=True)


# ---------------------------------------------------------------- frontier


def frontier_points(
    prices: Prices,
    *,
    budget_usd: Decimal,
    sizes: tuple[float, float] | None,
    mixtures: bool,
    allow_unguarded: bool = False,
    wishes: dict[str, Any],
) -> tuple[Point, ...]:
    """The loss that the whole budget buys at each size.

    Raises:
        UserError: No size of the range can be trained.
    """
    low, high = sizes or FRONTIER_SIZES
    rungs = ladder(low, high)
    chosen = sorted({*rungs[::RUNGS_PER_POINT], rungs[-1]})
    offers, options, _ = planning.options_without_recipe(prices, **wishes)
    admitted = offers if allow_unguarded else planning.guarded_offers(offers)
    points = frontier(
        planning.offers_wanted(admitted, options), budget_usd=budget_usd, sizes=chosen, mixtures=mixtures, **options
    )
    if not points:
        raise UserError(
            f"${budget_usd} does not pay for a single step of any model between {low:.3g} and {high:.3g} parameters "
            "on these offers; raise --budget or --deadline, or allow more clouds, GPUs or smaller models."
        )
    return points


# ---------------------------------------------------------------- simulation


def finish_chance(planned: Planned) -> Chance | None:
    """How often the best offer trains everything under the cap and the deadline; None for the local cloud."""
    if planned.plan.emulation is not None:
        return None
    plan, best = planned.plan, planning.winner(planned.plan)
    policy = DEFAULT if best.offer.spot else ON_DEMAND
    paid_hours = float(plan.budget_usd / best.usd_per_hour)
    # A plan that is far too dear ends with its money, not with its tokens.
    patience = max(24.0, PATIENCE * min(best.hours, paid_hours))
    limit = plan.deadline_hours if plan.deadline_hours is not None or paid_hours >= best.hours else patience
    runs = max(FEWEST_CHANCE_RUNS, min(CHANCE_RUNS, int(MOST_CHANCE_HOURS / patience)))
    done = simulate(
        best,
        num_tokens=plan.workload.num_tokens,
        hazard=planned.hazards.for_offer(best.offer),
        budget_usd=float(plan.budget_usd),
        deadline_hours=limit,
        runs=runs,
        policies={policy: POLICIES[policy]},
    )
    return Chance(done.policies[policy].finished_share, done.num_runs)


@dataclass(frozen=True, slots=True)
class Simulated:
    """Draws of one plan's best offer, and the market that they were drawn from."""

    estimate: Estimate
    hazard: Hazard
    market: str
    num_zones: int
    simulation: Simulation


def simulate_plan(
    planned: Planned, *, market: str | None, num_zones: int, runs: int, seed: int, deadline_hours: float | None
) -> Simulated:
    """Follow the best offer through `runs` draws of a market.

    Raises:
        UserError: No offer can run the recipe, or the market cannot be read.
    """
    best = planning.winner(planned.plan)
    hazard, traces = simulated_market(market, planned.hazards.for_offer(best.offer), best.num_nodes)
    done = simulate(
        best,
        num_tokens=planned.plan.workload.num_tokens,
        hazard=hazard,
        budget_usd=float(planned.plan.budget_usd),
        deadline_hours=deadline_hours,
        traces=traces,
        num_zones=num_zones,
        runs=runs,
        seed=seed,
    )
    return Simulated(best, hazard, market or "prior", len(traces.zones) if traces else num_zones, done)


def simulated_market(market: str | None, believed: Hazard, num_nodes: int) -> tuple[Hazard, Traces | None]:
    """calm, hazard:PER_HOUR, trace:FILE_OR_FOLDER, or what the plan believed.

    Raises:
        UserError: It is none of these, or the traces cannot be read.
    """
    if market is None:
        return believed, None
    kind, _, argument = market.partition(":")
    if market == "calm":
        return Hazard(0.0, 1.0, "calm"), None
    if kind == "hazard":
        rate = _rate(argument)
        if rate is not None:
            return Hazard(rate * 1e6, 1e6, "as asked"), None
    if kind == "trace" and argument:
        return believed, traces_at(Path(argument).expanduser(), num_nodes)
    raise UserError(
        f"--market {market!r} should be calm, hazard:PER_HOUR, or trace: with an availability trace (.json), or with a "
        "folder of them."
    )


def traces_at(path: Path, num_nodes: int) -> Traces:
    """All traces of a folder, or one zone of it."""
    if path.is_file():
        return read_traces(path.parent, num_nodes=num_nodes).only(path.stem)
    if not path.is_dir():
        raise UserError(f"there is no trace at {path}; give an availability trace (.json) or a folder of them.")
    return read_traces(path, num_nodes=num_nodes)


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 <= rate < float("inf") else None


def cheapest_by_gpu(offers: Sequence[Offer]) -> Mapping[str, tuple[Offer | None, Offer | None]]:
    """For each GPU the offers with the lowest price per GPU-hour: spot, and on-demand."""
    best: dict[tuple[str, bool], Offer] = {}
    for offer in offers:
        key = (offer.accelerator, offer.spot)
        known = best.get(key)
        if known is None or usd_per_gpu_hour(offer) < usd_per_gpu_hour(known):
            best[key] = offer
    names = {offer.accelerator for offer in offers}
    return {name: (best.get((name, True)), best.get((name, False))) for name in names}


def usd_per_gpu_hour(offer: Offer) -> Decimal:
    """Of one GPU of a node."""
    return offer.usd_per_hour / offer.gpus_per_node

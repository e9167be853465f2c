"""Monte Carlo of a plan: dollars, hours, tokens and preemptions over many draws, under several policies.

Each draw takes the hazard from its Gamma distribution, capacity from that hazard (or a random start in real traces)
and the speed from the throughput's interval, so that the spread shows everything that the plan is unsure of.
Invariant: the same seed gives the same draws to every policy, so differences between policies are not luck.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cost.market.preemption import Hazard
from cost.plan.bill import NODE_HOURS
from cost.plan.planner import Estimate
from cost.plan.policy import POLICIES, Outcome, Policy, Terms, Traces, joined, run

MEAN_OUTAGE_HOURS = 1.7
"""Over the nine zones of skypilot-org/spot-traces@221da1a aws-02-15-2023."""
PATIENCE = 4.0
"""Without a deadline a draw is given up after this many times the expected hours (and never before a day)."""
Z_OF_90_PERCENT = 1.645
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Spread:
    """10 %, 50 % and 90 % quantiles."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """Results of one policy over all draws. `wasted_share` is a share of the held hours."""

    usd: Spread
    hours: Spread
    tokens: Spread
    preemptions: Spread
    wasted_share: Spread
    finished_share: float
    """Of the draws, how many trained all tokens within budget and time."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """Distributions by policy, and the dollars of each draw, for a plot."""

    num_runs: int
    seed: int
    policies: Mapping[str, Distribution]
    usd_of_draws: Mapping[str, tuple[float, ...]]


def simulate(
    estimate: Estimate,
    *,
    num_tokens: int,
    hazard: Hazard,
    budget_usd: float,
    deadline_hours: float | None = None,
    traces: Traces | None = None,
    num_zones: int = 1,
    runs: int = 1000,
    seed: int = 0,
    policies: Mapping[str, Policy] = POLICIES,
) -> Simulation:
    """Follow each policy through `runs` draws of the plan's offer.

    `hazard` is per node; `num_zones` equal zones stand for the places where the offer is available at its price. With
    `traces` capacity comes from them instead, each draw from a start of its own. An on-demand offer is never preempted
    by the market, so every policy but on-demand is left out.
    """
    rng = random.Random(seed)
    draws = [
        _draw(estimate, num_tokens, hazard, budget_usd, deadline_hours, traces, num_zones, rng) for _ in range(runs)
    ]
    results = {
        name: [run(policy, draw.traces, draw.terms, start_hour=draw.start) for draw in draws]
        for name, policy in policies.items()
        if _possible(name, estimate)
    }
    rates = [draw.tokens_per_hour for draw in draws]
    return Simulation(
        num_runs=runs,
        seed=seed,
        policies={name: _distribution(outcomes, rates, num_tokens) for name, outcomes in results.items()},
        usd_of_draws={name: tuple(outcome.usd for outcome in outcomes) for name, outcomes in results.items()},
    )


def _possible(name: str, estimate: Estimate) -> bool:
    """An on-demand offer has one policy; policies with on-demand need its price."""
    if not estimate.offer.spot:
        return name == "on_demand"
    return "on_demand" not in name or estimate.offer.on_demand_usd_per_hour is not None


@dataclass(frozen=True, slots=True)
class _Draw:
    traces: Traces
    terms: Terms
    start: float
    tokens_per_hour: float


def _draw(
    estimate: Estimate,
    num_tokens: int,
    hazard: Hazard,
    budget_usd: float,
    deadline_hours: float | None,
    traces: Traces | None,
    num_zones: int,
    rng: random.Random,
) -> _Draw:
    bill = estimate.bill
    low, high = estimate.tokens_per_second_interval
    sigma = (math.log(high) - math.log(low)) / (2 * Z_OF_90_PERCENT)
    factor = math.exp(rng.gauss(0.0, sigma)) if sigma > 0 else 1.0
    work_hours = bill.train_hours / factor * (1 + bill.waste.checkpoints)
    limit = deadline_hours if deadline_hours is not None else max(24.0, PATIENCE * bill.billed_hours / factor)
    rate = rng.gammavariate(hazard.losses, 1 / hazard.node_hours) if hazard.losses > 0 else 0.0
    if traces is None:
        traces = _drawn_traces(rate * estimate.num_nodes, num_zones, limit, rng)
        start = 0.0
    else:
        start = rng.uniform(0.0, traces.hours)
    terms = Terms(
        budget_usd=budget_usd,
        spot_usd_per_hour=float(estimate.usd_per_hour) + _incidental_usd_per_hour(estimate),
        on_demand_usd_per_hour=_on_demand(estimate),
        deadline_hours=limit,
        startup_hours=bill.pace.startup_seconds / 3600,
        lost_hours=(1 - bill.pace.saved_at_notice) * bill.waste.interval_seconds / 2 / 3600,
        work_hours=work_hours,
    )
    return _Draw(traces, terms, start, num_tokens / work_hours)


def _on_demand(estimate: Estimate) -> float | None:
    offer = estimate.offer
    price = offer.on_demand_usd_per_hour if offer.spot else offer.usd_per_hour
    return None if price is None else float(price) * estimate.num_nodes + _incidental_usd_per_hour(estimate)


def _drawn_traces(losses_per_hour: float, num_zones: int, hours: float, rng: random.Random) -> Traces:
    """Zones that are up for exponential times at the hazard and away for exponential outages."""
    zones = tuple(f"zone-{number}" for number in range(1, num_zones + 1))
    changes = {0.0} | {hours}
    lost: dict[str, list[float]] = {}
    for zone in zones:
        lost[zone] = _changes(losses_per_hour, hours, rng)
        changes.update(lost[zone])
    moments = sorted(changes)
    stretches = (
        (end - begin, tuple(zone for zone in zones if bisect.bisect_right(lost[zone], begin) % 2 == 0))
        for begin, end in itertools.pairwise(moments)
    )
    return Traces(zones, hours, joined(stretches))


def _changes(losses_per_hour: float, hours: float, rng: random.Random) -> list[float]:
    """When one zone loses its capacity and gets it back, in turn; it starts with capacity, as the plan found it."""
    moments: list[float] = []
    now = 0.0
    while losses_per_hour > 0:
        now += rng.expovariate(losses_per_hour if len(moments) % 2 == 0 else 1 / MEAN_OUTAGE_HOURS)
        if now >= hours:
            break
        moments.append(now)
    return moments


def _incidental_usd_per_hour(estimate: Estimate) -> float:
    """Incidental costs (disks, run store, egress), spread over the hours."""
    rest = float(sum(line.usd for line in estimate.lines if line.name not in NODE_HOURS))
    return rest / estimate.bill.billed_hours


def _distribution(outcomes: Sequence[Outcome], tokens_per_hour: Sequence[float], num_tokens: int) -> Distribution:
    tokens = [
        min(float(num_tokens), outcome.useful_hours * rate)
        for outcome, rate in zip(outcomes, tokens_per_hour, strict=True)
    ]
    return Distribution(
        usd=_spread(outcomes, lambda outcome: outcome.usd),
        hours=_spread(outcomes, lambda outcome: outcome.hours),
        tokens=_spread(tokens, lambda token: token),
        preemptions=_spread(outcomes, lambda outcome: outcome.preemptions),
        wasted_share=_spread(
            outcomes, lambda outcome: 1 - outcome.useful_hours / outcome.held_hours if outcome.held_hours > 0 else 0.0
        ),
        finished_share=sum(outcome.finished for outcome in outcomes) / len(outcomes),
    )


T = TypeVar("T")


def _spread(items: Sequence[T], value: Callable[[T], float]) -> Spread:
    ordered = sorted(value(item) for item in items)
    return Spread(*(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in QUANTILES))

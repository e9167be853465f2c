"""How much of its cap a run uses when nothing goes wrong, beside the most that the rules allow.

The most: with a limit that can be moved, everything but what a stop must be able to cost at the worst price, less what
it does cost. With a fixed one, leases follow each other, each prepaid at the worst price; the last one begins when just
the smallest is affordable, and what it held above its true price stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

from cost.market.providers import PriceBound, Provider, provider
from faults.machine import TERMS
from faults.schedule import Result, run_schedule

RATIOS = (1.0, 0.4, 0.1)
"""Price over its bound."""
HOURS = (30.0, 50.0)
"""Of the whole cluster at its price, that the cap pays for: $100 buys more of most offers."""


@dataclass(frozen=True, slots=True)
class Case:
    ttl: str
    price_ratio: float
    profile: Provider


def cases() -> list[Case]:
    """Each ratio with a limit that can be moved and with a fixed one."""
    movable = provider("gcp")
    fixed = replace(provider("kubernetes"), price_bound=PriceBound.ON_DEMAND)
    return [Case(item.ttl.value, ratio, item) for item in (movable, fixed) for ratio in RATIOS]


def play(case: Case, seed: int) -> Result:
    return run_schedule(seed, faults=(), profile=case.profile, price_ratio=case.price_ratio, hours=HOURS)


def optimum(case: Case, result: Result) -> float:
    """The largest use of the cap that the rules allow, as a share."""
    price, worst = result.usd_per_hour, result.usd_per_hour / case.price_ratio
    if case.ttl == "renewable":
        left_usd = (worst * (TERMS.drain_seconds + TERMS.kill_latency_seconds) - price * TERMS.drain_seconds) / 3600
    else:
        left_usd = float((Decimal(worst) - Decimal(price)) * TERMS.smallest_hours(1.0))
    return 1.0 - left_usd / result.num_nodes / result.cap_usd  # the last lease may be of one node


def row(case: Case, results: list[Result]) -> dict[str, float | str]:
    """Shares of the cap, averaged; `start_ups` is part of what is used."""
    number = len(results)
    use = sum(result.bill_usd / result.cap_usd for result in results) / number
    best = sum(optimum(case, result) for result in results) / number
    return {
        "ttl": case.ttl,
        "price_over_bound": case.price_ratio,
        "use": round(use, 4),
        "start_ups": round(sum(result.startup_usd / result.cap_usd for result in results) / number, 4),
        "optimum": round(best, 4),
        "of_optimum": round(use / best, 4),
        "leases": round(sum(result.leases for result in results) / number, 1),
    }

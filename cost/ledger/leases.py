"""The right to spend: one lease is one cluster in one zone, n nodes, prepaid up to a moment.

A lease is written to the ledger before anything is rented. Money is counted in whole micro-dollars and time in whole
milliseconds of billed time, so that sums are exact; debits round up and credits down.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from cost.market.offers import Offer

LEASE_PREFIX = "slm-"
"""What the name of everything that we rent begins with."""
MICRO = 1_000_000
MILLISECONDS_PER_HOUR = 3_600_000
FIRST_STAGE = "pretrain"
"""What every lease worked for before runs had stages."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a backend is asked to rent. `lease_id` is also the name of the cluster at the provider."""

    lease_id: str
    run_id: str
    attempt: int
    """1 for the first cluster of a run, then counting up."""
    offer: Offer
    num_nodes: int
    worst_usd_per_hour: Decimal
    """The worst-case price of one node per hour while the lease lasts (p̂)."""
    first_grant_seconds: float
    """Real seconds from boot after which an unrenewed node ends itself."""
    kill_latency_seconds: float
    """The kill latency: real seconds that the slowest working terminator needs (κ)."""
    fencing_token: int
    """Fencing number of the supervisor that wrote it."""
    minimum_billed_seconds: float = 0.0
    """Billed seconds that the provider charges for each node at least."""
    ttl_seconds: float = 0.0
    """Real seconds from its start after which the provider ends a node, where that cannot be moved; 0 where it can."""
    stage: str = FIRST_STAGE
    """Name of the stage of the run that it works for."""


def lease_id_for(owner: str, run_id: str, attempt: int) -> str:
    """The name of a lease, which says whose it is; `owner` holds no dash."""
    return f"{LEASE_PREFIX}{owner}-{run_id}-{attempt}"


def run_id_from_lease_id(name: str) -> str:
    """The run's id inside the name of a lease; empty for a name that is not a lease's."""
    return "-".join(name.split("-")[2:-1])


def micro_usd(usd: Decimal) -> int:
    """Dollars to micro-dollars, rounded up: for debits and prices."""
    return int((usd * MICRO).to_integral_value(rounding=ROUND_CEILING))


def usd(micro: int) -> Decimal:
    """Micro-dollars to dollars, exactly."""
    return Decimal(micro) / MICRO


def cost_units(micro_usd_per_hour: int, num_nodes: int, milliseconds: int) -> int:
    """Exact cost in micro-dollar-milliseconds per hour; `units_to_micro_usd` turns sums of it into money."""
    return micro_usd_per_hour * num_nodes * max(0, milliseconds)


def units_to_micro_usd(units: int) -> int:
    """Round a sum of `cost_units` up to whole micro-dollars, once."""
    return -(-units // MILLISECONDS_PER_HOUR)

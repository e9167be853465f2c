"""How leases are paid on one provider: how far ahead, how long its terminators and lists take, its price bound.

Real seconds, but for what says that it is billed time. `cost.market.providers` holds the facts of each cloud with their
sources; here they become terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from cost.errors import SlmError
from cost.market.offers import Offer
from cost.market.providers import PriceBound, Provider, Ttl

HANGS_PER_NODE_HOUR = 1e-3
"""How often a guest hangs so that only the provider's limit ends its node; assumed. It sets a fixed limit's length."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The defaults are those of the local market."""

    term_seconds: float = 30.0
    """How far ahead a renewal pays, and how long a node lives without hearing from us."""
    boot_allowance_seconds: float = 10.0
    """Longest time from asking for a node to its boot, from which its first grant counts."""
    startup_seconds: float = 25.0
    """From boot to the first step, as assumed when the smallest useful lease is computed."""
    kill_latency_seconds: float = 5.0
    """kappa: how long the slowest terminator assumed sound takes."""
    drain_seconds: float = 12.0
    """Longest time from asking for a checkpoint and a stop to the end of the node's command."""
    stop_grace_seconds: float = 45.0
    """How long a stop that somebody asked for may take before nodes are ended anyway."""
    stall_seconds: float = 240.0
    """Without a new step for so long, the cluster counts as broken."""
    grow_delay_seconds: float = 4.0
    """First wait before a lost node is rented again; doubles with every refusal."""
    confirm_seconds: float = 0.0
    """How long the provider's lists may lie or lag: only what is absent for so long counts as gone."""
    create_seconds: float = 0.0
    """How long after it was asked for a node may still come into being when nobody heard the reply."""
    call_seconds: float = 2.0
    """Longest time between paying for a node and asking for it."""
    price_gap_seconds: float = 120.0
    """Between two looks at a price no further apart, it was at most the higher of both; else it is unconfirmed."""
    reconcile_seconds: float = 300.0
    """How often everything that carries our name is compared with the ledger."""
    poll_seconds: float = 1.0
    accrue_seconds: float = 5.0
    """How often elapsed time becomes an entry of the ledger; what is not yet accrued stays set aside at p-hat."""
    renew_below: float = 0.7
    """Renew when less than this share of a term is left."""
    store_patience_seconds: float = 20.0
    """How long a run store that cannot be reached is waited for at $0 before the run is given up."""
    ttl: Ttl = Ttl.RENEWABLE
    fixed_ttl_seconds: float = 12 * 3600.0
    """The longest limit that is set where it cannot be moved."""
    price_bound: PriceBound = PriceBound.FIXED
    minimum_billed_seconds: float = 0.0
    """Billed seconds of each node at least."""
    balance_usd: Decimal | None = None
    """What lies on the prepaid account that alone ends a hung node; what is left of it is set aside at each rent."""

    @property
    def smallest_seconds(self) -> float:
        """The shortest lease that can do anything: boot, start, save and stop, and be killed."""
        busy = self.startup_seconds + self.drain_seconds + self.kill_latency_seconds
        return self.call_seconds + self.boot_allowance_seconds + busy

    def smallest_hours(self, scale: float) -> Decimal:
        """Billed hours that the shortest useful lease sets aside for each node; `scale`: billed per real time."""
        return Decimal(max(self.smallest_seconds * scale, self.minimum_billed_seconds)) / 3600

    def first_seconds(self, grant_or_ttl_seconds: float) -> float:
        """From paying for a node to the end of what counts from its boot."""
        return self.call_seconds + self.boot_allowance_seconds + grant_or_ttl_seconds


TermsOf = Callable[[Offer], Terms]


def same_terms(terms: Terms) -> TermsOf:
    """One provider for all offers."""
    return lambda _: terms


def terms_on(
    provider: Provider, *, startup_seconds: float, drain_seconds: float, balance_usd: Decimal | None = None
) -> Terms:
    """Terms on a cloud, from its profile and how long our own start and stop take there."""
    overhead = provider.boot_seconds + startup_seconds
    return Terms(
        term_seconds=900.0,
        boot_allowance_seconds=provider.boot_seconds,
        startup_seconds=startup_seconds,
        kill_latency_seconds=provider.kill_latency_seconds,
        drain_seconds=drain_seconds,
        stop_grace_seconds=2 * drain_seconds,
        stall_seconds=1800.0,
        grow_delay_seconds=60.0,
        confirm_seconds=provider.confirm_seconds,
        create_seconds=provider.create_seconds,
        call_seconds=30.0,
        price_gap_seconds=300.0,
        poll_seconds=10.0,
        accrue_seconds=60.0,
        store_patience_seconds=1800.0,
        ttl=provider.ttl,
        fixed_ttl_seconds=best_ttl_seconds(overhead),
        price_bound=provider.price_bound,
        minimum_billed_seconds=provider.minimum_billed_seconds,
        balance_usd=balance_usd,
    )


def best_ttl_seconds(overhead_seconds: float) -> float:
    """The length of a fixed limit with the least waste, where each start costs `overhead_seconds`.

    A longer one starts less often (s / L of the time), and leaves more to a hung guest (rate x L / 2).
    """
    return math.sqrt(2 * overhead_seconds * 3600 / HANGS_PER_NODE_HOUR)


def needed_usd(offer: Offer, terms: Terms, *, num_nodes: int, scale: float = 1.0) -> Decimal:
    """What the smallest useful lease of this offer sets aside."""
    return worst_price(offer, terms.price_bound) * num_nodes * terms.smallest_hours(scale)


def worst_price(offer: Offer, bound: PriceBound) -> Decimal:
    """p-hat of one node: its price where the provider fixes it at rent, else the on-demand price.

    Raises:
        SlmError: Nothing bounds the future price of this offer.
    """
    if bound is PriceBound.FIXED or not offer.spot:
        return offer.usd_per_hour
    if bound is PriceBound.UNKNOWN or offer.on_demand_usd_per_hour is None:
        raise SlmError(f"nothing bounds the future price of {offer.offer_id}; it was not rented. Pick another offer.")
    return max(offer.usd_per_hour, offer.on_demand_usd_per_hour)

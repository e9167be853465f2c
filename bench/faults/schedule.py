"""One schedule: a run that would use its whole cap, some faults, and its result."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache

from cost.ledger.ledger import Ledger
from cost.market.offers import Offer, load_reference_offers
from cost.market.providers import Armed, PriceBound, Provider, TerminatorKind, providers, refusal
from faults.cloud import FakeCloud
from faults.kinds import BROKEN, HELD, NEVER_TOGETHER
from faults.machine import DOLLAR_TOLERANCE, TERMS, Machine, rng_of
from faults.storage import MemoryStore
from faults.world import World
from orchestrator.supervisor.lease_policy import Terms

MAX_FAULTS = 5
CAP_NODE_HOURS = (3.5, 5.5)
"""The cap, in hours of the whole cluster at the first offer's price."""
AFTERWARDS_SECONDS = 20_000.0
RECONCILED_SECONDS = TERMS.reconcile_seconds + 60.0
"""Within this a stray is found and ended, where nothing else is wrong."""
BALANCE_SHARE = (0.3, 0.9)
"""What lies on a prepaid account, of the cap."""
PROFILES: tuple[Provider, ...] = tuple(
    provider for name, provider in sorted(providers().items()) if refusal(provider, allow_unguarded=False) is None
)
"""Every cloud that may be rented from, each equally often."""
LONGEST_MINIMUM_SECONDS = 600.0


def terms_of(provider: Provider, *, balance_usd: Decimal | None) -> Terms:
    """What the profile says of limit, price and billing; how long things take is the simulation's own, and shorter."""
    return replace(
        TERMS,
        ttl=provider.ttl,
        price_bound=provider.price_bound,
        minimum_billed_seconds=min(provider.minimum_billed_seconds, LONGEST_MINIMUM_SECONDS),
        balance_usd=balance_usd if provider.balance_only else None,
    )


@dataclass(frozen=True, slots=True)
class Result:
    """What one schedule showed, in dollars."""

    seed: int
    faults: tuple[str, ...]
    profile: str
    cap_usd: float
    bill_usd: float
    shortfall_usd: float
    excess_usd: float
    """Billed above p-hat: what a broken price assumption explains."""
    kept_usd: float
    left_usd: float
    held_usd: float
    checks: int
    unfenced_writes: int
    end: str
    """How the last supervisor ended."""
    startup_usd: float
    """Paid before a node's first step."""
    usd_per_hour: float
    """Of the whole cluster, at the first offer's price."""
    num_nodes: int
    leases: int

    @property
    def violation(self) -> bool:
        return self.bill_usd > self.cap_usd + self.excess_usd + DOLLAR_TOLERANCE

    @property
    def ledger_short(self) -> bool:
        """At some moment more was billed than was spent and set aside, beyond what a broken assumption explains.

        Or somebody raised what may be spent after another supervisor had taken over.
        """
        return self.shortfall_usd > self.excess_usd + DOLLAR_TOLERANCE or self.unfenced_writes > 0

    @property
    def broken(self) -> bool:
        return any(name in BROKEN for name in self.faults)


@cache
def spot_offers() -> tuple[Offer, ...]:
    """Spot offers of the reference table whose on-demand price is known."""
    return tuple(
        offer
        for offer in load_reference_offers().offers
        if offer.spot and offer.on_demand_usd_per_hour is not None and offer.on_demand_usd_per_hour > offer.usd_per_hour
    )


def choose_faults(rng: random.Random, allowed: Sequence[str]) -> tuple[str, ...]:
    """One to MAX_FAULTS distinct kinds that may happen together."""
    chosen = rng.sample(list(allowed), min(len(allowed), rng.randint(1, MAX_FAULTS)))
    while any(pair <= set(chosen) for pair in NEVER_TOGETHER):
        chosen.pop()
    return tuple(chosen)


def build(
    seed: int,
    *,
    profile: Provider,
    price_ratio: float | None,
    hours: tuple[float, float],
    log: Callable[[str], None] | None,
    break_layer: Callable[[Machine], None],
) -> Machine:
    rng = rng_of(seed)
    offers = rng.sample(spot_offers(), 3)
    if price_ratio is not None:
        offers = [
            replace(
                offer, on_demand_usd_per_hour=(offer.usd_per_hour / Decimal(str(price_ratio))).quantize(Decimal("1e-6"))
            )
            for offer in offers
        ]
    num_nodes = rng.randint(1, 3)
    world, store = World(rng), MemoryStore()
    cap = float(offers[0].usd_per_hour) * num_nodes * rng.uniform(*hours)
    if profile.price_bound is PriceBound.ON_DEMAND:  # enough for a useful lease at p-hat
        cap = max(cap, 0.5 * num_nodes * float(offers[0].on_demand_usd_per_hour or 0))
    cloud = FakeCloud(
        world,
        store,
        terms=terms_of(profile, balance_usd=Decimal(f"{cap * rng.uniform(*BALANCE_SHARE):.6f}")),
        armed_at_create=any(
            terminator.kind is TerminatorKind.PROVIDER and terminator.armed is Armed.AT_CREATE
            for terminator in profile.terminators
        ),
        prices={offer.offer_id: [(0.0, float(offer.usd_per_hour))] for offer in offers},
    )
    machine = Machine(world, cloud, store, offers, num_nodes, cap, log=log)
    break_layer(machine)
    return machine


def nothing(machine: Machine) -> None:
    """All layers stand."""


def run_schedule(
    seed: int,
    *,
    faults: Sequence[str] | None = None,
    profile: Provider | None = None,
    price_ratio: float | None = None,
    hours: tuple[float, float] = CAP_NODE_HOURS,
    log: Callable[[str], None] | None = None,
    break_layer: Callable[[Machine], None] = nothing,
) -> Result:
    """Play it to its end; `faults` names exactly the kinds to install, none: the default mix.

    `hours`: between which the cap lies, in hours of the whole cluster at the first offer's price.
    """
    chosen_profile = PROFILES[seed % len(PROFILES)] if profile is None else profile
    machine = build(
        seed, profile=chosen_profile, price_ratio=price_ratio, hours=hours, log=log, break_layer=break_layer
    )
    rng = machine.world.rng
    chosen = choose_faults(rng, tuple(HELD) + tuple(BROKEN)) if faults is None else tuple(faults)
    length = 3600 * machine.cap_usd / float(machine.num_nodes * machine.offers[0].usd_per_hour)
    for name in chosen:
        t = rng.uniform(0.0, length)
        machine.tell(f"fault {name} at {t:.0f} s of {length:.0f} s")
        (HELD | BROKEN)[name](machine, t)
    alone = chosen == ("create late",)
    machine.cloud.stray_seconds = RECONCILED_SECONDS if alone else TERMS.smallest_seconds + TERMS.term_seconds
    machine.live()
    machine.world.advance(AFTERWARDS_SECONDS)
    machine.check()
    balance = Ledger(machine.db, machine.run.run_id, fencing_token=0).balance()
    return Result(
        seed=seed,
        faults=chosen,
        profile=chosen_profile.name,
        cap_usd=machine.cap_usd,
        bill_usd=machine.cloud.true_bill_usd(),
        shortfall_usd=machine.shortfall_usd,
        excess_usd=machine.cloud.excess_usd(),
        kept_usd=sum(node.kept_usd for node in machine.cloud.nodes),
        left_usd=float(balance.free_usd),
        held_usd=float(balance.held_usd),
        checks=machine.checks,
        unfenced_writes=machine.unfenced_writes(),
        end=machine.end,
        usd_per_hour=float(machine.num_nodes * machine.offers[0].usd_per_hour),
        num_nodes=machine.num_nodes,
        leases=len({node.lease.lease_id for node in machine.cloud.nodes}),
        startup_usd=sum(node.startup_usd for node in machine.cloud.nodes if node.rank == 0),
    )

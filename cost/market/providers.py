"""What each provider can be relied on for when nobody is there to stop it: terminators, time limit and billing.

A terminator is one means of ending a node without our supervisor. There is one row for each cloud that SkyPilot 0.14.1
serves, and one for the local cloud: cost/data/providers.csv and cost/data/terminators.csv, each value with its source;
a value without a source says that it is assumed. A cloud without a row gets the row '*', which has no terminator at
the provider. Each terminator in the table can be armed through SkyPilot or with the provider's own interface; whoever
rents arms it. Notice and minimum billing are in cost/data/clouds.csv and are read from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from functools import cache
from types import MappingProxyType

from cost.market.clouds import ANY, cloud_terms
from cost.tables import table_rows

FEWEST_KINDS = 2
"""How many kinds of terminators a node must have, one of which works while the guest hangs."""
FIX = "--allow-unguarded permits it"
"""How every refusal ends."""


class TerminatorKind(StrEnum):
    """What ends the node."""

    GUEST = "guest"
    """Our guard, from inside, by any means."""
    KERNEL = "kernel"
    """A power-off that the guest's init or kernel has scheduled, or what watches the guard in its place."""
    PROVIDER = "provider"
    BALANCE = "balance"
    """The provider, because prepaid money is gone."""
    SKY = "sky"
    """SkyPilot's daemon on the head node: a reboot disarms it, so it is not counted."""


class Armed(StrEnum):
    """AFTER_CREATE leaves a window in which the node runs unguarded."""

    AT_CREATE = "at_create"
    AFTER_CREATE = "after_create"


class Ttl(StrEnum):
    """The provider's own time limit of a node."""

    RENEWABLE = "renewable"
    FIXED = "fixed"
    NONE = "none"


class PriceBound(StrEnum):
    """What bounds the future price of a node: what it was rented at, its on-demand price, or nothing known."""

    FIXED = "fixed"
    ON_DEMAND = "on_demand"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Terminator:
    """One means of ending a node without us. `latency_seconds` counts from when it fires until billing ends."""

    name: str
    kind: TerminatorKind
    armed: Armed
    latency_seconds: float
    survives_hung_guest: bool
    source: str


@dataclass(frozen=True, slots=True)
class Provider:
    """The profile of one cloud; real seconds."""

    name: str
    terminators: tuple[Terminator, ...]
    ttl: Ttl
    price_bound: PriceBound
    minimum_billed_seconds: float
    billing_granularity_seconds: float
    guest_shutdown_stops_billing: bool
    notice_seconds: float
    """Before a preemption; 0 for none."""
    arm_seconds: float
    """Longest time from the create to the provider's limit being armed; 0 when armed at the create."""
    create_seconds: float
    """How long after the call a node may still appear."""
    confirm_seconds: float
    """How long the provider's lists may be wrong."""
    boot_seconds: float
    """Longest time from the create to the start of the guard."""
    labels: bool
    """Whether instances carry the labels that we ask SkyPilot for."""
    name_limit: int | None
    """The longest cluster name that survives whole; None where no limit is known."""
    ttl_source: str
    price_source: str
    billing_source: str
    times_source: str
    name_source: str

    @property
    def sound_terminators(self) -> tuple[Terminator, ...]:
        """Those that a reservation relies on: they work while the guest hangs; the guard and kernel if none does."""
        sound = tuple(terminator for terminator in self.terminators if terminator.survives_hung_guest)
        on_the_node = (TerminatorKind.GUEST, TerminatorKind.KERNEL)
        return sound or tuple(terminator for terminator in self.terminators if terminator.kind in on_the_node)

    @property
    def kill_latency_seconds(self) -> float:
        """The kill latency (κ): how long the slowest sound terminator takes."""
        return max(terminator.latency_seconds for terminator in self.sound_terminators)

    @property
    def balance_only(self) -> bool:
        """Only an empty prepaid account ends a node whose guest hangs, so the whole balance has to be set aside."""
        return all(terminator.kind is TerminatorKind.BALANCE for terminator in self.sound_terminators)


def provider(name: str) -> Provider:
    """The profile of a cloud, or under its name the profile of any other."""
    return _table().get(name) or replace(_table()[ANY], name=name)


def providers() -> Mapping[str, Provider]:
    """All profiles by cloud, without the one for any other."""
    return MappingProxyType({name: provider for name, provider in _table().items() if name != ANY})


def refusal(provider: Provider, *, allow_unguarded: bool) -> str | None:
    """Why nothing may be rented from this cloud; None where it may."""
    if allow_unguarded:
        return None
    kinds = {terminator.kind for terminator in provider.terminators} - {TerminatorKind.SKY}
    has = ", ".join(f"{terminator.name} ({terminator.kind})" for terminator in provider.terminators)
    if not any(terminator.survives_hung_guest for terminator in provider.terminators):
        return f"{provider.name}: nothing ends a node whose guest hangs; it has {has}; {FIX}"
    if len(kinds) < FEWEST_KINDS:
        return f"{provider.name}: fewer than {FEWEST_KINDS} kinds of terminators; it has {has}; {FIX}"
    return None


def balance_refusal(provider: Provider, *, balance_usd: Decimal | None, free_usd: Decimal) -> str | None:
    """Why a cloud may not be rented from where only an empty account ends a hung node; None where it may.

    `balance_usd`: the balance of the prepaid account, None if unknown; all of it counts against `free_usd`.
    """
    if not provider.balance_only:
        return None
    if balance_usd is None:
        return (
            f"{provider.name}: only an empty prepaid account ends a node whose guest hangs, and its balance is "
            f"unknown; keep at most ${free_usd:.2f} there, with automatic payment off"
        )
    if balance_usd > free_usd:
        return (
            f"{provider.name}: ${balance_usd:.2f} lies on the prepaid account, which "
            "a hung node would use up, and only "
            f"${free_usd:.2f} of the cap is free; leave less on the account, or raise the cap with --budget"
        )
    return None


@cache
def _table() -> Mapping[str, Provider]:
    terminators: dict[str, list[Terminator]] = {}
    for row in table_rows("terminators.csv"):
        terminators.setdefault(row["cloud"], []).append(_terminator(row))
    return MappingProxyType(
        {row["cloud"]: _provider(row, terminators[row["cloud"]]) for row in table_rows("providers.csv")}
    )


def _terminator(row: Mapping[str, str]) -> Terminator:
    return Terminator(
        name=row["name"],
        kind=TerminatorKind(row["kind"]),
        armed=Armed(row["armed"]),
        latency_seconds=float(row["latency_seconds"]),
        survives_hung_guest=_yes(row["survives_hung_guest"]),
        source=row["source"],
    )


def _provider(row: Mapping[str, str], terminators: list[Terminator]) -> Provider:
    terms = cloud_terms(row["cloud"])
    return Provider(
        name=row["cloud"],
        terminators=tuple(terminators),
        ttl=Ttl(row["ttl"]),
        price_bound=PriceBound(row["price_bound"]),
        minimum_billed_seconds=terms.minimum_billed_seconds,
        billing_granularity_seconds=float(row["billing_granularity_seconds"]),
        guest_shutdown_stops_billing=_yes(row["guest_shutdown_stops_billing"]),
        notice_seconds=terms.notice_seconds,
        arm_seconds=float(row["arm_seconds"]),
        create_seconds=float(row["create_seconds"]),
        confirm_seconds=float(row["confirm_seconds"]),
        boot_seconds=float(row["boot_seconds"]),
        labels=_yes(row["labels"]),
        name_limit=int(row["name_limit"]) if row["name_limit"] else None,
        ttl_source=row["ttl_source"],
        price_source=row["price_source"],
        billing_source=row["billing_source"],
        times_source=row["times_source"],
        name_source=row["name_source"],
    )


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]

"""How often spot nodes are preempted, how often to checkpoint, and which share of the bill that wastes.

Hazards are Gamma distributions over losses per node-hour: a prior by cloud and accelerator, updated by what our
own runs saw. Invariant: rates are per node and billed hour; a cluster of n nodes loses one at n times that rate,
and any loss stops all of it.
Sources: Young 1974 (doi:10.1145/361147.361115) and Daly 2006 (doi:10.1016/j.future.2004.11.016) for the interval;
cost/data/hazards.csv for the rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from cost.market.offers import Offer
from cost.tables import table_rows

SECONDS_PER_HOUR = 3600.0
FAILURES_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
"""Hardware failures, without preemptions: 419 in 54 days on 16,384 H100 (arXiv:2407.21783, section 3.3.4)."""
SAVE_AT_NOTICE_SUCCESS = 0.9
"""Assumed chance that a save which fits into the notice succeeds: AWS calls its own notice best effort."""
NOTICE_POLL_SECONDS = 5.0
"""Until a node's guard sees the notice (IMDSv2 is polled this often)."""
LARGEST_WASTE_SHARE = 0.9
"""A cluster that loses a larger share of its time than this makes no progress."""


@dataclass(frozen=True, slots=True)
class Hazard:
    """Gamma distribution of losses per node-hour: as if `losses` had been seen in `node_hours`."""

    losses: float
    node_hours: float
    source: str

    @property
    def per_node_hour(self) -> float:
        """Mean rate."""
        return self.losses / self.node_hours

    @property
    def standard_deviation(self) -> float:
        """How unsure the rate is."""
        return math.sqrt(self.losses) / self.node_hours

    def updated(self, losses: int, node_hours: float) -> Hazard:
        """The posterior after seeing `losses` in `node_hours`: Gamma is conjugate to Poisson counts."""
        if not losses and not node_hours:
            return self
        seen = f"our own runs: {losses} in {node_hours:.1f} node-hours"
        return Hazard(self.losses + losses, self.node_hours + node_hours, f"{seen}; before: {self.source}")


@dataclass(frozen=True, slots=True)
class Sighting:
    """What our own runs saw of one kind of node."""

    cloud: str
    accelerator: str
    gpus_per_node: int
    losses: int
    node_hours: float


@cache
def _priors() -> Mapping[tuple[str, str, str], Hazard]:
    return MappingProxyType(
        {
            (row["cloud"], row["accelerator"], row["gpus_per_node"]): Hazard(
                float(row["losses"]), float(row["node_hours"]), row["source"]
            )
            for row in table_rows("hazards.csv")
        }
    )


@dataclass(frozen=True)
class Hazards:
    """Rates for every offer: priors, or one fixed rate for all spot offers, plus sightings."""

    sightings: tuple[Sighting, ...] = ()
    fixed_per_node_hour: float | None = None
    """Replaces the priors of spot offers, for a simulated market."""
    _seen: dict[tuple[str, str, int], tuple[int, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for sighting in self.sightings:
            key = (sighting.cloud, sighting.accelerator, sighting.gpus_per_node)
            losses, hours = self._seen.get(key, (0, 0.0))
            self._seen[key] = (losses + sighting.losses, hours + sighting.node_hours)

    def for_offer(self, offer: Offer) -> Hazard:
        """Losses per node-hour of this offer; on-demand nodes only fail."""
        if not offer.spot:
            return failures(offer.gpus_per_node)
        if self.fixed_per_node_hour is not None:
            return Hazard(self.fixed_per_node_hour * 1e6, 1e6, "the market given with --market")
        key = (offer.cloud, offer.accelerator, offer.gpus_per_node)
        return prior(*key).updated(*self._seen.get(key, (0, 0.0)))


@cache
def failures(gpus_per_node: int) -> Hazard:
    """Failures of a node that is not preempted."""
    rate = FAILURES_PER_GPU_HOUR * gpus_per_node
    return Hazard(rate * 1e6, 1e6, "hardware failures per GPU-hour, arXiv:2407.21783, section 3.3.4")


@cache
def prior(cloud: str, accelerator: str, gpus_per_node: int) -> Hazard:
    """The most specific published rate."""
    table = _priors()
    exact = table.get((cloud, accelerator, str(gpus_per_node)))
    if exact is not None:
        return exact
    same_card = [hazard for key, hazard in table.items() if key[:2] == (cloud, accelerator)]
    return same_card[0] if same_card else table["*", "*", "*"]


@dataclass(frozen=True, slots=True)
class Waste:
    """Hours lost per hour that trains new steps, by cause, at the chosen checkpoint interval."""

    interval_seconds: float
    checkpoints: float
    lost_work: float
    recoveries: float
    losses: float
    """Losses (a count) per hour that trains new steps."""

    @property
    def total(self) -> float:
        """Hours wasted per useful hour."""
        return self.checkpoints + self.lost_work + self.recoveries

    @property
    def share(self) -> float:
        """Of billed time after the first start-up."""
        return self.total / (1 + self.total)


def save_at_notice(notice_seconds: float, save_seconds: float) -> float:
    """Chance h that the work since the last checkpoint is saved within the notice."""
    return SAVE_AT_NOTICE_SUCCESS if notice_seconds >= save_seconds + NOTICE_POLL_SECONDS else 0.0


def checkpoint_interval_seconds(
    stall_seconds: float,
    losses_per_hour: float,
    saved_at_notice: float,
    shortest_seconds: float,
    *,
    restart_seconds: float = 0.0,
) -> float:
    """Young and Daly's interval tau = sqrt(2 C (1 / (lambda (1 - h)) + R)), never shorter than a save takes.

    `restart_seconds` is Daly's R (equation 13): a cluster that restarts cannot be lost. It matters where losses come
    every few restarts.
    """
    rate = losses_per_hour / SECONDS_PER_HOUR * (1 - saved_at_notice)
    if rate <= 0:
        return math.inf
    return max(shortest_seconds, math.sqrt(2 * stall_seconds * (1 / rate + restart_seconds)))


def expected_waste(
    *,
    interval_seconds: float,
    stall_seconds: float,
    losses_per_hour: float,
    saved_at_notice: float,
    recovery_seconds: float,
) -> Waste:
    """C/tau + lambda [(1 - h) tau / 2 + detection + re-provisioning + load] per useful hour (Daly 2006, first order).

    A cluster that is gone cannot be lost, so losses count while it is up and the sum stays finite.
    """
    rate = losses_per_hour / SECONDS_PER_HOUR
    checkpoints = stall_seconds / interval_seconds
    lost_work = rate * (1 - saved_at_notice) * interval_seconds / 2 * (1 + checkpoints) if rate else 0.0
    up = 1 + checkpoints + lost_work
    return Waste(
        interval_seconds=interval_seconds,
        checkpoints=checkpoints,
        lost_work=lost_work,
        recoveries=rate * up * recovery_seconds,
        losses=losses_per_hour * up,
    )

"""The expected bill of a run on one offer, line by line, and its worst case.

Invariant: the total is the exact decimal sum of the lines; each line is rounded up to a micro-dollar. Hours are
billed hours. Start-up, recovery after a preemption, checkpoints, disks, the run store and downloads are charged.
Sources of rates: cost/data/clouds.csv; of waste: `cost.market.preemption`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from cost.market.clouds import Cloud
from cost.market.offers import Offer
from cost.market.preemption import (
    LARGEST_WASTE_SHARE,
    SECONDS_PER_HOUR,
    Hazard,
    Waste,
    checkpoint_interval_seconds,
    expected_waste,
    save_at_notice,
)

HOURS_PER_MONTH = 730.0
BYTES_PER_GB = 1e9
MICRO = 1_000_000
LINES = (
    "compute",
    "start-up",
    "checkpoints",
    "preemptions",
    "minimum billing",
    "disks",
    "run store",
    "egress",
    "final download",
)
NODE_HOURS = frozenset({"compute", "start-up", "checkpoints", "preemptions", "minimum billing"})
"""Lines that are node-hours at the cluster's price."""
PAID_ONCE = frozenset({"start-up", "minimum billing", "final download"})
"""Lines that do not grow with the number of tokens."""

CHECKPOINT_BYTES_PER_PARAM = 12.0
"""fp32 weights and two fp32 moments of AdamW; Muon keeps one moment less."""
EXPORT_BYTES_PER_PARAM = 4.0
"""fp32 weights, downloaded once at the end."""
KEPT_CHECKPOINTS = 3
COPY_BYTES_PER_SECOND = 10e9
"""From a device into a pinned buffer, per device: half of a PCIe Gen4 link; assumed."""
STALL_FLOOR_SECONDS = 0.2
"""Stopping the step, whatever the size; assumed."""
STORE_BYTES_PER_SECOND = 200e6
"""From one node to the run store; assumed from S3's usual rate of one multi-part upload."""
DETECTION_SECONDS = 30.0
"""Until the supervisor sees that a cluster is gone; its polls are a few seconds apart, providers lag."""
WARM_UP_SECONDS = 90.0
"""Imports, Ray, process group and first steps on a node that is up; assumed until a run has measured it."""
DISK_GB_PER_NODE = 100.0
UNKNOWN_CEILING = Decimal(4)
"""Times the spot price, where no on-demand price bounds it; above the largest known ratio of the two."""
CLOUDS_WITH_A_STORE_INSIDE = frozenset({"aws", "gcp", "azure"})
"""Checkpoints go to object storage in the same region, without egress; elsewhere each one leaves the cloud."""
UNLUCKY_DEVIATIONS = 2.0
"""Worst case: this many standard deviations more preemptions than expected."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the bill."""

    name: str
    usd: Decimal


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How starting, saving and recovering take their time on one cluster, in billed seconds."""

    startup_seconds: float
    recovery_seconds: float
    """From a loss to the next new step: detection, another node, loading."""
    stall_seconds: float
    shortest_interval_seconds: float
    saved_at_notice: float


@dataclass(frozen=True, slots=True)
class Bill:
    """Expected dollars of one run."""

    micro_usd: tuple[int, ...]
    """Of each line, in the order of `LINES`; each rounded up."""
    train_hours: float
    """Billed hours that train new steps."""
    billed_hours: float
    """All billed hours of the cluster, from the first start-up on."""
    worst_hours: float
    """Billed hours with unluckily many preemptions."""
    waste: Waste
    pace: Rhythm
    losses_per_hour: float
    """Of the whole cluster, while it is up."""
    expected_preemptions: float
    usd_per_hour: Decimal
    worst_usd_per_hour: Decimal

    @property
    def lines(self) -> tuple[Line, ...]:
        """The bill, line by line."""
        return tuple(Line(name, Decimal(micro) / MICRO) for name, micro in zip(LINES, self.micro_usd, strict=True))

    @property
    def total_micro_usd(self) -> int:
        """The sum of the lines."""
        return sum(self.micro_usd)

    @property
    def total_usd(self) -> Decimal:
        """The sum of the lines."""
        return Decimal(self.total_micro_usd) / MICRO

    @property
    def once_micro_usd(self) -> int:
        """What does not grow with training."""
        return sum(micro for name, micro in zip(LINES, self.micro_usd, strict=True) if name in PAID_ONCE)

    @property
    def worst_case_usd(self) -> Decimal:
        """At the highest price, with unluckily many preemptions, and everything that is not node-hours."""
        rest = sum(micro for name, micro in zip(LINES, self.micro_usd, strict=True) if name not in NODE_HOURS)
        return Decimal(_micro(self.worst_hours * float(self.worst_usd_per_hour)) + rest) / MICRO


def rhythm(num_params: int, cloud: Cloud, *, num_nodes: int, world_size: int) -> Rhythm:
    """Start-up, saving and recovery on rented nodes."""
    size = checkpoint_bytes(num_params)
    transfer_seconds = size / (num_nodes * STORE_BYTES_PER_SECOND)
    stall_seconds = STALL_FLOOR_SECONDS + size / (world_size * COPY_BYTES_PER_SECOND)
    startup_seconds = cloud.startup_seconds + WARM_UP_SECONDS
    return Rhythm(
        startup_seconds=startup_seconds,
        recovery_seconds=DETECTION_SECONDS + startup_seconds + transfer_seconds,
        stall_seconds=stall_seconds,
        shortest_interval_seconds=2 * (stall_seconds + transfer_seconds),
        saved_at_notice=save_at_notice(cloud.notice_seconds, stall_seconds + transfer_seconds),
    )


def checkpoint_bytes(num_params: int) -> float:
    """Size of one whole checkpoint."""
    return num_params * CHECKPOINT_BYTES_PER_PARAM


def worst_usd_per_hour(offer: Offer) -> Decimal:
    """The worst-case price of one node per hour: on-demand, or a multiple of spot where that is unknown."""
    if not offer.spot:
        return offer.usd_per_hour
    if offer.on_demand_usd_per_hour is not None:
        return max(offer.usd_per_hour, offer.on_demand_usd_per_hour)
    return offer.usd_per_hour * UNKNOWN_CEILING


def make_bill(
    offer: Offer, cloud: Cloud, hazard: Hazard, pace: Rhythm, *, num_nodes: int, num_params: int, train_hours: float
) -> Bill | None:
    """The expected bill; None where the cluster would be lost faster than it recovers."""
    losses_per_hour = num_nodes * hazard.per_node_hour
    interval = checkpoint_interval_seconds(
        pace.stall_seconds, losses_per_hour, pace.saved_at_notice, pace.shortest_interval_seconds
    )
    interval = min(interval, max(pace.shortest_interval_seconds, train_hours * SECONDS_PER_HOUR))
    waste = expected_waste(
        interval_seconds=interval,
        stall_seconds=pace.stall_seconds,
        losses_per_hour=losses_per_hour,
        saved_at_notice=pace.saved_at_notice,
        recovery_seconds=pace.recovery_seconds,
    )
    if waste.share > LARGEST_WASTE_SHARE:
        return None
    running_hours = train_hours * (1 + waste.total)
    startup_hours = pace.startup_seconds / SECONDS_PER_HOUR
    billed_hours = startup_hours + running_hours
    usd_per_hour = offer.usd_per_hour * num_nodes
    hourly = float(usd_per_hour)
    expected_preemptions = waste.losses * train_hours
    preempted_hours = train_hours * (waste.lost_work + waste.recoveries)
    short_hours = max(0.0, cloud.minimum_billed_seconds / SECONDS_PER_HOUR - billed_hours)
    months = billed_hours / HOURS_PER_MONTH
    saved_gb = checkpoint_bytes(num_params) / BYTES_PER_GB
    saves = train_hours * SECONDS_PER_HOUR / interval
    sent_gb = 0.0 if cloud.name in CLOUDS_WITH_A_STORE_INSIDE else saves * saved_gb
    egress = float(cloud.egress_usd_per_gb)
    dollars = (
        train_hours * hourly,
        startup_hours * hourly,
        train_hours * waste.checkpoints * hourly,
        preempted_hours * hourly,
        short_hours * hourly,
        num_nodes * DISK_GB_PER_NODE * months * float(cloud.disk_usd_per_gb_month),
        KEPT_CHECKPOINTS * saved_gb * months * float(cloud.storage_usd_per_gb_month),
        sent_gb * egress,
        num_params * EXPORT_BYTES_PER_PARAM / BYTES_PER_GB * egress,
    )
    unlucky_losses = UNLUCKY_DEVIATIONS * math.sqrt(expected_preemptions)
    unlucky_hours = unlucky_losses * preempted_hours / expected_preemptions if expected_preemptions else 0.0
    return Bill(
        micro_usd=tuple(map(_micro, dollars)),
        train_hours=train_hours,
        billed_hours=billed_hours,
        worst_hours=billed_hours + short_hours + unlucky_hours,
        waste=waste,
        pace=pace,
        losses_per_hour=losses_per_hour,
        expected_preemptions=expected_preemptions,
        usd_per_hour=usd_per_hour,
        worst_usd_per_hour=worst_usd_per_hour(offer) * num_nodes,
    )


def _micro(dollars: float) -> int:
    """Micro-dollars, rounded up; an excess from binary rounding is dropped first."""
    return math.ceil(dollars * MICRO - 1e-6)

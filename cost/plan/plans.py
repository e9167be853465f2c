"""The planner's inputs and results: market assumptions, one estimate per offer, the ranked plan.

Invariant: every number of an estimate follows from its offer, placement and bill; nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Literal, get_args

from cost.market.hardware import CPU_BF16_FLOPS_PER_CORE, CPU_FP32_FLOPS_PER_CORE, Precision
from cost.market.offers import Offer
from cost.market.preemption import Hazards, Sighting
from cost.outcome.scaling_law import CHINCHILLA, LossLaw, Prediction, predict
from cost.outcome.validity import unknown_because
from cost.performance.layout import Layout
from cost.performance.layouts import Placement
from cost.performance.memory import MemoryEstimate
from cost.performance.software import Software, our_trainer
from cost.performance.throughput import Calibration, ThroughputEstimate, default_calibration
from cost.performance.workload import Workload
from cost.plan.bill import Bill, Line

Objective = Literal["usd_per_param", "loss", "dollars", "hours"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, slots=True)
class Emulation:
    """The local backend: every offer runs on this machine's processor, billed `time_scale` times as fast."""

    num_cores: float
    time_scale: float = 1.0
    micro_batch_size: int = 1
    tokens_per_second: float | None = None
    """What a run on this machine was measured at, in real time; replaces the model."""
    bf16_flops_per_core: float = CPU_BF16_FLOPS_PER_CORE
    fp32_flops_per_core: float = CPU_FP32_FLOPS_PER_CORE
    """Large square products on one core of this machine."""
    is_timed: bool = False
    """Whether these were timed on this machine; else they are of a table."""


@dataclass(frozen=True)
class Estimate:
    """One offer with its best number of nodes and layout. Hours are billed hours."""

    offer: Offer
    workload: Workload
    placement: Placement
    bill: Bill
    tokens_per_second: float
    """Over all devices, in real time."""
    tokens_per_second_interval: tuple[float, float]
    mfu: float
    num_tokens: int
    """What the run would train on under budget and deadline: the workload's tokens, or fewer where they buy fewer."""
    within_budget: bool
    within_deadline: bool
    checkpoint_interval_seconds: float
    """In real time, for the trainer."""
    law: LossLaw
    unique_tokens: int | None

    @cached_property
    def predicted(self) -> Prediction:
        """Held-out loss after `num_tokens`."""
        return predict(self.workload.with_tokens(max(1, self.num_tokens)), self.law, self.unique_tokens)

    @property
    def layout(self) -> Layout:
        """How the run is spread over the devices."""
        return self.placement.layout

    @property
    def throughput(self) -> ThroughputEstimate:
        """What bounds the speed, part by part."""
        return self.placement.throughput

    @property
    def memory(self) -> MemoryEstimate:
        """Of one device, by kind."""
        return self.placement.memory

    @property
    def usd_per_param(self) -> Decimal:
        """Expected dollars of the whole run per trained weight."""
        return self.total_usd / self.workload.num_params

    @property
    def usd_per_active_param(self) -> Decimal:
        """The same per weight that one token uses; equal for a dense model."""
        return self.total_usd / self.workload.active_params

    @property
    def total_usd(self) -> Decimal:
        """Expected dollars of the whole run: the exact sum of `lines`."""
        return self.bill.total_usd

    @property
    def lines(self) -> tuple[Line, ...]:
        """The bill."""
        return self.bill.lines

    @property
    def train_hours(self) -> float:
        """Billed hours that train new steps."""
        return self.bill.train_hours

    @property
    def hours(self) -> float:
        """Billed hours from request to end, start-up and recoveries included."""
        return self.bill.billed_hours

    @property
    def usd_per_hour(self) -> Decimal:
        """Of the whole cluster."""
        return self.bill.usd_per_hour

    @property
    def worst_case_usd(self) -> Decimal:
        """At the highest price and with unluckily many preemptions; the cap stops the run before its own limit."""
        return self.bill.worst_case_usd

    @property
    def expected_preemptions(self) -> float:
        """Over the whole run."""
        return self.bill.expected_preemptions

    @property
    def peak_memory_gib(self) -> float:
        """Predicted, of one device."""
        return self.memory.total_gib

    @property
    def num_nodes(self) -> int:
        """Of the layout."""
        return self.layout.num_nodes


@dataclass(frozen=True, slots=True)
class Rejected:
    """An offer that was not ranked."""

    offer: Offer
    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """Measurements of our own runs that a plan used beside published numbers."""

    measured_by: Mapping[str, str] = field(default_factory=dict)
    """By accelerator, the run whose measured speed the calibration uses."""
    sightings: tuple[Sighting, ...] = ()
    problem: str | None = None
    """Why measurements are missing or incomplete."""
    starts: Mapping[str, float] = field(default_factory=dict)
    """By cloud, seconds from the request to a node that is set up."""

    def losses_on(self, offer: Offer) -> Sighting | None:
        """Measurements of this kind of spot node."""
        if not offer.spot:
            return None
        kind = (offer.cloud, offer.accelerator, offer.gpus_per_node)
        return next(
            (
                sighting
                for sighting in self.sightings
                if (sighting.cloud, sighting.accelerator, sighting.gpus_per_node) == kind
            ),
            None,
        )


@dataclass(frozen=True, slots=True)
class Chance:
    """Of simulated runs of a plan, the share that trained all tokens in budget and time."""

    finished_share: float
    num_runs: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every offer, either ranked best first or rejected. `best` is None where nothing can run the workload."""

    workload: Workload
    objective: Objective
    budget_usd: Decimal
    deadline_hours: float | None
    law: LossLaw
    emulation: Emulation | None
    ranked: tuple[Estimate, ...]
    rejected: tuple[Rejected, ...]
    seen: Seen = field(default_factory=Seen)
    unguarded: tuple[Estimate, ...] = ()
    """Rejected only because no terminator ends a hung node there; best first."""

    @property
    def best(self) -> Estimate | None:
        """The first of the ranking."""
        return self.ranked[0] if self.ranked else None

    @property
    def affordable(self) -> bool:
        """Whether the best plan pays for the whole run in time."""
        return self.best is not None and self.best.within_budget and self.best.within_deadline


@dataclass(frozen=True)
class Market:
    """The planner's assumptions about the world besides prices."""

    hazards: Hazards = field(default_factory=Hazards)
    law: LossLaw = CHINCHILLA
    unique_tokens: int | None = None
    """Tokens that the data set has; a run over more repeats them."""
    calibration: Calibration = field(default_factory=default_calibration)
    software: Software = field(default_factory=our_trainer)
    """Our trainer as the recipe sets it: compiled or not, and its optimizer."""
    starts: Mapping[str, float] = field(default_factory=dict)
    """By cloud, seconds from the request to a node that is set up, where our own runs measured them."""
    precisions: tuple[Precision, ...] = ()
    """Each offer gets the fastest of these; without any, all offers get the workload's own."""


def known_loss(estimate: Estimate) -> Prediction | None:
    """What the estimate predicts, or None where its law does not hold for a run of that many tokens."""
    work = estimate.workload.with_tokens(max(1, estimate.num_tokens))
    return estimate.predicted if unknown_because(work, estimate.predicted) is None else None

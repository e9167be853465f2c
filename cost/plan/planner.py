"""The planner: prices every offer with its best nodes and layout, and ranks or rejects it with a reason.

Pure: offers, hazards, law and calibration come in as arguments, nothing is read from a clock or a network.
Invariants: no offer is dropped without a reason; a cheaper price never ranks worse; more budget never buys less.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from decimal import Decimal

from cost.errors import UserError
from cost.market.clouds import Cloud, cloud_terms
from cost.market.hardware import Precision, accelerator, canonical_name, local_cpu
from cost.market.offers import Offer
from cost.market.preemption import SECONDS_PER_HOUR
from cost.performance.layout import Layout
from cost.performance.layouts import Cluster, NoLayout, Placement, emulated_layout, fastest_precision
from cost.performance.workload import Workload
from cost.plan.bill import MICRO, Bill, Rhythm, make_bill, rhythm
from cost.plan.plans import OBJECTIVES, Emulation, Estimate, Market, Objective, Plan, Rejected, Seen

__all__ = ["OBJECTIVES", "Emulation", "Estimate", "Market", "Objective", "Plan", "Rejected", "Seen", "make_plan"]

EMULATED_STARTUP_SECONDS = 15.0
"""Real seconds from start to the first step of a raylet and its worker; assumed until a run has measured it."""
EMULATED_RECOVERY_SECONDS = 20.0
"""Real seconds from a lost node to the next new step."""
EMULATED_STALL_SECONDS = 0.05
EMULATED_SHORTEST_INTERVAL_SECONDS = 2.0


def make_plan(
    workload: Workload,
    offers: Sequence[Offer],
    *,
    budget_usd: Decimal,
    objective: Objective = "usd_per_param",
    min_nodes: int = 1,
    max_nodes: int = 1,
    clouds: Collection[str] | None = None,
    gpus: Collection[str] | None = None,
    spot: bool | None = None,
    deadline_hours: float | None = None,
    emulation: Emulation | None = None,
    market: Market | None = None,
    speed: float = 1.0,
) -> Plan:
    """Price every offer with its best number of nodes and layout, and rank them.

    Estimates within budget and deadline come first; among the others those that buy most. `spot` None means both.
    `speed` multiplies every predicted tokens per second, for what the throughput model does not know.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"there is no objective '{objective}'; choose one of {', '.join(OBJECTIVES)}.")
    if not 1 <= min_nodes <= max_nodes:
        raise UserError(
            f"nodes from {min_nodes} to {max_nodes} is not a valid range; the minimum must be at least 1 "
            "and at most the maximum."
        )
    wanted_gpus = None if gpus is None else frozenset(_gpu_name(name) for name in gpus)
    wanted_clouds = None if clouds is None else frozenset(name.lower() for name in clouds)
    task = _Task(
        workload,
        budget_usd,
        objective,
        _node_counts(min_nodes, max_nodes),
        deadline_hours,
        emulation,
        market or Market(),
        speed,
    )
    ranked: list[Estimate] = []
    rejected: list[Rejected] = []
    for offer in offers:
        reason = _filtered(offer, wanted_clouds, wanted_gpus, spot)
        found = reason if reason is not None else task.estimate(offer)
        if isinstance(found, str):
            rejected.append(Rejected(offer, found))
        else:
            ranked.append(found)
    ranked.sort(key=task.rank)
    return Plan(
        workload=ranked[0].workload if ranked else workload,
        objective=objective,
        budget_usd=budget_usd,
        deadline_hours=deadline_hours,
        law=task.market.law,
        emulation=emulation,
        ranked=tuple(ranked),
        rejected=tuple(rejected),
    )


def _gpu_name(name: str) -> str:
    found = canonical_name(name)
    if found is None:
        raise UserError(f"there is no accelerator '{name}' in the hardware table; `slm gpus` lists them.")
    return found


def _node_counts(min_nodes: int, max_nodes: int) -> tuple[int, ...]:
    """Powers of two in the range, and its ends."""
    powers = [2**k for k in range(max_nodes.bit_length()) if min_nodes <= 2**k <= max_nodes]
    return tuple(sorted({min_nodes, max_nodes, *powers}))


def _whole_gib(memory_gib: float) -> float:
    """Rounded down, so that cards that differ only by their driver's share use one search; small sizes stay exact."""
    return float(math.floor(memory_gib)) if memory_gib >= 1 else memory_gib


def _filtered(
    offer: Offer, clouds: Collection[str] | None, gpus: Collection[str] | None, spot: bool | None
) -> str | None:
    if clouds is not None and offer.cloud not in clouds:
        return f"cloud {offer.cloud} was not asked for"
    if gpus is not None and offer.accelerator not in gpus:
        return f"{offer.accelerator} was not asked for"
    if spot is not None and offer.spot != spot:
        return "spot was not asked for" if offer.spot else "on-demand was not asked for"
    return None


class _Task:
    """One request: what all offers share, and layouts and rhythms that many offers share."""

    def __init__(
        self,
        workload: Workload,
        budget_usd: Decimal,
        objective: Objective,
        node_counts: tuple[int, ...],
        deadline_hours: float | None,
        emulation: Emulation | None,
        market: Market,
        speed: float,
    ) -> None:
        self.workload = workload
        self.budget_micro_usd = int(budget_usd * MICRO)
        self.node_counts = node_counts
        self.deadline_hours = deadline_hours
        self.emulation = emulation
        self.market = market
        self.speed = speed
        self.rank = _ranking(objective)
        self._placements: dict[tuple[object, ...], Placement | NoLayout] = {}
        self._paces: dict[tuple[str, int, int], Rhythm] = {}
        self._works: dict[Precision, Workload] = {workload.precision: workload}

    def estimate(self, offer: Offer) -> Estimate | str:
        """The best number of nodes for one offer, or why there is none."""
        best: Estimate | None = None
        reason = "no number of nodes was asked for"
        for num_nodes in self.node_counts:
            placed = self._placed(offer, num_nodes)
            found = placed.reason if isinstance(placed, NoLayout) else self._priced(offer, num_nodes, placed)
            if isinstance(found, str):
                reason = found
            elif best is None or self.rank(found) < self.rank(best):
                best = found
        return best if best is not None else reason

    def _placed(self, offer: Offer, num_nodes: int) -> Placement | NoLayout:
        network = cloud_terms(offer.cloud).network_bytes_per_second if num_nodes > 1 else 0.0
        key: tuple[object, ...] = (num_nodes,)
        memory_gib = _whole_gib(offer.gpu_memory_gib)
        if self.emulation is None:
            key = (offer.accelerator, offer.gpus_per_node, memory_gib, num_nodes, network)
        if key not in self._placements:
            self._placements[key] = self._place(offer, memory_gib, num_nodes, network)
        return self._placements[key]

    def _place(self, offer: Offer, memory_gib: float, num_nodes: int, network: float) -> Placement | NoLayout:
        calibration, program, precisions = self.market.calibration, self.market.software, self.market.precisions
        if self.emulation is not None:
            device = local_cpu(
                self.emulation.num_cores / num_nodes,
                bf16_flops_per_core=self.emulation.bf16_flops_per_core,
                fp32_flops_per_core=self.emulation.fp32_flops_per_core,
            )
            cluster = Cluster(device, 1, num_nodes, device.pcie_bytes_per_second)
            micro = self.emulation.micro_batch_size
            return emulated_layout(self.workload, cluster, micro, calibration, program, precisions=precisions)
        device = replace(accelerator(offer.accelerator), memory_gib=memory_gib)
        cluster = Cluster(device, offer.gpus_per_node, num_nodes, network)
        return fastest_precision(self.workload, cluster, calibration, program, precisions=precisions)

    def _pace(self, offer: Offer, layout: Layout) -> Rhythm:
        key = (offer.cloud, layout.num_nodes, layout.world_size)
        if key not in self._paces:
            cloud = cloud_terms(offer.cloud)
            measured = self.market.starts.get(offer.cloud, cloud.startup_seconds)
            self._paces[key] = self._new_pace(replace(cloud, startup_seconds=measured), layout)
        return self._paces[key]

    def _new_pace(self, cloud: Cloud, layout: Layout) -> Rhythm:
        if self.emulation is None:
            num_params = self.workload.num_params
            return rhythm(num_params, cloud, num_nodes=layout.num_nodes, world_size=layout.world_size)
        scale = self.emulation.time_scale
        return Rhythm(
            startup_seconds=EMULATED_STARTUP_SECONDS * scale,
            recovery_seconds=EMULATED_RECOVERY_SECONDS * scale,
            stall_seconds=EMULATED_STALL_SECONDS * scale,
            shortest_interval_seconds=EMULATED_SHORTEST_INTERVAL_SECONDS * scale,
            saved_at_notice=0.0,
        )

    def _priced(self, offer: Offer, num_nodes: int, placed: Placement) -> Estimate | str:
        scale = 1.0 if self.emulation is None else self.emulation.time_scale
        measured = None if self.emulation is None else self.emulation.tokens_per_second
        speed = placed.tokens_per_second * self.speed if measured is None else measured
        work = self._in(placed.layout.precision)
        bill = make_bill(
            offer,
            cloud_terms(offer.cloud),
            self.market.hazards.for_offer(offer),
            self._pace(offer, placed.layout),
            num_nodes=num_nodes,
            num_params=work.num_params,
            train_hours=work.num_tokens / speed / SECONDS_PER_HOUR * scale,
        )
        if bill is None:
            return "it would be preempted faster than it recovers"
        low, high = placed.throughput.interval
        ratio = speed / placed.throughput.tokens_per_second
        return Estimate(
            offer=offer,
            workload=work,
            placement=placed,
            bill=bill,
            tokens_per_second=speed,
            tokens_per_second_interval=(low * ratio, high * ratio) if measured is None else (speed, speed),
            mfu=placed.throughput.mfu * ratio,
            num_tokens=self._tokens_bought(bill),
            within_budget=bill.total_micro_usd <= self.budget_micro_usd,
            within_deadline=self.deadline_hours is None or bill.billed_hours <= self.deadline_hours,
            checkpoint_interval_seconds=bill.waste.interval_seconds / scale,
            law=self.market.law,
            unique_tokens=self.market.unique_tokens,
        )

    def _in(self, precision: Precision) -> Workload:
        """The workload in a precision; one object for all offers."""
        if precision not in self._works:
            self._works[precision] = replace(self.workload, precision=precision)
        return self._works[precision]

    def _tokens_bought(self, bill: Bill) -> int:
        """Tokens that budget and deadline pay for; what does not grow with training is paid first."""
        work, total = self.workload, bill.total_micro_usd
        share = 1.0
        if total > self.budget_micro_usd:
            once = bill.once_micro_usd
            share = (self.budget_micro_usd - once) / max(total - once, 1)
        if self.deadline_hours is not None and bill.billed_hours > self.deadline_hours:
            running = bill.train_hours * (1 + bill.waste.total)
            share = min(share, (self.deadline_hours - (bill.billed_hours - running)) / running)
        return work.num_tokens if share >= 1 else math.floor(work.num_tokens * max(0.0, share))


def _ranking(objective: Objective) -> Callable[[Estimate], tuple[object, ...]]:
    """Sort key, smaller is better. Plans that cannot finish come last, ordered by the tokens that they buy."""
    # One workload: dollars per parameter follow dollars, and loss falls with the tokens that are bought.
    by_dollars = operator.attrgetter("bill.total_micro_usd", "hours")
    by_objective: dict[Objective, Callable[[Estimate], tuple[object, ...]]] = {
        "usd_per_param": by_dollars,
        "dollars": by_dollars,
        "hours": operator.attrgetter("hours", "bill.total_micro_usd"),
        "loss": lambda item: (-item.num_tokens, item.bill.total_micro_usd),
    }
    key = by_objective[objective]

    def rank(estimate: Estimate) -> tuple[object, ...]:
        finished = estimate.within_budget and estimate.within_deadline
        return (not finished, 0 if finished else -estimate.num_tokens, *key(estimate), estimate.offer.offer_id)

    return rank

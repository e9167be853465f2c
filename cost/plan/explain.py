"""Explanations for `--explain`: every number of an estimate with its formula, inputs and sources.

Invariant: a value with a closed formula is computed here from its inputs, not copied from the estimate, so that an
explanation which no longer matches the planner fails its test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cost.market.clouds import cloud_terms
from cost.market.hardware import LOCAL_CPU, accelerator
from cost.market.preemption import Hazard
from cost.performance.workload import Workload
from cost.plan.bill import (
    CHECKPOINT_BYTES_PER_PARAM,
    CLOUDS_WITH_A_STORE_INSIDE,
    DETECTION_SECONDS,
    DISK_GB_PER_NODE,
    EXPORT_BYTES_PER_PARAM,
    HOURS_PER_MONTH,
    KEPT_CHECKPOINTS,
    WARM_UP_SECONDS,
)
from cost.plan.planner import Estimate, Plan

YOUNG_DALY = "Young 1974 (doi:10.1145/361147.361115), Daly 2006 (doi:10.1016/j.future.2004.11.016)"
CLOUDS_CSV = "cost/data/clouds.csv"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A number. `inputs` are the formula's variables with their values, units in the names."""

    name: str
    value: float
    unit: str
    formula: str
    inputs: Mapping[str, float]
    source: str


def explain(plan: Plan, estimate: Estimate, hazard: Hazard) -> tuple[Explanation, ...]:
    """All numbers of one estimate, in the order in which they follow from each other.

    `hazard` is the planner's hazard for this offer (`Hazards.for_offer`).
    """
    work = plan.workload
    return (
        *_model(work),
        *_speed(plan, estimate),
        *_losses(estimate, hazard),
        *_dollars(work, estimate),
        *_outcome(plan, estimate),
    )


def _model(work: Workload) -> tuple[Explanation, ...]:
    matrices = float(work.active_matrix_params)
    attention_width = float(work.num_heads * work.head_size)
    return (
        Explanation(
            "flops_per_token",
            6 * matrices + 12 * work.num_layers * attention_width * work.sequence_length / 2,
            "FLOP",
            "6 * matrix_params + 12 * layers * heads_x_head_size * sequence_length / 2",
            {
                "matrix_params": matrices,
                "layers": work.num_layers,
                "heads_x_head_size": attention_width,
                "sequence_length": work.sequence_length,
            },
            "Kaplan et al. 2020 (arXiv:2001.08361), 2.1; Chowdhery et al. 2022 (arXiv:2204.02311), B; causal",
        ),
    )


def _speed(plan: Plan, each_estimate: Estimate) -> tuple[Explanation, ...]:
    estimate, work = each_estimate.throughput, plan.workload
    scale = 1.0 if plan.emulation is None else plan.emulation.time_scale
    emulated = plan.emulation is not None
    device = None if emulated else accelerator(each_estimate.offer.accelerator)
    peak = each_estimate.tokens_per_second * work.flops_per_token / each_estimate.mfu
    return (
        Explanation(
            "tokens_per_second",
            each_estimate.tokens_per_second,
            "tokens/s",
            "global_batch_tokens / (sum of seconds by part), on a full last pass",
            dict(estimate.seconds_by_part),
            "roofline of cost/performance/roofline.py with the constants of cost/data/calibration.json, "
            f"basis: {estimate.basis}{_measured_by(plan, each_estimate)}",
        ),
        Explanation(
            "mfu",
            each_estimate.tokens_per_second * work.flops_per_token / peak,
            "share",
            "tokens_per_second * flops_per_token / peak_flops",
            {
                "tokens_per_second": each_estimate.tokens_per_second,
                "flops_per_token": work.flops_per_token,
                "peak_flops": peak,
            },
            f"{LOCAL_CPU}: cost/market/hardware.py" if device is None else f"peak of {device.name}: {device.sources}",
        ),
        Explanation(
            "train_hours",
            work.num_tokens / each_estimate.tokens_per_second / 3600 * scale,
            "billed h",
            "num_tokens / tokens_per_second / 3600 * time_scale",
            {"num_tokens": work.num_tokens, "tokens_per_second": each_estimate.tokens_per_second, "time_scale": scale},
            "the recipe; tokens_per_second above",
        ),
        Explanation(
            "peak_memory_gib",
            sum(each_estimate.memory.by_kind.values()) / 2**30,
            "GiB",
            "sum of bytes by kind / 2^30",
            dict(each_estimate.memory.by_kind),
            "Rajbhandari et al. 2020 (arXiv:1910.02054), Korthikanti et al. 2022 (arXiv:2205.05198)",
        ),
    )


def _measured_by(plan: Plan, estimate: Estimate) -> str:
    run = None if plan.emulation is not None else plan.seen.measured_by.get(estimate.offer.accelerator)
    return "" if run is None else f", all scaled to what run {run} measured on {estimate.offer.accelerator}"


def _losses(estimate: Estimate, hazard: Hazard) -> tuple[Explanation, ...]:
    bill, pace, waste = estimate.bill, estimate.bill.pace, estimate.bill.waste
    rate = hazard.per_node_hour * estimate.num_nodes
    young_daly = (
        math.sqrt(2 * pace.stall_seconds / (rate / 3600 * (1 - pace.saved_at_notice)))
        if rate > 0 and pace.saved_at_notice < 1
        else math.inf
    )
    longest = max(pace.shortest_interval_seconds, bill.train_hours * 3600)
    return (
        Explanation(
            "losses_per_hour",
            rate,
            "1/h",
            "num_nodes * losses / node_hours",
            {"num_nodes": estimate.num_nodes, "losses": hazard.losses, "node_hours": hazard.node_hours},
            hazard.source,
        ),
        Explanation(
            "checkpoint_interval",
            min(max(young_daly, pace.shortest_interval_seconds), longest),
            "billed s",
            "sqrt(2 * stall / (losses_per_hour / 3600 * (1 - saved_at_notice))), within [shortest, the whole run]",
            {
                "stall": pace.stall_seconds,
                "losses_per_hour": rate,
                "saved_at_notice": pace.saved_at_notice,
                "shortest": pace.shortest_interval_seconds,
            },
            YOUNG_DALY,
        ),
        Explanation(
            "expected_preemptions",
            rate * (1 + waste.checkpoints + waste.lost_work) * bill.train_hours,
            "count",
            "losses_per_hour * (1 + checkpoints + lost_work) * train_hours, counted while the cluster is up",
            {
                "losses_per_hour": rate,
                "checkpoints": waste.checkpoints,
                "lost_work": waste.lost_work,
                "train_hours": bill.train_hours,
            },
            "Daly 2006, first order; shares are hours per useful hour",
        ),
        Explanation(
            "hours",
            pace.startup_seconds / 3600 + bill.train_hours * (1 + waste.total),
            "billed h",
            "startup / 3600 + train_hours * (1 + checkpoints + lost_work + recoveries)",
            {
                "startup": pace.startup_seconds,
                "train_hours": bill.train_hours,
                "checkpoints": waste.checkpoints,
                "lost_work": waste.lost_work,
                "recoveries": waste.recoveries,
            },
            f"start-up of {estimate.offer.cloud}: {cloud_terms(estimate.offer.cloud).startup_source}; "
            f"{WARM_UP_SECONDS:g} s of warm-up and {DETECTION_SECONDS:g} s of detection are assumed",
        ),
    )


def _dollars(work: Workload, estimate: Estimate) -> tuple[Explanation, ...]:
    bill, cloud = estimate.bill, cloud_terms(estimate.offer.cloud)
    hourly = float(estimate.usd_per_hour)
    waste, train = bill.waste, bill.train_hours
    checkpoint_gb = work.num_params * CHECKPOINT_BYTES_PER_PARAM / 1e9
    export_gb = work.num_params * EXPORT_BYTES_PER_PARAM / 1e9
    months = bill.billed_hours / HOURS_PER_MONTH
    price = f"{estimate.offer.source} ({estimate.offer.as_of})"
    short = max(0.0, cloud.minimum_billed_seconds / 3600 - bill.billed_hours)
    usd = {line.name: float(line.usd) for line in estimate.lines}
    egress = float(cloud.egress_usd_per_gb)
    saves = train * 3600 / waste.interval_seconds
    sent_gb = 0.0 if cloud.name in CLOUDS_WITH_A_STORE_INSIDE else saves * checkpoint_gb
    disk, store = float(cloud.disk_usd_per_gb_month), float(cloud.storage_usd_per_gb_month)
    by_line: dict[str, tuple[float, str, dict[str, float], str]] = {
        "compute": (train * hourly, "train_hours * usd_per_hour", {"train_hours": train}, price),
        "start-up": (
            bill.pace.startup_seconds / 3600 * hourly,
            "startup / 3600 * usd_per_hour",
            {"startup": bill.pace.startup_seconds},
            cloud.startup_source,
        ),
        "checkpoints": (
            train * waste.checkpoints * hourly,
            "train_hours * checkpoints * usd_per_hour",
            {"train_hours": train, "checkpoints": waste.checkpoints},
            YOUNG_DALY,
        ),
        "preemptions": (
            train * (waste.lost_work + waste.recoveries) * hourly,
            "train_hours * (lost_work + recoveries) * usd_per_hour",
            {"train_hours": train, "lost_work": waste.lost_work, "recoveries": waste.recoveries},
            YOUNG_DALY,
        ),
        "minimum billing": (
            short * hourly,
            "hours below the minimum * usd_per_hour",
            {"short_hours": short},
            CLOUDS_CSV,
        ),
        "disks": (
            estimate.num_nodes * DISK_GB_PER_NODE * months * disk,
            "num_nodes * disk_gb * billed_hours / 730 * usd_per_gb_month",
            {"num_nodes": estimate.num_nodes, "disk_gb": DISK_GB_PER_NODE, "usd_per_gb_month": disk},
            cloud.storage_source,
        ),
        "run store": (
            KEPT_CHECKPOINTS * checkpoint_gb * months * store,
            "kept * checkpoint_gb * billed_hours / 730 * usd_per_gb_month",
            {"kept": KEPT_CHECKPOINTS, "checkpoint_gb": checkpoint_gb, "usd_per_gb_month": store},
            cloud.storage_source,
        ),
        "egress": (
            sent_gb * egress,
            "saves * checkpoint_gb * usd_per_gb, where the run store is outside the cloud",
            {"saves": saves, "checkpoint_gb": checkpoint_gb, "usd_per_gb": egress},
            cloud.egress_source,
        ),
        "final download": (
            export_gb * egress,
            "weights_gb * usd_per_gb",
            {"weights_gb": export_gb, "usd_per_gb": egress},
            cloud.egress_source,
        ),
    }
    lines = tuple(
        Explanation(name, value, "usd", formula, {**inputs, "usd_per_hour": hourly}, source)
        for name, (value, formula, inputs, source) in by_line.items()
    )
    total = Explanation("total", sum(usd.values()), "usd", "sum of the lines", usd, "the lines above, exact in decimal")
    return (*lines, total)


def _outcome(plan: Plan, estimate: Estimate) -> tuple[Explanation, ...]:
    work, law = plan.workload, plan.law
    total = float(estimate.total_usd)
    return (
        Explanation(
            "usd_per_param",
            total / work.num_params,
            "usd",
            "total / num_params",
            {"total": total, "num_params": work.num_params},
            "expected dollars of the whole run at the recipe's tokens per parameter",
        ),
        Explanation(
            "predicted_loss",
            estimate.predicted.nats_per_token,
            "nats/token",
            "E + A / N^alpha + B / (k * D)^beta",
            {
                "E": law.irreducible,
                "A": law.params_scale,
                "B": law.data_scale,
                "alpha": law.params_exponent,
                "beta": law.data_exponent,
                "k": law.data_efficiency,
                "N": math.sqrt(float(work.matrix_params) * work.active_matrix_params),
                "D": estimate.predicted.effective_tokens,
                "low": estimate.predicted.low_nats,
                "high": estimate.predicted.high_nats,
            },
            estimate.predicted.source,
        ),
        Explanation(
            "worst_case",
            float(estimate.worst_case_usd),
            "usd",
            "hours with two standard deviations more preemptions * worst_usd_per_hour + disks, store, egress, download",
            {"worst_usd_per_hour": float(estimate.bill.worst_usd_per_hour), "hours": estimate.hours},
            "on-demand price where it is known, else four times spot; the budget cap stops the run at its own limit",
        ),
    )

"""Terminal output of `slm estimate`, `slm frontier` and `slm simulate`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from cost.market.hardware import BYTES_PER_GIB
from cost.plan.plans import known_loss
from cost.plan.policy import DEFAULT
from orchestrator.figures import UNKNOWN, bar, count, dollars, duration, usd_per_param
from orchestrator.prices.table import age
from orchestrator.views import plan as render_plan
from orchestrator.views.runs import bullets, following, say, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from decimal import Decimal
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from cost.plan.frontier import Point
    from cost.plan.planner import Plan
    from cost.plan.simulate import Spread
    from orchestrator.planning.analysis import MachineEstimate, Simulated
    from orchestrator.prices.table import Prices

SECONDS_PER_HOUR = 3600
BAR_WIDTH = 24
FLAT_NATS = 0.01
"""Losses that close cannot be told apart, not even by two runs of one recipe."""
SHARED_INTERVAL = 0.005
"""Intervals that differ by less than this are one interval."""


# ---------------------------------------------------------------- estimate


def machine(made: MachineEstimate, prices: Prices, console: Console, *, now: datetime) -> None:
    """Speed and what bounds it, memory by kind, hours and dollars."""
    placed, layout = made.placement, made.placement.layout
    low, high = placed.throughput.interval
    where = f"{made.num_nodes} x {made.gpus_per_node}x{made.gpu}"
    tell(
        console,
        f"{made.name} on {where}: {count(placed.tokens_per_second)} tokens/s ({count(low)} to {count(high)}), "
        f"{100 * placed.throughput.mfu:.0f} % MFU, {duration(made.hours * SECONDS_PER_HOUR)} for "
        f"{count(made.workload.num_tokens)} tokens; bound by {placed.throughput.bound_by}",
    )
    step = sum(placed.throughput.seconds_by_part.values())
    say(console, "", "One step:", shares(placed.throughput.seconds_by_part, step, "ms", 1e3), "")
    total, capacity = placed.memory.total_bytes, placed.memory.capacity_bytes
    say(
        console,
        f"Memory of one GPU, {total / BYTES_PER_GIB:.1f} of {capacity / BYTES_PER_GIB:.0f} GiB:",
        shares(placed.memory.by_kind, capacity, "GiB", 1 / BYTES_PER_GIB),
        "",
    )
    recompute = ", activations recomputed" if layout.activation_checkpointing else ""
    lines = [
        f"layout: {layout.sharding}, micro-batch {layout.micro_batch_size}, {layout.grad_accumulation} passes a step, "
        f"{layout.precision}{recompute}: the fastest that fits",
        render_plan.BASIS[placed.throughput.basis]
        + ("" if made.measured_by is None else f", by run {made.measured_by}"),
    ]
    for offer in made.cheapest:
        cost = f"{dollars(offer.usd_per_hour * made.num_nodes)}/h, {dollars(made.usd(offer))} for these hours"
        lines.append(
            f"cheapest {render_plan.kind(offer)}: {offer.cloud} {render_plan.place(offer)}, {cost} without start-up, "
            f"recoveries and disks (prices: {age(prices, offer, now)})"
        )
    if not made.cheapest:
        lines.append(f"no offer of {made.gpus_per_node}x{made.gpu} is in the price table")
    bullets(console, lines)
    following(console, shlex.join(["slm", "offers", "--gpu", made.gpu]))


def shares(parts: Any, whole: float, unit: str, scale: float) -> Table:
    """Parts of a whole, the largest first, with bars; what is nothing is left out."""
    shown = table("", unit, "share", "", right=(unit, "share"))
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        if value > 0:
            shown.add_row(
                f"  {name}", f"{value * scale:.3g}", f"{100 * value / whole:.1f} %", bar(value / whole, BAR_WIDTH)
            )
    return shown


# ---------------------------------------------------------------- frontier


def frontier(
    points: Sequence[Point],
    prices: Prices,
    budget_usd: Decimal,
    console: Console,
    *,
    now: datetime,
    plot: Path | None,
) -> None:
    """The size with the lowest loss, all sizes, and where more parameters stop paying."""
    best = [point for point in points if point.best]
    first = best[0]
    predicted = known_loss(first.estimate)
    loss = "an unknown loss" if predicted is None else f"{predicted.nats_per_token:.2f} nats"
    tell(
        console,
        f"Lowest loss for {dollars(budget_usd)}: {size(first)} on {count(first.workload.num_tokens)} tokens, {loss}, "
        f"on {render_plan.cluster(first.estimate)} (prices: {age(prices, first.estimate.offer, now)})",
    )
    say(console, "", frontier_table(points), "")
    notes = [flat(points, choice) for choice in best]
    notes += [interval_note(points), "each row spends the whole budget on one epoch of new tokens, on the best offer"]
    if any(point.is_mixture for point in points):
        notes.append(
            "mixtures: 8 experts of which 2 are active; their loss is that of the geometric mean of total and active "
            "weights and their speed three quarters of a dense model of the same FLOPs, both assumed"
        )
    bullets(console, [*(note for note in notes if note), *render_plan.price_notes(prices)])
    if plot is not None:
        tell(console, f"Plot: {plot}")
    following(
        console, f"slm plan --budget {budget_usd} --params max --tokens-per-param {first.workload.tokens_per_param:.0f}"
    )


def size(point: Point) -> str:
    """1.40B parameters, or total and active ones."""
    work = point.workload
    if point.is_mixture:
        return f"{count(work.num_params)} parameters of which {count(work.active_params)} are active"
    return f"{count(work.num_params)} parameters"


def frontier_table(points: Sequence[Point]) -> Table:
    """One line for each size, dense first; the lowest loss of each kind is bold."""
    heads = ("params", "active", "tokens", "tok/param", "loss (nats)", "$/param", "hours", "$", "offer")
    shown = table(*heads, right=[head for head in heads if head != "offer"], gap=1)
    kind = False
    for point in points:
        if point.is_mixture != kind:
            kind = point.is_mixture
            shown.add_section()
            shown.add_row(*[""] * len(heads))
        predicted = known_loss(point.estimate)
        shown.add_row(
            count(point.workload.num_params),
            count(point.workload.active_params),
            count(point.workload.num_tokens),
            f"{point.workload.tokens_per_param:.1f}",
            UNKNOWN if predicted is None else f"{predicted.nats_per_token:.3f}",
            usd_per_param(point.estimate.usd_per_param),
            f"{point.estimate.hours:.0f}",
            f"{point.estimate.total_usd:.2f}",
            render_plan.cluster(point.estimate),
            style="bold" if point.best else "",
        )
    return shown


def flat(points: Sequence[Point], best: Point) -> str | None:
    """Between which sizes the loss hardly differs, and what twice as many parameters would cost in loss."""
    lowest = known_loss(best.estimate)
    if lowest is None:
        return None
    kind = "mixtures" if best.is_mixture else "dense"
    near = [
        point.workload.num_params
        for point in points
        if point.is_mixture == best.is_mixture
        and (loss := known_loss(point.estimate)) is not None
        and loss.nats_per_token <= lowest.nats_per_token + FLAT_NATS
    ]
    return (
        f"{kind}: more than {count(best.workload.num_params)} parameters raise the loss at this budget; from "
        f"{count(min(near))} to "
        f"{count(max(near))} the loss is within {FLAT_NATS:g} nats of the lowest"
    )


def interval_note(points: Sequence[Point]) -> str | None:
    """How unsure every loss is: the same for all sizes, since it is the corpus that is unknown."""
    dense = [known for point in points if not point.is_mixture and (known := known_loss(point.estimate)) is not None]
    if not dense:
        return None
    half = (dense[0].high_nats - dense[0].low_nats) / 2
    return (
        f"80 % interval of every loss: +-{half:.2f} nats, the same for all sizes (law {dense[0].law}); the order of "
        "the sizes is more certain than the level"
    )


# ---------------------------------------------------------------- simulation


def simulation(
    done: Simulated, plan: Plan, name: str, prices: Prices, console: Console, *, now: datetime, plot: Path | None
) -> None:
    """What the default policy comes to, all policies, what was assumed."""
    policies = done.simulation.policies
    first = DEFAULT if DEFAULT in policies else next(iter(policies))
    chosen = policies[first]
    tell(
        console,
        f"{name} on {render_plan.cluster(done.estimate)}: {dollars(chosen.usd.p50)} ({dollars(chosen.usd.p10)} to "
        f"{dollars(chosen.usd.p90)}), {duration(chosen.hours.p50 * SECONDS_PER_HOUR)}, finished in "
        f"{100 * chosen.finished_share:.0f} % of {done.simulation.num_runs} draws "
        f"(prices: {age(prices, done.estimate.offer, now)})",
    )
    say(console, "", "P10, P50 and P90 of each policy:", "", simulation_table(done), "")
    hazard = done.hazard
    zones = "1 zone" if done.num_zones == 1 else f"{done.num_zones} zones"
    bullets(
        console,
        [
            f"market: {done.market}; {hazard.per_node_hour:.2g} interruptions per node-hour ({hazard.source}); {zones}",
            "each simulated run draws its own hazard, capacity and speed, the same for every policy; waste is the "
            "share of billed hours that did not become kept training steps",
            f"the run is {count(plan.workload.num_tokens)} tokens under a cap of {dollars(plan.budget_usd)}"
            + ("" if plan.deadline_hours is None else f" and {duration(plan.deadline_hours * SECONDS_PER_HOUR)}"),
        ],
    )
    if plot is not None:
        tell(console, f"Plot: {plot}")
    following(console, f"slm plan {name} --budget {plan.budget_usd}")


def simulation_table(done: Simulated) -> Table:
    """One line for each policy."""
    heads = ("policy", "dollars", "hours", "tokens", "preempt.", "wasted %", "finished")
    shown = table(*heads, right=heads[1:], gap=1)
    for name, policy in done.simulation.policies.items():
        shown.add_row(
            name.replace("_", " "),
            three(policy.usd, "{:.3g}".format),
            three(policy.hours, "{:.3g}".format),
            three(policy.tokens, count),
            three(policy.preemptions, "{:.0f}".format),
            three(policy.wasted_share, lambda share: f"{100 * share:.1f}"),
            f"{100 * policy.finished_share:.0f} %",
            style="bold" if name == DEFAULT else "",
        )
    return shown


def three(spread: Spread, shown: Any) -> str:
    """P10, P50 and P90."""
    return " ".join(str(shown(value)) for value in (spread.p10, spread.p50, spread.p90))

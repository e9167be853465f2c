"""Terminal output of a plan, in full or in short."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from cost.outcome.scores import score_bands
from cost.outcome.validity import unknown_because
from cost.plan.plans import known_loss
from orchestrator.figures import UNKNOWN, count, dollars, duration, plural, usd_per_param
from orchestrator.planning.protection import cheaper_unguarded, guard_lines
from orchestrator.planning.recipe_plan import UNGUARDED, Belief, rejections, winner
from orchestrator.prices.table import Prices, age
from orchestrator.views.runs import bullets, following, say, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from cost.market.offers import Offer
    from cost.outcome.scores import ScoreBand
    from cost.plan.plans import Chance, Estimate, Plan

SECONDS_PER_HOUR = 3600
BASIS = {
    "measured": "this program was measured on this GPU",
    "framework": "this program was measured, but not on this GPU",
    "pooled": "our trainer has no measurement on this GPU yet, so the constants are pooled over other programs",
}
UNSURE_SPEED = "the speed on {gpu} is not measured but pooled over other programs: {low} to {high} tokens/s"
"""What a speed rests on."""
ANYWHERE = "any"
"""The region of an offer whose source names none."""
UNLIMITED = 1000
"""Width at which no table is cut."""
WIDEST_PLACE = 16
MAX_REASONS = 4
RANKED_BY = {
    "usd_per_param": "expected dollars of the whole run per parameter",
    "dollars": "expected dollars of the whole run",
    "hours": "billed hours of the whole run",
    "loss": "the loss that the budget buys",
}
BEST = {"usd_per_param": "Cheapest", "dollars": "Cheapest", "hours": "Fastest", "loss": "Lowest loss"}
"""What the first of the ranking is called."""
SMALLEST_SHOWN_SHARE = 0.01
"""Lines of the bill below this share of it are summed up as "other"."""


def full(
    plan: Plan,
    prices: Prices,
    console: Console,
    belief: Belief | None = None,
    chance: Chance | None = None,
    *,
    top: int,
    now: datetime,
    next_command: str | None,
) -> None:
    """The answer, the best offers, why the first wins, what was rejected, the worst case, the next command."""
    best = winner(plan)
    tell(console, answer(plan, best, prices, now))
    say_chance(plan, best, chance, console)
    say(console, "")
    say(console, offers_table(plan, top, console), "")
    bullets(console, [*reasons(plan), *outlook(plan, best, belief or Belief()), *footnotes(plan, prices, top)])
    say(console, "", worst_case(plan, best))
    if next_command is not None:
        following(console, next_command)


def short(plan: Plan, prices: Prices, console: Console, chance: Chance | None = None, *, now: datetime) -> None:
    """What `launch` shows before it asks: the choice, its bill, the worst case, what the budget does not cover."""
    best = winner(plan)
    tell(console, answer(plan, best, prices, now))
    say_chance(plan, best, chance, console)
    guard = guard_lines(plan, best) if plan.emulation is None else []
    lines = [bill(best), as_played(plan, best), *guard, worst_case(plan, best)]
    bullets(console, [line for line in lines if line is not None])
    missing = shortfall(plan, best)
    if missing is not None:
        say(console, f"Warning: {missing}")


# ---------------------------------------------------------------- sentences


def answer(plan: Plan, best: Estimate, prices: Prices, now: datetime) -> str:
    """What to rent, what it costs, and how old that price is: one line."""
    cost = f"{dollars(best.total_usd)}, {usd_per_param(best.usd_per_param)} $/param"
    if plan.objective == "hours":
        cost = f"{duration(best.hours * SECONDS_PER_HOUR)}, {cost}"
    return f"{BEST[plan.objective]}: {cluster(best)}: {cost} (prices: {age(prices, best.offer, now)})"


def say_chance(plan: Plan, best: Estimate, chance: Chance | None, console: Console) -> None:
    """Next to the answer, how likely it is to come true; nothing where nobody drew."""
    if chance is not None:
        say(console, chance_text(plan, best, chance))


def chance_text(plan: Plan, best: Estimate, chance: Chance) -> str:
    """How many simulated runs finish under the cap, and why that is not all or none."""
    limits = f"the cap of {dollars(plan.budget_usd)}"
    if plan.deadline_hours is not None:
        limits += f" and the deadline of {duration(plan.deadline_hours * SECONDS_PER_HOUR)}"
    share = f"{100 * chance.finished_share:.0f} % of {plural(chance.num_runs, 'simulated run')}"
    low, high = best.tokens_per_second_interval
    doubt = UNSURE_SPEED.format(gpu=best.offer.accelerator, low=count(low), high=count(high))
    return f"{share} train all tokens under {limits}" + ("." if best.throughput.basis == "measured" else f"; {doubt}.")


def cluster(estimate: Estimate) -> str:
    """2 x 8xH100-SXM spot at aws us-east-2."""
    offer = estimate.offer
    where = "" if offer.region == ANYWHERE else f" {place(offer)}"
    return f"{machines(estimate)} {kind(offer)} at {offer.cloud}{where}"


def kind(offer: Offer) -> str:
    """Spot nodes may be taken away, on-demand nodes not."""
    return "spot" if offer.spot else "on-demand"


def machines(estimate: Estimate) -> str:
    """Nodes x GPUs of each."""
    offer = estimate.offer
    return f"{estimate.num_nodes} x {offer.gpus_per_node}x{offer.accelerator}"


def place(offer: Offer) -> str:
    """The zone where it names its region, else both."""
    if offer.zone is None:
        return offer.region
    return offer.zone if offer.zone.startswith(offer.region) else f"{offer.region}/{offer.zone}"


def bill(best: Estimate) -> str:
    """Where the expected dollars go, the largest first."""
    total = float(best.total_usd) or 1.0
    lines = sorted(best.lines, key=lambda line: line.usd, reverse=True)
    shown = [line for line in lines if float(line.usd) / total >= SMALLEST_SHOWN_SHARE]
    parts = [f"{line.name} {dollars(line.usd)}" for line in shown]
    rest = best.total_usd - sum(line.usd for line in shown)
    if rest:
        parts.append(f"other {dollars(rest)}")
    return f"expected bill {dollars(best.total_usd)}: {', '.join(parts)}"


def worst_case(plan: Plan, best: Estimate) -> str:
    """The dearest that the estimate can come to, and what stops it."""
    dear = f"Worst case: {dollars(best.worst_case_usd)} at the worst-case price and with many preemptions"
    if best.worst_case_usd > plan.budget_usd:
        return f"{dear}, but the cap of {dollars(plan.budget_usd)} stops the run before, with a checkpoint."
    return f"{dear}, under the cap of {dollars(plan.budget_usd)}."


def shortfall(plan: Plan, best: Estimate) -> str | None:
    """What a budget that is too small for the whole run buys; None where it is enough."""
    share = best.num_tokens / plan.workload.num_tokens
    if not best.within_deadline and plan.deadline_hours is not None:
        wanted = duration(best.hours * SECONDS_PER_HOUR)
        return (
            f"the whole run takes about {wanted}; the deadline of {duration(plan.deadline_hours * SECONDS_PER_HOUR)}, "
            f"under a cap of {dollars(plan.budget_usd)}, leaves {100 * share:.0f} % of its tokens."
        )
    if best.within_budget:
        return None
    return (
        f"{dollars(plan.budget_usd)} pays for about {100 * share:.0f} % of the run, which is expected to cost "
        f"{dollars(best.total_usd)}; it stops at the cap with a checkpoint, and `slm resume` continues it with a "
        "higher cap."
    )


def as_played(plan: Plan, best: Estimate) -> str | None:
    """What stands behind a plan of the local backend; None for real clouds."""
    if plan.emulation is None:
        return None
    scale = plan.emulation.time_scale
    real = duration(best.hours * SECONDS_PER_HOUR / scale)
    return (
        f"this machine simulates the cloud: it trains, and is billed like the offer with {scale:g} billed seconds in "
        "each "
        f"real one, so that the run takes about {real} here"
    )


def reasons(plan: Plan) -> list[str]:
    """Why the first wins: its bill, and how it stands beside the others."""
    best = winner(plan)
    found = [bill(best)]
    offer = best.offer
    if offer.spot and offer.on_demand_usd_per_hour:
        share = 100 * float(offer.usd_per_hour / offer.on_demand_usd_per_hour)
        lost = f"{best.expected_preemptions:.1f} preemptions are expected and included in the bill"
        found.append(f"spot costs {share:.0f} % of the same node on demand; {lost}")
    others = [
        ("next offer", next(iter(plan.ranked[1:]), None)),
        ("best on demand", next((estimate for estimate in plan.ranked[1:] if not estimate.offer.spot), None)),
        ("fastest", min(plan.ranked, key=lambda estimate: estimate.hours)),
    ]
    seen = {best.offer.offer_id}
    for name, other in others:
        if other is None or other.offer.offer_id in seen:
            continue
        seen.add(other.offer.offer_id)
        found.append(f"{name}: {cluster(other)}, {beside(best, other)}")
    refused = cheaper_unguarded(plan, best)
    if refused is not None:
        found.append(f"refused: {cluster(refused)}, {beside(best, refused)}: {UNGUARDED}")
    return [*found, *guard_lines(plan, best)]


def beside(best: Estimate, other: Estimate) -> str:
    """Another offer's dollars and hours, and how many times the winner's they are."""
    cost = f"{dollars(other.total_usd)} ({times(float(other.total_usd), float(best.total_usd))})"
    return f"{cost} in {duration(other.hours * SECONDS_PER_HOUR)} ({times(other.hours, best.hours)})"


def times(value: float, base: float) -> str:
    """1.75 x."""
    return f"{value / base:.3g} x" if base else "-"


def footnotes(plan: Plan, prices: Prices, top: int) -> list[str]:
    """What the table leaves out."""
    work = plan.workload
    notes = [
        f"{count(work.num_params)} parameters, {count(work.num_tokens)} tokens, {work.num_steps} steps; ranked by "
        f"{RANKED_BY[plan.objective]}"
    ]
    shown_over = any(not estimate.within_budget for estimate in plan.ranked[:top])
    if shown_over:
        notes.append(f"! costs more than the budget of {dollars(plan.budget_usd)}; such offers are listed last")
    if any(not estimate.within_deadline for estimate in plan.ranked[:top]):
        notes.append(f"? takes longer than the deadline of {duration((plan.deadline_hours or 0) * SECONDS_PER_HOUR)}")
    played = as_played(plan, winner(plan))
    if played is not None:
        notes.append(played)
    if plan.rejected:
        total = len(plan.rejected) + len(plan.ranked)
        named = [f"{reason} ({number})" for reason, number in rejections(plan)]
        more = [f"{len(named) - MAX_REASONS} other reasons"] if len(named) > MAX_REASONS else []
        notes.append(f"rejected {len(plan.rejected)} of {total} offers: {'; '.join(named[:MAX_REASONS] + more)}")
    return [*notes, *price_notes(prices)]


def price_notes(prices: Prices) -> list[str]:
    """Where the prices come from, what could not be read, and what was not believed."""
    known = prices.dates()
    span = f"from {known[0]} to {known[1]}" if known else "without dates"
    undated = f", {prices.num_undated} undated" if known and prices.num_undated else ""
    skipped = f"; {prices.num_skipped} rows were skipped" if prices.num_skipped else ""
    notes = [f"{prices.source}: {len(prices.offers)} offers with prices {span}{undated}{skipped}"]
    if prices.unread:
        clouds = ", ".join(catalog.cloud for catalog in prices.unread)
        notes.append(f"not read at the last refresh: {clouds}; `slm offers --refresh` tries again and says why")
    if prices.problem is not None:
        notes.append(prices.problem)
    return notes


def outlook(plan: Plan, best: Estimate, belief: Belief) -> list[str]:
    """How fast, how good: with intervals, and what they rest on."""
    low, high = best.tokens_per_second_interval
    basis = BASIS[best.throughput.basis]
    if plan.emulation is not None:
        processor = "timed" if plan.emulation.is_timed else "not timed yet, which `slm launch` does"
        basis = f"a model of this machine's processor, {processor}"
    spread = (
        "measured by an earlier run on this machine" if low == high else (f"({count(low)} to {count(high)}); {basis}")
    )
    own = plan.seen.measured_by.get(best.offer.accelerator) if plan.emulation is None else None
    by_run = "" if own is None else f", by run {own}"
    notes = [f"{count(best.tokens_per_second)} tokens/s {spread}{by_run}", layout(best), *lessons(plan, best)]
    predicted = known_loss(best)
    if predicted is None:
        work = best.workload.with_tokens(max(1, best.num_tokens))
        return [*notes, f"no loss is predicted: {unknown_because(work, best.predicted)}"]
    bits = "" if predicted.bits_per_byte is None else f", {predicted.bits_per_byte:.3f} bits per byte"
    band = f"80 %: {predicted.low_nats:.2f} to {predicted.high_nats:.2f}"
    notes.append(f"predicted loss {predicted.nats_per_token:.2f} nats per token ({band}){bits}; law {predicted.law}")
    bands = score_bands(best.workload.with_tokens(best.num_tokens), predicted, belief.corpus)
    return [*notes, *(score(band) for band in bands)]


def layout(best: Estimate) -> str:
    """How the run is spread over its devices, and in which precision it computes."""
    chosen = best.layout
    recomputed = ", activations recomputed" if chosen.activation_checkpointing else ""
    return (
        f"layout: {chosen.sharding}, {plural(chosen.world_size, 'device')}, micro-batch {chosen.micro_batch_size}, "
        f"{chosen.grad_accumulation} pass{'' if chosen.grad_accumulation == 1 else 'es'} a step, "
        f"{chosen.precision}{recomputed}"
    )


def lessons(plan: Plan, best: Estimate) -> list[str]:
    """What our own runs say about losing such nodes, and why they say nothing."""
    if plan.emulation is not None:
        return []
    notes = [] if plan.seen.problem is None else [plan.seen.problem]
    seen = plan.seen.losses_on(best.offer)
    if seen is not None:
        notes.append(
            f"our own runs had {seen.losses} preemptions in {seen.node_hours:.1f} node-hours of such nodes, which "
            "corrects the published rate"
        )
    started = plan.seen.starts.get(best.offer.cloud)
    if started is not None:
        notes.append(f"start-up is {started:.0f} s, as our own runs measured it at {best.offer.cloud}")
    return notes


def score(band: ScoreBand) -> str:
    """What a benchmark will say, or why nobody knows."""
    if band.low is None or band.high is None:
        return f"{band.benchmark}: unknown, {band.basis}"
    return f"{band.benchmark}: {band.low:.2f} to {band.high:.2f}, from {plural(band.num_rows, 'published run')}"


# ---------------------------------------------------------------- table


def offers_table(plan: Plan, top: int, console: Console) -> Table:
    """The best offers; where they do not fit, the columns that decide least are left out."""
    columns = ["cloud", "region", "nodes x GPUs", "kind", "$/h", "tokens/s", "hours", "total $", "$/param"]
    columns += ["loss", "lost"]
    shown = offer_table(plan, top, columns)
    for least in ("lost", "tokens/s", "$/h", "loss", "region"):
        if console.measure(shown, options=console.options.update(width=UNLIMITED)).maximum <= console.width:
            break
        columns.remove(least)
        shown = offer_table(plan, top, columns)
    return shown


def offer_table(plan: Plan, top: int, columns: Sequence[str]) -> Table:
    """The best offers with these columns."""
    figures = ("$/h", "tokens/s", "hours", "total $", "$/param", "loss", "lost")
    heads = {"loss": "loss (nats)", "lost": "preempt."}
    shown = table(
        *[heads.get(name, name) for name in columns], right=[heads.get(name, name) for name in figures], gap=1
    )
    for rank, estimate in enumerate(plan.ranked[:top]):
        cells = row(estimate)
        shown.add_row(*[cells[name] for name in columns], style="bold" if rank == 0 else "")
    return shown


def mark(estimate: Estimate) -> str:
    """! for what costs more than the budget, ? for what takes longer than the deadline."""
    return ("" if estimate.within_budget else "!") + ("" if estimate.within_deadline else "?")


def row(estimate: Estimate) -> dict[str, str]:
    """One offer's cells by column."""
    offer = estimate.offer
    where = place(offer)
    predicted = known_loss(estimate)
    return {
        "cloud": offer.cloud,
        "region": where if len(where) <= WIDEST_PLACE else where[: WIDEST_PLACE - 1] + "…",
        "nodes x GPUs": machines(estimate),
        "kind": kind(offer),
        "$/h": f"{estimate.usd_per_hour:.2f}",
        "tokens/s": count(estimate.tokens_per_second),
        "hours": f"{estimate.hours:.3g}",
        "total $": f"{estimate.total_usd:.2f}" + mark(estimate),
        "$/param": usd_per_param(estimate.usd_per_param),
        "loss": UNKNOWN if predicted is None else f"{predicted.nats_per_token:.2f}",
        "lost": f"{estimate.expected_preemptions:.1f}",
    }

"""A plan for people, in full or in short, and as facts for programs."""

from __future__ import annotations

import math
from datetime import date
from typing import TYPE_CHECKING, Any

from orchestrator.figures import count, dollars, duration, plural, usd_per_param
from orchestrator.planning import Prices, day_of, rejections, winner
from orchestrator.render import WIDTH_WITHOUT_TERMINAL, bullets, following, say, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cost.offers import Offer
    from cost.planner import Estimate, Plan
    from tasks.recipe import Recipe

SECONDS_PER_HOUR = 3600
ANYWHERE = "any"
"""The region of an offer whose source names none."""
WIDEST_PLACE = 16
MAX_REASONS = 4
SMALLEST_SHOWN_SHARE = 0.01
"""Lines of the bill below this share of it are summed up as "other"."""


def full(plan: Plan, prices: Prices, console: Console, *, top: int, today: date, next_command: str) -> None:
    """The answer, the best offers, why the first wins, what was rejected, the worst case, the next command."""
    best = winner(plan)
    say(console, answer(best, prices, today), "")
    say(console, offers_table(plan, top, console.width), "")
    bullets(console, [*reasons(plan), *footnotes(plan, prices, top)])
    say(console, "", worst_case(plan, best))
    following(console, next_command)


def short(plan: Plan, prices: Prices, console: Console, *, today: date) -> None:
    """What `launch` shows before it asks: the choice, its bill, the worst case, what the budget does not cover."""
    best = winner(plan)
    say(console, answer(best, prices, today))
    lines = [bill(best), as_played(plan, best), worst_case(plan, best)]
    bullets(console, [line for line in lines if line is not None])
    missing = shortfall(plan, best)
    if missing is not None:
        say(console, f"Warning: {missing}")


# ---------------------------------------------------------------- sentences


def answer(best: Estimate, prices: Prices, today: date) -> str:
    """What to rent, what it costs, and how old that price is: one line."""
    cost = f"{dollars(best.total_usd)}, {usd_per_param(best.usd_per_param)} $/param"
    return f"Cheapest: {cluster(best)}: {cost} (prices: {prices_age(best, prices, today)})"


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


def prices_age(best: Estimate, prices: Prices, today: date) -> str:
    """Which table, and how old the winner's own price is."""
    day = day_of(best.offer)
    if day is None:
        return f"{prices.source}, undated"
    return f"{prices.source}, {plural((today - day).days, 'day')} old"


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
    dear = f"Worst case: {dollars(best.worst_case_usd)} at the highest price and with unlucky preemptions"
    if best.worst_case_usd > plan.budget_usd:
        return f"{dear}, but the cap of {dollars(plan.budget_usd)} stops the run before, with a checkpoint."
    return f"{dear}, under the cap of {dollars(plan.budget_usd)}."


def shortfall(plan: Plan, best: Estimate) -> str | None:
    """What a budget that is too small for the whole run buys; None where it is enough."""
    if best.within_budget:
        return None
    share = best.num_tokens / plan.workload.num_tokens
    return (
        f"{dollars(plan.budget_usd)} pays for about {100 * share:.0f} % of the run, which is expected to cost "
        f"{dollars(best.total_usd)}; it stops at the cap with a checkpoint, and `slm resume` goes on with a higher one."
    )


def as_played(plan: Plan, best: Estimate) -> str | None:
    """What stands behind a plan of the local backend; None for real clouds."""
    if plan.emulation is None:
        return None
    scale = plan.emulation.time_scale
    real = duration(best.hours * SECONDS_PER_HOUR / scale)
    return (
        f"this machine plays the cloud: it trains, and is billed like the offer with {scale:g} billed seconds in each "
        f"real one, so that the run takes about {real} here"
    )


def reasons(plan: Plan) -> list[str]:
    """Why the first wins: its bill, and how it stands beside the others."""
    best = winner(plan)
    found = [bill(best)]
    offer = best.offer
    if offer.spot and offer.on_demand_usd_per_hour:
        share = 100 * float(offer.usd_per_hour / offer.on_demand_usd_per_hour)
        lost = f"{best.expected_preemptions:.1f} preemptions are expected and part of the bill"
        found.append(f"spot costs {share:.0f} % of the same node on demand; {lost}")
    others = [
        ("next offer", next(iter(plan.ranked[1:]), None)),
        ("best on demand", next((one for one in plan.ranked[1:] if not one.offer.spot), None)),
        ("fastest", min(plan.ranked, key=lambda one: one.hours)),
    ]
    seen = {best.offer.offer_id}
    for name, other in others:
        if other is None or other.offer.offer_id in seen:
            continue
        seen.add(other.offer.offer_id)
        found.append(f"{name}: {cluster(other)}, {beside(best, other)}")
    return found


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
        "expected dollars of the whole run per parameter"
    ]
    shown_over = any(not one.within_budget for one in plan.ranked[:top])
    if shown_over:
        notes.append(f"! costs more than the budget of {dollars(plan.budget_usd)}; such offers come last")
    played = as_played(plan, winner(plan))
    if played is not None:
        notes.append(played)
    if not is_law_in_range(plan, winner(plan)):
        notes.append("no loss is predicted: the law does not reach models and runs as small as this")
    if plan.rejected:
        total = len(plan.rejected) + len(plan.ranked)
        named = [f"{reason} ({number})" for reason, number in rejections(plan)]
        more = [f"{len(named) - MAX_REASONS} other reasons"] if len(named) > MAX_REASONS else []
        notes.append(f"rejected {len(plan.rejected)} of {total} offers: {'; '.join(named[:MAX_REASONS] + more)}")
    known = prices.dates()
    span = f"from {known[0]} to {known[1]}" if known else "without dates"
    undated = f", {prices.num_undated} undated" if known and prices.num_undated else ""
    skipped = f"; {prices.num_skipped} rows were no offers" if prices.num_skipped else ""
    notes.append(f"{prices.source}: {len(prices.offers)} offers with prices {span}{undated}{skipped}")
    return notes


# ---------------------------------------------------------------- table


def offers_table(plan: Plan, top: int, width: int) -> Table:
    """The best offers; on a narrow terminal the columns that decide least are left out."""
    columns = ["cloud", "region", "nodes x GPUs", "kind", "$/h", "tokens/s", "hours", "total $", "$/param"]
    columns += ["loss", "lost"]
    for least in ("lost", "tokens/s", "$/h", "loss"):
        if width < WIDTH_WITHOUT_TERMINAL and table_width(len(columns)) > width:
            columns.remove(least)
    figures = ("$/h", "tokens/s", "hours", "total $", "$/param", "loss", "lost")
    heads = {"loss": "loss (nats)", "lost": "preempt."}
    shown = table(
        *[heads.get(name, name) for name in columns],
        right=[heads.get(name, name) for name in figures],
        gap=1 if width <= WIDTH_WITHOUT_TERMINAL else 2,
    )
    for rank, estimate in enumerate(plan.ranked[:top]):
        cells = row(plan, estimate)
        shown.add_row(*[cells[name] for name in columns], style="bold" if rank == 0 else "")
    return shown


def table_width(num_columns: int) -> int:
    """Characters that so many columns need, on average."""
    return 9 * num_columns


def row(plan: Plan, estimate: Estimate) -> dict[str, str]:
    """One offer's cells by column."""
    offer = estimate.offer
    where = place(offer)
    predicted = estimate.predicted.nats_per_token
    return {
        "cloud": offer.cloud,
        "region": where if len(where) <= WIDEST_PLACE else where[: WIDEST_PLACE - 1] + "…",
        "nodes x GPUs": machines(estimate),
        "kind": kind(offer),
        "$/h": f"{estimate.usd_per_hour:.2f}",
        "tokens/s": count(estimate.tokens_per_second),
        "hours": f"{estimate.hours:.3g}",
        "total $": f"{estimate.total_usd:.2f}" + ("" if estimate.within_budget else "!"),
        "$/param": usd_per_param(estimate.usd_per_param),
        "loss": f"{predicted:.2f}" if is_law_in_range(plan, estimate) else "-",
        "lost": f"{estimate.expected_preemptions:.1f}",
    }


def is_law_in_range(plan: Plan, estimate: Estimate) -> bool:
    """A loss above that of guessing evenly means that the law was never fitted to anything like this."""
    return estimate.predicted.nats_per_token < math.log(plan.workload.vocab_size)


# ---------------------------------------------------------------- facts


def facts(plan: Plan, prices: Prices, recipe: Recipe, *, top: int, next_command: str) -> dict[str, Any]:
    """What `--json` prints; dollars, billed hours, real tokens per second, nats per token."""
    known = prices.dates()
    best = winner(plan)
    return {
        "recipe": recipe.name,
        "num_params": plan.workload.num_params,
        "num_tokens": plan.workload.num_tokens,
        "budget_usd": plan.budget_usd,
        "within_budget": best.within_budget,
        "objective": plan.objective,
        "backend": recipe.backend,
        "time_scale": None if plan.emulation is None else plan.emulation.time_scale,
        "prices": {
            "source": prices.source,
            "num_offers": len(prices.offers),
            "num_skipped": prices.num_skipped,
            "num_undated": prices.num_undated,
            "oldest": known and known[0].isoformat(),
            "newest": known and known[1].isoformat(),
        },
        "best": estimate_facts(plan, best),
        "ranked": [estimate_facts(plan, one) for one in plan.ranked[:top]],
        "num_ranked": len(plan.ranked),
        "rejected": [{"offer": one.offer.offer_id, "reason": one.reason} for one in plan.rejected],
        "next": next_command,
    }


def estimate_facts(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    """One ranked offer."""
    predicted = estimate.predicted if is_law_in_range(plan, estimate) else None
    return {
        "offer": estimate.offer,
        "offer_id": estimate.offer.offer_id,
        "layout": estimate.layout,
        "usd_per_hour": estimate.usd_per_hour,
        "tokens_per_second": estimate.tokens_per_second,
        "tokens_per_second_interval": estimate.tokens_per_second_interval,
        "mfu": estimate.mfu,
        "peak_memory_gib": estimate.peak_memory_gib,
        "hours": estimate.hours,
        "train_hours": estimate.train_hours,
        "total_usd": estimate.total_usd,
        "lines": estimate.lines,
        "usd_per_param": estimate.usd_per_param,
        "worst_case_usd": estimate.worst_case_usd,
        "expected_preemptions": estimate.expected_preemptions,
        "checkpoint_interval_seconds": estimate.checkpoint_interval_seconds,
        "predicted_loss_nats": predicted and predicted.nats_per_token,
        "predicted_loss_interval_nats": predicted and (predicted.low_nats, predicted.high_nats),
        "within_budget": estimate.within_budget,
    }

"""Terminal output of `slm offers` and `slm gpus`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.figures import UNKNOWN
from orchestrator.planning.analysis import cheapest_by_gpu, usd_per_gpu_hour
from orchestrator.prices.table import age
from orchestrator.views.plan import kind, place, price_notes
from orchestrator.views.runs import bullets, following, say, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from rich.console import Console

    from cost.market.hardware import Accelerator
    from cost.market.offers import Offer
    from orchestrator.prices.table import Prices

GIGA = 1e9
TERA = 1e12
WIDEST_PLACE = 20
WIDEST_DATE = 12


def offers(chosen: Sequence[Offer], prices: Prices, console: Console, *, top: int, now: datetime) -> None:
    """The cheapest GPU-hours, with the day and the source of each price."""
    ranked = sorted(chosen, key=lambda offer: (usd_per_gpu_hour(offer), offer.offer_id))
    if not ranked:
        tell(console, f"No offer matches (prices: {age(prices, None, now)})")
        following(console, "slm offers")
        return
    best = ranked[0]
    tell(
        console,
        f"Cheapest of {len(ranked)}: {best.accelerator} at {best.cloud} {place(best)} {kind(best)}, "
        f"{usd_per_gpu_hour(best):.3f} $/GPU-hour (prices: {age(prices, best, now)})",
    )
    heads = ("cloud", "region", "GPUs", "GiB", "kind", "$/GPU-h", "$/h", "on-demand $/h", "as of")
    shown = table(*heads, right=("GiB", "$/GPU-h", "$/h", "on-demand $/h"))
    for estimate in ranked[:top]:
        where, on_demand = place(estimate), estimate.on_demand_usd_per_hour
        shown.add_row(
            estimate.cloud,
            where if len(where) <= WIDEST_PLACE else where[: WIDEST_PLACE - 1] + "…",
            f"{estimate.gpus_per_node}x{estimate.accelerator}",
            f"{estimate.gpu_memory_gib:.0f}",
            kind(estimate),
            f"{usd_per_gpu_hour(estimate):.3f}",
            f"{estimate.usd_per_hour:.2f}",
            UNKNOWN if on_demand is None else f"{on_demand:.2f}",
            estimate.as_of if len(estimate.as_of) <= WIDEST_DATE else estimate.as_of[: WIDEST_DATE - 1] + "…",
        )
    say(console, "", shown, "")
    more = [f"{len(ranked) - top} more offers; --top {len(ranked)} shows all"] if len(ranked) > top else []
    sources = ", ".join(sorted({estimate.source for estimate in ranked[:top]}))
    bullets(console, [*more, f"price sources: {sources}", *price_notes(prices)])
    following(console, "slm plan --budget 100 --params max")


def gpus(cards: Sequence[Accelerator], prices: Prices, console: Console, *, now: datetime) -> None:
    """Peaks, memory, links, cheapest prices, and where each figure comes from."""
    cheapest = cheapest_by_gpu(prices.offers)
    tell(
        console,
        f"{len(cards)} GPUs; dense tensor-core peaks, prices per GPU-hour (prices: {age(prices, None, now)})",
    )
    heads = ("GPU", "bf16 TFLOP/s", "fp8", "GiB", "GB/s", "link GB/s", "watts", "spot $", "on-demand $")
    shown = table(*heads, right=heads[1:])
    for card in cards:
        spot, on_demand = cheapest.get(card.name, (None, None))
        link = card.nvlink_bytes_per_second or card.pcie_bytes_per_second
        shown.add_row(
            card.name,
            tera(card.bf16_flops if card.native_bf16 else None),
            tera(card.fp8_flops),
            f"{card.memory_gib:g}",
            f"{card.memory_bytes_per_second / GIGA:.0f}",
            f"{link / GIGA:.0f} {'NVLink' if card.nvlink_bytes_per_second else 'PCIe'}",
            UNKNOWN if card.tdp_watts is None else f"{card.tdp_watts:.0f}",
            price(spot),
            price(on_demand),
        )
    say(console, "", shown, "", "Sources:")
    bullets(console, [f"{card.name}: {card.sources}" + contradiction(card) for card in cards])
    following(console, f"slm offers --gpu {cards[0].name}")


def tera(flops: float | None) -> str:
    """TFLOP/s."""
    return UNKNOWN if flops is None else f"{flops / TERA:g}"


def price(offer: Offer | None) -> str:
    """Dollars per GPU-hour."""
    return UNKNOWN if offer is None else f"{usd_per_gpu_hour(offer):.2f}"


def contradiction(card: Accelerator) -> str:
    """What other tables say instead."""
    return f"; not used: {card.conflicts}" if card.conflicts else ""

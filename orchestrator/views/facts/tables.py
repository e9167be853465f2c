"""Facts of `slm offers` and `slm gpus` for `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.planning.analysis import cheapest_by_gpu, usd_per_gpu_hour
from orchestrator.views.facts.plan import offer_facts, price_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cost.market.hardware import Accelerator
    from cost.market.offers import Offer
    from orchestrator.prices.table import Prices


def offers_facts(chosen: Sequence[Offer], prices: Prices) -> dict[str, Any]:
    """What `slm offers --json` prints: all that match, cheapest GPU-hour first."""
    ranked = sorted(chosen, key=lambda offer: (usd_per_gpu_hour(offer), offer.offer_id))
    return {
        "prices": price_facts(prices),
        "offers": [{**offer_facts(estimate), "usd_per_gpu_hour": usd_per_gpu_hour(estimate)} for estimate in ranked],
    }


def gpus_facts(cards: Sequence[Accelerator], prices: Prices) -> dict[str, Any]:
    """What `slm gpus --json` prints."""
    cheapest = cheapest_by_gpu(prices.offers)

    def usd(offer: Offer | None) -> Any:
        return None if offer is None else usd_per_gpu_hour(offer)

    def facts(card: Accelerator) -> dict[str, Any]:
        spot, on_demand = cheapest.get(card.name, (None, None))
        return {
            "name": card.name,
            "architecture": card.architecture,
            "compute_capability": card.compute_capability,
            "bf16_flops": card.bf16_flops if card.native_bf16 else None,
            "fp16_flops": card.fp16_flops,
            "fp8_flops": card.fp8_flops,
            "fp32_flops": card.fp32_flops,
            "memory_gib": card.memory_gib,
            "memory_bytes_per_second": card.memory_bytes_per_second,
            "nvlink_bytes_per_second": card.nvlink_bytes_per_second,
            "pcie_bytes_per_second": card.pcie_bytes_per_second,
            "tdp_watts": card.tdp_watts,
            "spot_usd_per_gpu_hour": usd(spot),
            "on_demand_usd_per_gpu_hour": usd(on_demand),
            "sources": card.sources,
            "conflicts": card.conflicts,
        }

    return {"prices": price_facts(prices), "gpus": [facts(card) for card in cards]}

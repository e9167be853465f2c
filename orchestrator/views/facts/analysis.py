"""Facts of `slm estimate`, `slm frontier` and `slm simulate` for `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cost.market.hardware import BYTES_PER_GIB
from cost.plan.policy import DEFAULT
from orchestrator.views.facts.plan import estimate_facts, model_facts, offer_facts, placement_facts, price_facts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal
    from pathlib import Path

    from cost.plan.frontier import Point
    from cost.plan.planner import Plan
    from cost.plan.simulate import Distribution
    from orchestrator.planning.analysis import MachineEstimate, Simulated
    from orchestrator.prices.table import Prices


def machine_facts(made: MachineEstimate, prices: Prices) -> dict[str, Any]:
    """What `slm estimate --json` prints."""
    placed = made.placement
    return {
        "name": made.name,
        "gpu": made.gpu,
        "gpus_per_node": made.gpus_per_node,
        "num_nodes": made.num_nodes,
        "model": model_facts(made.workload),
        **placement_facts(placed),
        "tokens_per_second": placed.tokens_per_second,
        "tokens_per_second_interval": placed.throughput.interval,
        "mfu": placed.throughput.mfu,
        "step_seconds": placed.throughput.seconds_per_step,
        "gpu_memory_gib": placed.memory.capacity_bytes / BYTES_PER_GIB,
        "train_hours": made.hours,
        "prices": price_facts(prices),
        "measured_by_run_id": made.measured_by,
        "cheapest": [{"offer": offer_facts(offer), "train_usd": made.usd(offer)} for offer in made.cheapest],
    }


def frontier_facts(
    points: Sequence[Point], prices: Prices, budget_usd: Decimal, deadline_hours: float | None, plot: Path | None
) -> dict[str, Any]:
    """What `slm frontier --json` prints."""
    return {
        "budget_usd": budget_usd,
        "deadline_hours": deadline_hours,
        "prices": price_facts(prices),
        "points": [
            {
                "model": model_facts(point.workload),
                "is_mixture": point.is_mixture,
                "has_lowest_loss": point.best,
                "estimate": estimate_facts(point.estimate),
            }
            for point in points
        ],
        "plot": plot,
    }


def simulation_facts(done: Simulated, plan: Plan, name: str, prices: Prices, plot: Path | None) -> dict[str, Any]:
    """What `slm simulate --json` prints."""
    return {
        "recipe": name,
        "num_tokens": plan.workload.num_tokens,
        "budget_usd": plan.budget_usd,
        "deadline_hours": plan.deadline_hours,
        "market": done.market,
        "interruptions_per_node_hour": done.hazard.per_node_hour,
        "hazard_source": done.hazard.source,
        "num_zones": done.num_zones,
        "num_draws": done.simulation.num_runs,
        "seed": done.simulation.seed,
        "prices": price_facts(prices),
        "estimate": estimate_facts(done.estimate),
        "default_policy": DEFAULT,
        "policies": {name: policy_facts(policy) for name, policy in done.simulation.policies.items()},
        "plot": plot,
    }


def policy_facts(policy: Distribution) -> dict[str, Any]:
    """Quantiles of one policy over all draws."""
    return {
        "total_usd": policy.usd,
        "hours": policy.hours,
        "num_tokens": policy.tokens,
        "num_preemptions": policy.preemptions,
        "wasted_share": policy.wasted_share,
        "finished_share": policy.finished_share,
    }

"""Plans, offers and prices as facts for `--json`; docs/json.md describes every key, and a test holds it to that.

Dollars are numbers, hours billed hours, tokens per second real ones, losses nats per token. What is unknown is null.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cost.outcome.scores import score_bands
from cost.outcome.validity import unknown_because
from cost.plan.plans import known_loss
from orchestrator.planning.protection import provider_profile, unguarded_usd
from orchestrator.planning.recipe_plan import Belief, guard_refusal, winner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cost.market.offers import Offer
    from cost.outcome.scaling_law import Prediction
    from cost.performance.layouts import Placement
    from cost.performance.workload import Workload
    from cost.plan.plans import Chance, Estimate, Plan, Seen
    from orchestrator.prices.table import Prices
    from tasks.recipe.schema import Recipe


def plan_facts(
    plan: Plan,
    prices: Prices,
    recipe: Recipe,
    belief: Belief | None = None,
    chance: Chance | None = None,
    *,
    top: int,
    next_command: str,
) -> dict[str, Any]:
    """What `slm plan RECIPE --json` prints."""
    best = winner(plan)
    return {
        "recipe": recipe.name,
        "num_params": plan.workload.num_params,
        "num_tokens": plan.workload.num_tokens,
        "model": model_facts(plan.workload),
        "budget_usd": plan.budget_usd,
        "deadline_hours": plan.deadline_hours,
        "within_budget": best.within_budget,
        "within_deadline": best.within_deadline,
        "objective": plan.objective,
        "backend": recipe.backend,
        "time_scale": None if plan.emulation is None else plan.emulation.time_scale,
        "law": {"name": plan.law.name, "source": plan.law.source},
        "prices": price_facts(prices),
        "best": estimate_facts(best),
        "guard": guard_facts(plan, best),
        "chance": chance_facts(chance),
        "measurements": measurement_facts(plan.seen),
        "scores": score_facts(best, belief or Belief()),
        "ranked": [estimate_facts(estimate) for estimate in plan.ranked[:top]],
        "num_ranked": len(plan.ranked),
        "rejected": rejected_facts(plan),
        "next_command": next_command,
    }


def price_facts(prices: Prices) -> dict[str, Any]:
    """Where the prices come from and how old they are."""
    known = prices.dates()
    return {
        "source": prices.source,
        "read_at": prices.read_at,
        "num_offers": len(prices.offers),
        "num_skipped": prices.num_skipped,
        "num_undated": prices.num_undated,
        "oldest_date": known and known[0].isoformat(),
        "newest_date": known and known[1].isoformat(),
        "unread_clouds": prices.unread,
        "enabled_clouds": prices.enabled,
        "problem": prices.problem,
    }


def measurement_facts(seen: Seen) -> dict[str, Any]:
    """Measurements of our own runs that the plan used."""
    return {
        "throughput": [{"accelerator": name, "run_id": run} for name, run in sorted(seen.measured_by.items())],
        "spot": [
            {
                "cloud": sighting.cloud,
                "accelerator": sighting.accelerator,
                "gpus_per_node": sighting.gpus_per_node,
                "num_preemptions": sighting.losses,
                "node_hours": sighting.node_hours,
            }
            for sighting in seen.sightings
        ],
        "problem": seen.problem,
        "startup": [{"cloud": cloud, "startup_seconds": seconds} for cloud, seconds in sorted(seen.starts.items())],
    }


def guard_facts(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    """What would end the nodes of the best offer without us."""
    profile = provider_profile(plan, estimate)
    return {
        "cloud": profile.name,
        "terminators": profile.terminators,
        "kill_latency_seconds": profile.kill_latency_seconds,
        "ttl": profile.ttl.value,
        "unguarded_seconds": profile.arm_seconds,
        "unguarded_usd": unguarded_usd(profile, estimate),
        "balance_only": profile.balance_only,
        "refusal": None if plan.emulation is not None else guard_refusal(estimate.offer),
    }


def chance_facts(chance: Chance | None) -> dict[str, Any] | None:
    """How often simulated runs of the best offer finish."""
    if chance is None:
        return None
    return {"finished_share": chance.finished_share, "num_draws": chance.num_runs}


def rejected_facts(plan: Plan) -> list[dict[str, Any]]:
    """Every offer that was not ranked."""
    return [{"offer_id": rejection.offer.offer_id, "reason": rejection.reason} for rejection in plan.rejected]


def model_facts(work: Workload) -> dict[str, Any]:
    """Shape and length of a run."""
    return {
        "num_params": work.num_params,
        "active_params": work.active_params,
        "num_tokens": work.num_tokens,
        "tokens_per_param": work.tokens_per_param,
        "num_steps": work.num_steps,
        "num_layers": work.num_layers,
        "width": work.width,
        "num_heads": work.num_heads,
        "num_kv_heads": work.num_kv_heads,
        "hidden_size": work.hidden_size,
        "vocab_size": work.vocab_size,
        "sequence_length": work.sequence_length,
        "global_batch_size": work.global_batch_size,
        "num_experts": work.num_experts,
        "num_active_experts": work.num_active_experts,
        "precision": work.precision,
        "total_flops": work.total_flops,
    }


def offer_facts(offer: Offer) -> dict[str, Any]:
    """One offer with its stable name."""
    return {
        "offer_id": offer.offer_id,
        "cloud": offer.cloud,
        "region": offer.region,
        "zone": offer.zone,
        "instance_type": offer.instance_type,
        "accelerator": offer.accelerator,
        "gpus_per_node": offer.gpus_per_node,
        "gpu_memory_gib": offer.gpu_memory_gib,
        "spot": offer.spot,
        "usd_per_hour": offer.usd_per_hour,
        "on_demand_usd_per_hour": offer.on_demand_usd_per_hour,
        "as_of": offer.as_of,
        "source": offer.source,
    }


def placement_facts(placed: Placement) -> dict[str, Any]:
    """A layout, what it needs and how fast it is."""
    return {
        "layout": placed.layout,
        "bound_by": placed.throughput.bound_by,
        "throughput_basis": placed.throughput.basis,
        "step_parts_seconds": dict(placed.throughput.seconds_by_part),
        "peak_memory_gib": placed.memory.total_gib,
        "memory_parts_bytes": dict(placed.memory.by_kind),
    }


def estimate_facts(estimate: Estimate) -> dict[str, Any]:
    """One ranked offer; `lines` add up to `total_usd`."""
    predicted = known_loss(estimate)
    interval = estimate.checkpoint_interval_seconds
    return {
        "offer": offer_facts(estimate.offer),
        **placement_facts(estimate.placement),
        "usd_per_hour": estimate.usd_per_hour,
        "tokens_per_second": estimate.tokens_per_second,
        "tokens_per_second_interval": estimate.tokens_per_second_interval,
        "mfu": estimate.mfu,
        "billed_hours": estimate.hours,
        "train_hours": estimate.train_hours,
        "total_usd": estimate.total_usd,
        "bill": estimate.lines,
        "usd_per_param": estimate.usd_per_param,
        "usd_per_active_param": estimate.usd_per_active_param,
        "worst_case_usd": estimate.worst_case_usd,
        "expected_preemptions": estimate.expected_preemptions,
        "checkpoint_interval_seconds": interval if math.isfinite(interval) else None,
        "num_tokens": estimate.num_tokens,
        "predicted_loss_nats": predicted and predicted.nats_per_token,
        "predicted_loss_interval_nats": predicted and (predicted.low_nats, predicted.high_nats),
        "predicted_bits_per_byte": predicted and predicted.bits_per_byte,
        "loss_unknown_reason": loss_unknown_because(estimate),
        "within_budget": estimate.within_budget,
        "within_deadline": estimate.within_deadline,
    }


def loss_unknown_because(estimate: Estimate) -> str | None:
    """Why there is no predicted loss."""
    return unknown_because(estimate.workload.with_tokens(max(1, estimate.num_tokens)), estimate.predicted)


def score_facts(estimate: Estimate, belief: Belief) -> Sequence[Any]:
    """Bands of what the model will score; without numbers where they are unknown."""
    predicted: Prediction | None = known_loss(estimate)
    if predicted is None:
        return []
    return score_bands(estimate.workload.with_tokens(estimate.num_tokens), predicted, belief.corpus)

"""Facts of `slm plan --params` for `--json`: the chosen model, all sizes of the range, the offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cost.plan.plans import known_loss
from orchestrator.planning.recipe_plan import winner
from orchestrator.views.facts.plan import (
    chance_facts,
    estimate_facts,
    guard_facts,
    measurement_facts,
    model_facts,
    price_facts,
    rejected_facts,
    score_facts,
)

if TYPE_CHECKING:
    from cost.plan.frontier import ModelChoice
    from cost.plan.plans import Chance, Plan
    from orchestrator.planning.recipe_plan import Belief
    from orchestrator.prices.table import Prices


def sizes_facts(
    plan: Plan,
    choice: ModelChoice,
    prices: Prices,
    tokens_per_param: float,
    chosen_by: str,
    belief: Belief,
    chance: Chance | None = None,
    *,
    warning: str | None = None,
    top: int,
) -> dict[str, Any]:
    """What `slm plan --params --json` prints."""
    best = winner(plan)
    return {
        "objective": chosen_by,
        "budget_usd": plan.budget_usd,
        "deadline_hours": plan.deadline_hours,
        "tokens_per_param": tokens_per_param,
        "law": {"name": plan.law.name, "source": plan.law.source},
        "prices": price_facts(prices),
        "model": model_facts(plan.workload),
        "best": estimate_facts(best),
        "guard": guard_facts(plan, best),
        "warning": warning,
        "chance": chance_facts(chance),
        "measurements": measurement_facts(plan.seen),
        "scores": score_facts(best, belief),
        "sizes": [size_facts(plan) for plan in choice.plans],
        "ranked": [estimate_facts(estimate) for estimate in plan.ranked[:top]],
        "num_ranked": len(plan.ranked),
        "rejected": rejected_facts(plan),
    }


def size_facts(plan: Plan) -> dict[str, Any]:
    """One size of the range with its best offer."""
    best = plan.best
    predicted = None if best is None or best.num_tokens != plan.workload.num_tokens else known_loss(best)
    return {
        "num_params": plan.workload.num_params,
        "num_tokens": plan.workload.num_tokens,
        "is_affordable": plan.affordable,
        "offer_id": best and best.offer.offer_id,
        "num_nodes": best and best.num_nodes,
        "billed_hours": best and best.hours,
        "total_usd": best and best.total_usd,
        "usd_per_param": best and best.usd_per_param,
        "predicted_loss_nats": predicted and predicted.nats_per_token,
    }

"""Plans, frontiers and simulations as plain JSON values, for `--json`. Versioned; money is a decimal string.

Invariant: a reader of version N finds every field of version N with the same meaning; fields are only added
within a version. Dollars end in `_usd` or start with `usd_`, and add up exactly as strings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from cost.explain import Explanation
from cost.frontier import ModelChoice, Point
from cost.offers import Offer
from cost.planner import Estimate, Plan
from cost.simulate import Simulation

SCHEMA_VERSION = 1
"""Of every document here; raised when a field changes its meaning or goes."""


def plain(value: Any) -> Any:
    """Dataclasses to dictionaries, Decimal to str, an infinite or undefined float to None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        public = (f.name for f in dataclasses.fields(value) if not f.name.startswith("_"))
        return {name: plain(getattr(value, name)) for name in public}
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _header(schema: str) -> dict[str, Any]:
    return {"schema": schema, "version": SCHEMA_VERSION}


def as_json(plan: Plan, *, top: int | None = None) -> dict[str, Any]:
    """The whole plan, or its `top` estimates; rejected offers with their reasons always."""
    ranked = plan.ranked if top is None else plan.ranked[:top]
    return {
        **_header("slm.plan"),
        "objective": plan.objective,
        "budget_usd": str(plan.budget_usd),
        "deadline_hours": plan.deadline_hours,
        "affordable": plan.affordable,
        "workload": plain(plan.workload),
        "emulation": plain(plan.emulation),
        "law": {"name": plan.law.name, "source": plan.law.source},
        "num_ranked": len(plan.ranked),
        "best": None if plan.best is None else estimate_json(plan.best),
        "ranked": [estimate_json(one) for one in ranked],
        "rejected": [{"offer_id": one.offer.offer_id, "reason": one.reason} for one in plan.rejected],
    }


def offer_json(offer: Offer) -> dict[str, Any]:
    """An offer with its stable name."""
    fields: dict[str, Any] = plain(offer)
    return {"offer_id": offer.offer_id, **fields}


def estimate_json(one: Estimate) -> dict[str, Any]:
    """One estimate; `lines` add up to `total_usd`."""
    return {
        "offer": offer_json(one.offer),
        "layout": plain(one.layout),
        "num_nodes": one.num_nodes,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_second_interval": list(one.tokens_per_second_interval),
        "mfu": one.mfu,
        "bound_by": one.throughput.bound_by,
        "throughput_basis": one.throughput.basis,
        "seconds_by_part": plain(one.throughput.seconds_by_part),
        "peak_memory_gib": one.peak_memory_gib,
        "memory": plain(one.memory),
        "train_hours": one.train_hours,
        "hours": one.hours,
        "usd_per_hour": str(one.usd_per_hour),
        "lines": [plain(line) for line in one.lines],
        "total_usd": str(one.total_usd),
        "worst_case_usd": str(one.worst_case_usd),
        "usd_per_param": f"{one.usd_per_param:.6E}",
        "usd_per_active_param": f"{one.usd_per_active_param:.6E}",
        "expected_preemptions": one.expected_preemptions,
        "checkpoint_interval_seconds": one.checkpoint_interval_seconds,
        "num_tokens": one.num_tokens,
        "predicted_loss": plain(one.predicted),
        "within_budget": one.within_budget,
        "within_deadline": one.within_deadline,
    }


def choice_json(choice: ModelChoice) -> dict[str, Any]:
    """Every model of a range with its best plan, and which one was chosen (its position, or None)."""
    return {
        **_header("slm.models"),
        "chosen": next((index for index, plan in enumerate(choice.plans) if plan is choice.chosen), None),
        "models": [
            {
                "num_params": plan.workload.num_params,
                "num_tokens": plan.workload.num_tokens,
                "affordable": plan.affordable,
                "workload": plain(plan.workload),
                "best": None if plan.best is None else estimate_json(plan.best),
            }
            for plan in choice.plans
        ],
    }


def frontier_json(points: Sequence[Point], budget_usd: Decimal) -> dict[str, Any]:
    """Every point; `best` marks the lowest loss among dense models and among mixtures."""
    return {
        **_header("slm.frontier"),
        "budget_usd": str(budget_usd),
        "points": [
            {
                "num_params": point.workload.num_params,
                "num_active_params": point.workload.active_params,
                "mixture": point.is_mixture,
                "best": point.best,
                "workload": plain(point.workload),
                "estimate": estimate_json(point.estimate),
            }
            for point in points
        ],
    }


def simulation_json(simulation: Simulation) -> dict[str, Any]:
    """Quantiles by policy; the dollars of each draw are left to a plot."""
    return {
        **_header("slm.simulation"),
        "num_runs": simulation.num_runs,
        "seed": simulation.seed,
        "policies": plain(simulation.policies),
    }


def explanations_json(entries: Sequence[Explanation]) -> dict[str, Any]:
    """Every number with its formula, inputs and source."""
    return {**_header("slm.explanations"), "numbers": [plain(entry) for entry in entries]}

"""A plan as plain JSON values, for `--json` and for other programs. Versioned; money is a decimal string.

Invariant: a reader of version N finds every field of version N with the same meaning; fields are only added
within a version. Dollars end in `_usd` or start with `usd_`, and add up exactly as strings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from cost.offers import Offer
from cost.planner import Estimate, Plan

SCHEMA = "slm.plan"
SCHEMA_VERSION = 1


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


def as_json(plan: Plan, *, top: int | None = None) -> dict[str, Any]:
    """The whole plan, or its `top` estimates; rejected offers with their reasons always."""
    ranked = plan.ranked if top is None else plan.ranked[:top]
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
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

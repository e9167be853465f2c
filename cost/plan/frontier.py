"""The frontier: which model size, dense or mixture of experts, a budget should train.

Shapes come from one ladder that does not depend on the budget, so that more money never buys less. Invariant: every
point on the frontier is a whole plan that fits its budget, over the offers that are cheapest for the smallest, a middle
and the largest model of the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from cost.errors import UserError
from cost.market.offers import Offer
from cost.outcome.scaling_law import Prediction
from cost.performance.workload import Workload
from cost.plan.planner import Estimate, Market, Plan, make_plan

HEAD_SIZE = 128
WIDTH_PER_LAYER = 64
"""Aspect ratio of the ladder's shapes (nanochat's; GPT-3's lie between 60 and 130)."""
HIDDEN_MULTIPLE = 64
"""Hidden sizes are multiples of this, for the tensor cores."""
VOCAB_SIZE = 32_768
SEQUENCE_LENGTH = 2048
TOKENS_PER_STEP = 2**19
"""About half a million tokens (nanochat; the critical batch of models around 1B parameters)."""
LADDER_RATIO = 1.05
"""Each size of the ladder has this many times the parameters of the next smaller one."""
MANY_TOKENS_PER_PARAM = 2000.0
"""More than any budget here buys, so that the planner says how many it does buy."""
SHORTLISTED = 25
UNLIMITED_USD = Decimal(10) ** 12
SPENT_SHARE = Decimal("0.999")
"""Of the budget, so that rounding up to whole steps stays inside it."""
EXPERTS = 8
ACTIVE_EXPERTS = 2
EXPERT_SPEED = 0.75
"""Assumed: tokens per second of a mixture against a dense model of the same active FLOPs (routing, uneven experts)."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model trained on as many tokens as the budget buys on its best offer."""

    workload: Workload
    estimate: Estimate
    best: bool
    """Whether no other point of the same kind has a lower predicted loss."""

    @property
    def predicted(self) -> Prediction:
        """Of the estimate."""
        return self.estimate.predicted

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts."""
        return self.workload.num_experts > 1


def model_shape(
    num_params: float,
    *,
    tokens_per_param: float = 20.0,
    vocab_size: int = VOCAB_SIZE,
    sequence_length: int = SEQUENCE_LENGTH,
    num_experts: int = 1,
    num_active_experts: int = 1,
    precision: str = "bf16",
) -> Workload:
    """A Llama-like model with about this many parameters, width and depth in the usual proportion.

    Width is a multiple of the head size; the hidden size then takes up what is missing.
    """
    layers, width = _proportions(num_params, vocab_size, num_experts)
    fixed: dict[str, Any] = {
        "num_tokens": 0,
        "num_layers": layers,
        "width": width,
        "num_heads": width // HEAD_SIZE,
        "head_size": HEAD_SIZE,
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
        "global_batch_size": max(1, TOKENS_PER_STEP // sequence_length),
        "num_experts": num_experts,
        "num_active_experts": num_active_experts,
        "precision": precision,
    }
    without = Workload.from_shape(hidden_size=0, **fixed).num_params
    per_hidden = 3 * width * layers * num_experts
    hidden = max(1, round((num_params - without) / per_hidden / HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE
    shape = Workload.from_shape(hidden_size=hidden, **fixed)
    return shape.with_tokens(math.ceil(shape.num_params * tokens_per_param))


def _proportions(num_params: float, vocab_size: int, num_experts: int) -> tuple[int, int]:
    """Layers and width whose SwiGLU hidden size of 8/3 of the width comes nearest to the count."""

    def count(width: int) -> float:
        layers = max(1, round(width / WIDTH_PER_LAYER))
        return layers * width**2 * (4 + 8 * num_experts) + 2 * vocab_size * width

    widths = range(HEAD_SIZE, 16_385, HEAD_SIZE)
    width = min(widths, key=lambda width: abs(math.log(count(width) / num_params)))
    return max(1, round(width / WIDTH_PER_LAYER)), width


def ladder(low: float, high: float) -> list[float]:
    """Parameter counts from low to high, both included, each `LADDER_RATIO` times the one before."""
    if not 0 < low <= high:
        raise UserError(f"{low:g}..{high:g} is not a valid range of parameters; write for example 1.1e9..3e9.")
    rungs = math.floor(math.log(high / low) / math.log(LADDER_RATIO))
    counts = [low * LADDER_RATIO**rung for rung in range(rungs + 1)]
    return counts if math.isclose(counts[-1], high, rel_tol=1e-6) else [*counts, high]


def undominated(offers: Iterable[Offer]) -> tuple[Offer, ...]:
    """Offers that can be the cheapest: among offers that differ only in place and price, the cheapest."""
    best: dict[tuple[object, ...], Offer] = {}
    for offer in offers:
        key = (offer.cloud, offer.accelerator, offer.gpus_per_node, offer.gpu_memory_gib, offer.spot)
        known = best.get(key)
        if known is None or (offer.usd_per_hour, offer.offer_id) < (known.usd_per_hour, known.offer_id):
            best[key] = offer
    return tuple(best.values())


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Plans for every rung of a range, smallest model first, and the chosen one."""

    plans: tuple[Plan, ...]
    chosen: Plan | None
    """None where the budget does not even pay for the smallest model."""


def choose_model(
    offers: Sequence[Offer],
    *,
    low: float,
    high: float,
    budget_usd: Decimal,
    tokens_per_param: float = 20.0,
    objective: str = "params",
    **options: Any,
) -> ModelChoice:
    """The best model of a range of sizes that the budget trains on `tokens_per_param` tokens per parameter.

    `objective` is "params" for the largest, or one of the planner's. `options` go to `make_plan`.
    """
    if objective not in CHOICES:
        raise UserError(
            f"there is no objective '{objective}' for a range of models; choose one of {', '.join(CHOICES)}."
        )
    by: Any = "usd_per_param" if objective == "params" else objective
    shapes = [model_shape(count, tokens_per_param=tokens_per_param) for count in ladder(low, high)]
    cheapest = shortlist(undominated(offers), (shapes[0], shapes[len(shapes) // 2], shapes[-1]), by, options)
    plans = tuple(make_plan(shape, cheapest, budget_usd=budget_usd, objective=by, **options) for shape in shapes)
    paid = [(plan, plan.best) for plan in plans if plan.affordable and plan.best is not None]
    if not paid:
        return ModelChoice(plans, None)
    chosen, _ = min(paid, key=lambda pair: CHOICES[objective](*pair))
    return ModelChoice(plans, chosen)


CHOICES: Mapping[str, Callable[[Plan, Estimate], Any]] = {
    "params": lambda plan, _best: -plan.workload.num_params,
    "usd_per_param": lambda _plan, best: best.usd_per_param,
    "dollars": lambda _plan, best: best.total_usd,
    "hours": lambda _plan, best: best.hours,
    "loss": lambda _plan, best: best.predicted.nats_per_token,
}
"""Sort key: smallest for the model to choose."""


def shortlist(
    offers: Sequence[Offer], shapes: Sequence[Workload], objective: Any, options: dict[str, Any]
) -> tuple[Offer, ...]:
    """The `SHORTLISTED` best offers for each of some models, by prices alone: the budget must not change the choice."""
    kept: dict[str, Offer] = {}
    for shape in shapes:
        plan = make_plan(shape, offers, budget_usd=UNLIMITED_USD, objective=objective, **options)
        kept.update((estimate.offer.offer_id, estimate.offer) for estimate in plan.ranked[:SHORTLISTED])
    return tuple(kept.values())


def frontier(
    offers: Sequence[Offer],
    *,
    budget_usd: Decimal,
    sizes: Sequence[float],
    mixtures: bool = True,
    market: Market | None = None,
    **options: Any,
) -> tuple[Point, ...]:
    """For each size the loss that the whole budget buys, dense and as a mixture of experts; sizes are in total weights.

    Beyond the size with the lowest loss, more parameters no longer pay. Sizes that no offer can run are omitted.
    """
    believed = market or Market()
    spread = (min(sizes), math.sqrt(min(sizes) * max(sizes)), max(sizes))
    cheapest = shortlist(
        undominated(offers), [model_shape(size) for size in spread], "usd_per_param", {"market": believed, **options}
    )
    kinds = ((1, 1), (EXPERTS, ACTIVE_EXPERTS)) if mixtures else ((1, 1),)
    points: list[Point] = []
    for experts, active in kinds:
        found = [
            point
            for size in sizes
            if (point := _spend(size, experts, active, cheapest, budget_usd, believed, options)) is not None
        ]
        lowest = min((entry.predicted.nats_per_token for entry in found), default=math.inf)
        points.extend(replace(entry, best=entry.predicted.nats_per_token == lowest) for entry in found)
    return tuple(points)


def _spend(
    size: float,
    experts: int,
    active: int,
    offers: Sequence[Offer],
    budget_usd: Decimal,
    market: Market,
    options: dict[str, Any],
) -> Point | None:
    """Ask how many tokens the budget buys at this size, then plan exactly those."""
    shape = model_shape(size, tokens_per_param=MANY_TOKENS_PER_PARAM, num_experts=experts, num_active_experts=active)
    speed = EXPERT_SPEED if experts > 1 else 1.0
    wish = make_plan(shape, offers, budget_usd=budget_usd * SPENT_SHARE, speed=speed, market=market, **options).best
    if wish is None or wish.num_tokens < shape.tokens_per_step:
        return None
    bought = shape.with_tokens(wish.num_tokens)
    best = make_plan(bought, [wish.offer], budget_usd=budget_usd, speed=speed, market=market, **options).best
    if best is None or not best.within_budget:
        return None
    return Point(bought, best, best=False)

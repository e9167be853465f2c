"""The range of sizes that holds the largest model a budget pays for, when no range was given.

Invariant: the lower end can be paid for, and twice the lower end cannot. Costs grow with the size at a fixed number of
tokens per parameter, so doubling finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from cost.errors import UserError
from cost.market.offers import Offer
from cost.plan.frontier import model_shape, shortlist, undominated
from cost.plan.planner import make_plan

SMALLEST_PARAMS = 10e6
LARGEST_PARAMS = 1e13


def largest_range(
    offers: Sequence[Offer], *, budget_usd: Decimal, tokens_per_param: float, **options: Any
) -> tuple[float, float]:
    """Sizes, a factor of two apart, of which only the lower can be paid for; `options` go to `make_plan`.

    Raises:
        UserError: Not even the smallest model can be paid for.
    """
    spread = [model_shape(size, tokens_per_param=tokens_per_param) for size in (SMALLEST_PARAMS, 1e9, 1e10)]
    cheapest = shortlist(undominated(offers), spread, "usd_per_param", options)
    size = SMALLEST_PARAMS
    while size < LARGEST_PARAMS:
        shape = model_shape(size, tokens_per_param=tokens_per_param)
        if not make_plan(shape, cheapest, budget_usd=budget_usd, **options).affordable:
            break
        size *= 2
    if size == SMALLEST_PARAMS:
        raise UserError(
            f"${budget_usd} does not pay for even {SMALLEST_PARAMS:.0e} parameters at {tokens_per_param:g} tokens "
            "each; "
            "raise --budget or --deadline, lower --tokens-per-param, or allow more clouds and GPUs."
        )
    return size / 2, size

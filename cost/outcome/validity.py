"""The range in which a scaling law holds: the sizes and lengths of the runs behind it, and losses below a uniform
guess.

Invariant: what lies outside is unknown, never a number. A law holds between the smallest and the largest published run
that it was fitted to, with `MARGIN` on each side; its exponents come from Chinchilla's runs, so these count for all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cost.outcome.scaling_law import loss_points

if TYPE_CHECKING:
    from cost.outcome.scaling_law import Prediction
    from cost.performance.workload import Workload

CHINCHILLA_PARAMS = (70e6, 16e9)
"""Smallest and largest model, and the fewest and most tokens: Hoffmann et al. 2022 (arXiv:2203.15556), abstract."""
CHINCHILLA_TOKENS = (5e9, 500e9)
MARGIN = 2.0


def unknown_because(work: Workload, predicted: Prediction) -> str | None:
    """Why no loss is predicted for this run; None where the law holds."""
    points = loss_points()
    problems = (
        _outside("matrix parameters", work.matrix_params, [p.matrix_params for p in points], CHINCHILLA_PARAMS),
        _outside("tokens", work.num_tokens, [p.num_tokens for p in points], CHINCHILLA_TOKENS),
    )
    for problem in problems:
        if problem is not None:
            return problem
    guess = math.log(work.vocab_size)
    if predicted.nats_per_token >= guess:
        return f"the law predicts {predicted.nats_per_token:.2f} nats, more than a uniform guess ({guess:.2f})"
    return None


def _outside(name: str, value: float, seen: list[float], chinchilla: tuple[float, float]) -> str | None:
    low, high = min(*seen, chinchilla[0]) / MARGIN, max(*seen, chinchilla[1]) * MARGIN
    if low <= value <= high:
        return None
    return (
        f"{value:.3g} {name} are outside {low:.3g} to {high:.3g}, the range of the runs that the loss law was fitted to"
    )

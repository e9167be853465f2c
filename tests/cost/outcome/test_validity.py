"""Where a loss law is believed."""

from __future__ import annotations

import pytest

from cost.outcome.scaling_law import CHINCHILLA, predict
from cost.outcome.validity import CHINCHILLA_PARAMS, CHINCHILLA_TOKENS, MARGIN, unknown_because
from cost.performance.workload import Workload
from cost.plan.frontier import model_shape


def reason(work: Workload) -> str | None:
    return unknown_because(work, predict(work, CHINCHILLA))


def test_the_law_is_believed_among_the_runs_that_it_was_fitted_to() -> None:
    assert reason(model_shape(1.1e9)) is None
    assert reason(model_shape(124e6)) is None


@pytest.mark.parametrize(
    ("params", "tokens_per_param", "word"),
    [
        (5e6, 20.0, "matrix parameters are outside"),
        (CHINCHILLA_PARAMS[1] * MARGIN * 1.2, 1.0, "matrix parameters are outside"),
        (200e6, 1.0, "tokens are outside 6.21e+08 to 1e+12"),
        (1e9, 1.1 * CHINCHILLA_TOKENS[1] * MARGIN / 1e9, "tokens are outside"),
    ],
)
def test_outside_of_them_nothing_is_predicted(params: float, tokens_per_param: float, word: str) -> None:
    assert word in (reason(model_shape(params, tokens_per_param=tokens_per_param)) or "")


def test_no_loss_above_a_guess_is_predicted() -> None:
    few_words = model_shape(400e6, tokens_per_param=2.0, vocab_size=8)
    assert "more than a uniform guess (2.08)" in (reason(few_words) or "")

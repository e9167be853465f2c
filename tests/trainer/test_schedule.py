from __future__ import annotations

import pytest

from trainer.config import OptimizerConfig
from trainer.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (59, 1.0), (60, 1.0), (70, 0.75), (80, 0.5), (99, 0.025)],
)
def test_the_rate_rises_stays_and_falls(step: int, factor: float) -> None:
    config = OptimizerConfig(warmup_steps=4, decay_fraction=0.4, final_fraction=0.0)
    assert learning_rate_factor(step, 100, config) == pytest.approx(factor)


def test_the_rate_falls_to_the_final_fraction() -> None:
    config = OptimizerConfig(warmup_steps=0, decay_fraction=0.5, final_fraction=0.2)
    assert learning_rate_factor(0, 10, config) == 1.0
    assert learning_rate_factor(5, 10, config) == 1.0
    assert learning_rate_factor(9, 10, config) == pytest.approx(0.2 + 0.8 / 5)
    assert learning_rate_factor(10, 10, config) == pytest.approx(0.2)


def test_without_decay_the_rate_stays() -> None:
    config = OptimizerConfig(warmup_steps=0, decay_fraction=0.0)
    assert [learning_rate_factor(step, 3, config) for step in range(3)] == [1.0, 1.0, 1.0]


def test_where_warm_up_and_decay_overlap_the_smaller_counts() -> None:
    config = OptimizerConfig(warmup_steps=10, decay_fraction=1.0)
    assert [learning_rate_factor(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.25])

"""The learning rate as a function of the step alone: linear warm-up, constant, linear decay at the end.

Nothing here depends on the world size or on how often a run was interrupted.
"""

from __future__ import annotations

from trainer.config import OptimizerConfig


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate that optimizer step `step` (0 is the first) uses.

    Rises over the first `warmup_steps` steps to 1, stays there, and falls over the last `decay_fraction` of all
    steps toward `final_fraction`, which the step after the last would use. Where the two overlap the smaller counts.
    Source: Hägele et al. 2024 (arXiv:2405.18392).
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    num_decay_steps = config.decay_fraction * num_steps
    remaining = min(1.0, (num_steps - step) / num_decay_steps) if num_decay_steps > 0 else 1.0
    return min(warmup, config.final_fraction + (1.0 - config.final_fraction) * max(0.0, remaining))

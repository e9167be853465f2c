"""When to save next: Young and Daly's interval, from what a save is measured to cost.

The plan's interval holds until the first saves are measured. Losses and restarts are what the supervisor says.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from cost.market.preemption import checkpoint_interval_seconds
from trainer.config import DEFAULT_CHECKPOINT_INTERVAL_SECONDS, TrainConfig

MEASURED_SAVES = 5
"""The median of so many: one slow disk does not change the rhythm, and the first save (which makes its buffers) drops
out."""
LONGEST_INTERVAL_SECONDS = 900.0
"""However rare losses are said to be: what nobody foresaw costs a quarter of an hour at most."""
SAVES_PER_INTERVAL = 2
"""An interval is never shorter than so many saves take from beginning to end."""


class Pace:
    """The checkpoint interval of one group of workers."""

    def __init__(self, config: TrainConfig, world_size: int) -> None:
        self._world_size = world_size
        self._saves: deque[tuple[float, float]] = deque(maxlen=MEASURED_SAVES)
        self._risk = config.interruptions
        told = config.checkpoint.interval_seconds
        self._told_seconds = DEFAULT_CHECKPOINT_INTERVAL_SECONDS if told is None else told
        self._restart_seconds = self._risk.restart_seconds

    def started(self, seconds: float) -> None:
        """How long this start took inside the trainer; a restart takes at least that."""
        self._restart_seconds = max(self._risk.restart_seconds, seconds)

    def saved(self, *, stall_seconds: float, save_seconds: float) -> None:
        """What one save took from training, and how long until it was durable."""
        self._saves.append((stall_seconds, save_seconds))

    @property
    def interval_seconds(self) -> float:
        """From one save to the next."""
        losses = self._risk.losses_per_worker_hour
        if losses is None or not self._saves:
            return self._told_seconds
        best = checkpoint_interval_seconds(
            median(stall for stall, _ in self._saves),
            losses * self._world_size,
            self._risk.saved_at_notice,
            SAVES_PER_INTERVAL * median(seconds for _, seconds in self._saves),
            restart_seconds=self._restart_seconds,
        )
        return min(best, LONGEST_INTERVAL_SECONDS)

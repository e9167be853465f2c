"""What a run says of itself: the newest state once a second, and every step's numbers for good.

Rates count training time only: evaluation and checkpoints are apart, as stalls. Utilization divides by the same
formula and the same table of peaks that the planner uses.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cost.market.hardware import accelerator, canonical_name
from trainer.config import ModelConfig, TrainConfig
from trainer.run_store import keys
from trainer.run_store.base import Store
from trainer.run_store.envelope import Writer, wrap

PROGRESS_INTERVAL_SECONDS = 1.0
METRICS_INTERVAL_SECONDS = 10.0
RATE_WINDOW_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Losses in nats per token; None is what was not measured yet or cannot be."""

    step: int
    num_steps: int
    tokens: int
    loss: float | None
    heldout_loss: float | None
    learning_rate: float
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None
    mfu: float | None
    """0..1 of the devices' dense peak in the run's precision; None on a CPU."""
    world_size: int
    incarnation: int
    checkpoint_step: int | None
    checkpoint_stall_seconds: float
    """How long training waited for the newest checkpoint."""
    checkpoint_save_seconds: float
    """From there until it was durable, while training went on."""
    checkpoint_interval_seconds: float
    """In force now: as told, or as it follows from the measured stall, the restart time and the losses."""
    data_wait_seconds: float
    """How long the newest step waited for its batch."""
    elapsed_seconds: float
    """Since this group of workers began to train."""
    source_epochs: Mapping[str, float]
    """How often each source of the mix has been seen, as a multiple of all its sequences."""
    start_seconds: Mapping[str, float]
    """Parts of the newest start, from what made it necessary to the first step, in their order."""
    stage: str
    """Of the run, that these workers train for."""


class Rate:
    """Tokens per second of training over the last RATE_WINDOW_STEPS steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW_STEPS)

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self._steps.append((tokens, seconds))

    def tokens_per_second(self) -> float | None:
        """None before the first step."""
        seconds = sum(each for _, each in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds > 0 else None


class Reporter:
    """Writes progress and metrics to the store; only rank 0 has one that writes."""

    def __init__(self, store: Store, *, incarnation: int, writes: bool) -> None:
        self._store = store
        self._incarnation = incarnation
        self._writes = writes
        self._rows: list[str] = []
        self._num_parts = 0
        self._progress_due_at = 0.0
        self._metrics_due_at = time.monotonic() + METRICS_INTERVAL_SECONDS

    def step(self, row: Mapping[str, Any], progress: Progress) -> None:
        """One more step is done; what is due is written."""
        if not self._writes:
            return
        self._rows.append(json.dumps(row))
        now = time.monotonic()
        if now >= self._progress_due_at:
            self.progress(progress)
        if now >= self._metrics_due_at:
            self.flush()

    def progress(self, progress: Progress) -> None:
        """Write where the run stands, due or not."""
        if self._writes:
            self._store.write(keys.PROGRESS, wrap(asdict(progress), Writer.TRAINER))
            self._progress_due_at = time.monotonic() + PROGRESS_INTERVAL_SECONDS

    def flush(self) -> None:
        """Store the rows gathered since the last time as one more part."""
        if self._rows:
            self._store.write(
                keys.metrics_part(self._incarnation, self._num_parts), ("\n".join(self._rows) + "\n").encode()
            )
            self._rows.clear()
            self._num_parts += 1
        self._metrics_due_at = time.monotonic() + METRICS_INTERVAL_SECONDS


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of one token, forward and backward, by the planner's formula."""
    return model.workload().flops_per_token


def peak_flops(device: torch.device, config: TrainConfig) -> float | None:
    """Dense FLOP/s of this device in the run's precision; None for a CPU and for a GPU that the table lacks."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    name = canonical_name(properties.name, memory_gib=properties.total_memory / 2**30)
    return None if name is None else accelerator(name).peak_flops(config.precision)

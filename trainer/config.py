"""What the trainer is told: shapes, optimizer, schedule, batch. Plain dataclasses, standard library only.

`tasks.recipe` validates YAML into these same classes, so that a recipe field and a trainer field are one thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# pydantic reads this attribute of a plain dataclass; nothing here imports pydantic.
FORBID_EXTRA: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int = 1024
    sequence_length: int = 128
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden_size: int = 384
    qk_norm: bool = True
    tied_embeddings: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices with AdamW for the rest, or AdamW for all; warm-up, constant, linear decay."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    """AdamW's peak rate."""
    muon_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_steps: int = 20
    decay_fraction: float = 0.3
    """Share of all steps, at the end, over which the rate falls linearly to `final_fraction` of its peak."""
    final_fraction: float = 0.0

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class TrainConfig:
    """One run. `global_batch_size` is in sequences and stays fixed whatever the world size."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    num_steps: int = 400
    global_batch_size: int = 32
    micro_batch_size: int = 16
    """Sequences per device in one forward pass; gradient accumulation makes up the rest."""
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    eval_every_steps: int = 50
    eval_sequences: int = 64
    checkpoint_interval_seconds: float = 15.0
    checkpoint_every_steps: int | None = None
    keep_last: int = 3
    milestone_every_steps: int | None = None
    """Checkpoints at multiples of this are kept for good, beside the newest."""
    losses_per_worker_hour: float | None = None
    """A node's losses per hour, over its workers; given it, the interval follows what a save is measured to cost."""
    saved_at_notice: float = 0.0
    """Chance that the work since the last checkpoint is saved before a loss."""
    restart_seconds: float = 0.0
    """From a loss to training again, as far as known."""
    compile: bool = False
    num_threads: int | None = None
    """CPU threads of one worker; None leaves torch's own choice."""

    __pydantic_config__ = FORBID_EXTRA

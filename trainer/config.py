"""What the trainer is told: shapes, optimizer, schedule, batch. Plain dataclasses, standard library only.

`tasks.recipe.schema` validates YAML into these same classes, so that a recipe field and a trainer field are one thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cost.performance.workload import Workload

# pydantic reads this attribute of a plain dataclass; nothing here imports pydantic.
FORBID_EXTRA: dict[str, Any] = {"extra": "forbid"}


WINDOW_PERIOD = 4
"""Where a window is set, every fourth layer and the last see everything before them."""
GATE_INPUTS = 32
"""So many of a layer's inputs decide how much of its value embeddings is added."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, Qwen3's parts by default; trainer.model.presets names other choices of these
    fields."""

    vocab_size: int = 1024
    sequence_length: int = 128
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int | None = None
    """None: width / num_heads."""
    hidden_size: int = 384
    mlp: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned"] = "rotary"
    biases: bool = False
    qk_norm: bool = True
    tied_embeddings: bool = False
    zero_init: bool = True
    """Matrices that write into the residual stream, and an untied head, begin at zero; else GPT-2's initialization."""
    residual_scalars: bool = False
    """Each layer reads a learned mix of the stream and of the normalized embedding."""
    value_embeddings: bool = False
    """In every second layer and the last, a table of its own adds to the values, through a learned gate."""
    logit_softcap: float = 0.0
    """Logits are kept within this bound by a tanh; 0 is no bound."""
    window: int | None = None
    """Positions that a token sees, itself included, in most layers; None is all before it."""
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    __pydantic_config__ = FORBID_EXTRA

    @property
    def size_of_heads(self) -> int:
        """Of one head."""
        return self.width // self.num_heads if self.head_size is None else self.head_size

    def window_of(self, layer: int) -> int | None:
        """What a token sees in this layer; None is all before it."""
        sees_all = layer % WINDOW_PERIOD == WINDOW_PERIOD - 1 or layer == self.num_layers - 1
        return None if sees_all else self.window

    def has_value_embedding(self, layer: int) -> bool:
        """Whether this layer has a table of its own."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2

    def workload(
        self, *, num_tokens: int = 0, global_batch_size: int = 1, precision: Literal["bf16", "fp32"] = "bf16"
    ) -> Workload:
        """The same shape as the planner counts it."""
        layers = range(self.num_layers)
        return Workload.from_shape(
            num_tokens=num_tokens,
            num_layers=self.num_layers,
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.size_of_heads,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            global_batch_size=global_batch_size,
            tied_embeddings=self.tied_embeddings,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
            layer_norm=self.norm == "layer",
            learned_positions=self.positions == "learned",
            biases=self.biases,
            residual_scalars=self.residual_scalars,
            num_value_embeddings=sum(map(self.has_value_embedding, layers)),
            value_gate_inputs=min(GATE_INPUTS, self.width),
            window=self.window,
            num_windowed_layers=sum(self.window_of(layer) is not None for layer in layers),
            precision=precision,
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices with AdamW for the rest, or AdamW for all; warm-up, constant, linear decay."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    """AdamW's peak rate."""
    muon_learning_rate: float = 0.02
    embedding_learning_rate: float | None = None
    """Of token, value and position tables; None is `learning_rate`, as in the next two."""
    head_learning_rate: float | None = None
    scalar_learning_rate: float | None = None
    """Of norms, biases and residual scalars."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    cautious: bool = False
    """Weights decay only where the update, too, moves them toward zero."""
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
    max_documents: int | None = None
    """Attention and positions begin anew in each of so many documents of a sequence; None lets tokens see all."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest again in the backward pass."""
    fp8: bool = False
    """Products of hidden matrices in 8 bits, one scale per tensor; CUDA of compute capability 8.9 or later."""
    sharding: Literal["replicated", "sharded"] = "replicated"
    """Weights, gradients and optimizer state whole on every device (DDP), or divided among them (FSDP2)."""
    initial_weights: str | None = None
    """A file of weights under the trainer's own names to begin with, instead of fresh ones."""
    profile: bool = False
    """Keep a trace of a few steps in the run store."""
    num_threads: int | None = None
    """CPU threads of one worker; None leaves torch's own choice."""

    __pydantic_config__ = FORBID_EXTRA

"""What the trainer is told, in groups: model, optimizer, batch, evaluation, execution, checkpoint, interruptions.

Plain dataclasses, standard library only. `tasks.recipe` validates YAML into these same classes, so that a new field is
written once, here. What is true of a field is said at the field: its range, and whether it may change on resume.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Final, Literal, TypeVar, get_type_hints

from cost.performance.workload import Workload

# pydantic reads this attribute of a plain dataclass; nothing here imports pydantic.
FORBID_EXTRA: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Mark:
    """What is said at a field, in its annotation."""

    meaning: str


MAY_CHANGE: Final = Mark(
    "may differ between a checkpoint and the run that resumes from it: nothing learned depends on it"
)
POSITIVE: Final = Mark("greater than 0 and finite, where it is given")

DEFAULT_CHECKPOINT_INTERVAL_SECONDS = 15.0

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

    def layer_window(self, layer: int) -> int | None:
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
            num_windowed_layers=sum(self.layer_window(layer) is not None for layer in layers),
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
class BatchConfig:
    """How many sequences a step trains on."""

    global_batch_size: Annotated[int, POSITIVE] = 32
    """Sequences per optimizer step over all devices; fixed whatever the world size."""
    micro_batch_size: Annotated[int, POSITIVE, MAY_CHANGE] = 16
    """Sequences per device in one forward pass; gradient accumulation makes up the rest."""
    max_documents: Annotated[int | None, POSITIVE] = None
    """Attention and positions begin anew in each of so many documents of a sequence; None lets tokens see all."""

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class EvaluationConfig:
    """How often the held-out loss is measured, and on how much."""

    eval_every_steps: Annotated[int, POSITIVE, MAY_CHANGE] = 50
    eval_sequences: Annotated[int, POSITIVE, MAY_CHANGE] = 64

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class ExecutionConfig:
    """How the devices carry out the same training: memory, kernels, threads."""

    compile: Annotated[bool, MAY_CHANGE] = False
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Keep each layer's input alone and compute the rest again in the backward pass."""
    fp8: bool = False
    """Products of hidden matrices in 8 bits, one scale per tensor; CUDA of compute capability 8.9 or later."""
    sharding: Annotated[Literal["replicated", "sharded"], MAY_CHANGE] = "replicated"
    """Weights, gradients and optimizer state whole on every device (DDP), or divided among them (FSDP2)."""
    profile: Annotated[bool, MAY_CHANGE] = False
    """Keep a trace of a few steps in the run store."""
    num_threads: Annotated[int | None, POSITIVE, MAY_CHANGE] = None
    """CPU threads of one worker; None leaves torch's own choice."""

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    interval_seconds: Annotated[float | None, POSITIVE] = None
    """None: what the planner chooses, or DEFAULT_CHECKPOINT_INTERVAL_SECONDS where it chose nothing."""
    every_steps: Annotated[int | None, POSITIVE] = None
    keep_last: Annotated[int, POSITIVE] = 3
    milestone_every_steps: Annotated[int | None, POSITIVE] = None
    """Checkpoints at multiples of this are kept for good, beside the newest."""

    __pydantic_config__ = FORBID_EXTRA


@dataclass(frozen=True)
class InterruptionConfig:
    """What the supervisor knows of interruptions; the checkpoint interval follows from it."""

    losses_per_worker_hour: float | None = None
    """A node's losses per hour, over its workers; given it, the interval follows what a save is measured to cost."""
    saved_at_notice: float = 0.0
    """Chance that the work since the last checkpoint is saved before a loss."""
    restart_seconds: float = 0.0
    """From a loss to training again, as far as known."""


@dataclass(frozen=True)
class TrainConfig:
    """One run, as the trainer is told. A recipe has the same groups and adds its own to them (`tasks.recipe`)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    num_steps: int = 400
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    initial_weights: Annotated[str | None, MAY_CHANGE] = None
    """A file of weights under the trainer's own names to begin with, instead of fresh ones."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = field(default_factory=CheckpointConfig)
    interruptions: Annotated[InterruptionConfig, MAY_CHANGE] = field(default_factory=InterruptionConfig)


NAMED_GROUPS = ("model", "optimizer")
"""Groups under whose name their fields stand in a checkpoint; the fields of the others stand there by themselves."""

Group = TypeVar("Group")


def marks(group: type[Any]) -> dict[str, tuple[Mark, ...]]:
    """What is said at each field of a configuration, by its name."""
    hints = get_type_hints(group, include_extras=True)
    return {
        each.name: tuple(mark for mark in getattr(hints[each.name], "__metadata__", ()) if isinstance(mark, Mark))
        for each in fields(group)
    }


def part(group: type[Group], values: Any) -> Group:
    """A group from an object that has its fields among others."""
    return group(**{each.name: getattr(values, each.name) for each in fields(group)})  # type: ignore[arg-type]


def decisive(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide the weights: all but those that may change on resume, as a checkpoint names them."""
    found: dict[str, Any] = {}
    for name, said in marks(TrainConfig).items():
        value = getattr(config, name)
        if MAY_CHANGE in said:
            continue
        if not is_dataclass(value):
            found[name] = value
        elif name in NAMED_GROUPS:
            found[name] = _fixed_fields(value)
        else:
            found |= _fixed_fields(value)
    return found


def _fixed_fields(group: Any) -> dict[str, Any]:
    said = marks(type(group))
    return {name: value for name, value in asdict(group).items() if MAY_CHANGE not in said[name]}

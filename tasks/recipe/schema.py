"""A recipe: everything that decides what a run trains, as checked YAML.

Invariant: a `Recipe` that exists is whole and consistent, so nothing after it checks shapes or ranges again. The
trainer's own dataclasses are the types of `model` and `optimizer`, so a recipe field and a trainer field are one
thing. Parameters are counted by `cost.performance.workload`. Imports no numpy, torch or ray: the planner reads recipes
too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from cost.errors import UserError
from cost.performance.workload import Workload
from cost.spelling import did_you_mean
from tasks.recipe import stages as stage_lists
from tasks.recipe.stages import StageOptions
from trainer.config import ModelConfig, OptimizerConfig, TrainConfig
from trainer.model.presets import expand

RECIPE_FOLDER = Path(__file__).parent / "recipes"
STDLIB_CORPUS = "stdlib"
"""Corpus kind: the Python standard library found on the machine."""
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
"""A byte-level vocabulary begins with every byte."""
IMPORTED_WEIGHTS = "weights.pt"
"""In the folder that `slm import` makes."""
MAX_VOCAB_SIZE = 65_536
"""Token shards hold unsigned 16-bit ids."""
PLAIN_SOURCES = ("text", "code")
"""Source names of a corpus that names none: told apart by file suffix."""

ConcretePrecision = Literal["bf16", "fp32"]
PRECISIONS: tuple[ConcretePrecision, ...] = get_args(ConcretePrecision)
AUTO: Final = "auto"

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Training(_Part):
    """How long (exactly one of the first three), in which batches, and how often the held-out loss is measured."""

    num_steps: PositiveInt | None = None
    num_tokens: PositiveInt | None = None
    tokens_per_param: PositiveFloat | None = None
    global_batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all devices."""
    micro_batch_size: PositiveInt = 16
    eval_every_steps: PositiveInt = 50
    eval_sequences: PositiveInt = 64
    compile: bool = False
    max_documents: PositiveInt | None = None
    """Of one sequence, that see nothing of each other; null: what stands in one sequence is seen as one."""
    activation_checkpointing: bool = False
    fp8: bool = False
    """Hidden matrices multiply in 8 bits; for GPUs since Ada and Hopper, and from about half a billion parameters."""
    sharding: Literal["replicated", "sharded"] = "replicated"
    initial_weights: str | None = None
    """Folder that `slm import` made: where training begins."""
    profile: bool = False
    num_threads: PositiveInt | None = None


LENGTHS = ("num_steps", "num_tokens", "tokens_per_param")


class Data(_Part):
    """Where the text comes from.

    `corpus` is "stdlib", a path, a list of paths (.py files are source "code", all else is "text"), or a mapping
    from source name to its paths. Only sources in `weights` are used; without weights each counts by its tokens.
    """

    corpus: str | tuple[str, ...] | dict[str, tuple[str, ...]] = STDLIB_CORPUS
    weights: dict[str, PositiveFloat] | None = None
    max_bytes: PositiveInt | None = None
    """UTF-8 bytes of text read at most, shared among the sources by weight."""
    heldout_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    tokenizer_sample_bytes: PositiveInt = 200_000_000
    """UTF-8 bytes that the tokenizer is trained on at most."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    @field_validator("corpus", mode="before")
    @classmethod
    def _corpus_shape(cls, value: object) -> object:
        def paths(item: object) -> tuple[str, ...]:
            items = [item] if isinstance(item, str) else item
            if not isinstance(items, list | tuple) or not items or not all(isinstance(p, str) for p in items):
                raise ValueError("should be a path, a list of paths, or a mapping from source name to paths")
            return tuple(str(p) for p in items)

        if isinstance(value, dict) and value:
            return {str(name): paths(item) for name, item in value.items()}
        return value if isinstance(value, str) and value else paths(value)

    def sources(self) -> tuple[str, ...]:
        """Names that a source of this corpus may have."""
        return tuple(self.corpus) if isinstance(self.corpus, dict) else PLAIN_SOURCES


class Checkpoint(_Part):
    """When to save. Without `interval_seconds` the planner chooses it."""

    interval_seconds: PositiveFloat | None = None
    every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 3
    milestone_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""


class Nodes(_Part):
    """How few nodes a run may go on with, and how many it wants."""

    min: PositiveInt = 1
    max: PositiveInt = 1


class Offers(_Part):
    """What may be rented; null means anything."""

    clouds: tuple[str, ...] | None = None
    gpus: tuple[str, ...] | None = None
    spot: bool | None = None


class Local(_Part):
    """The spot market that the local backend plays on this machine."""

    market: str = "calm"
    """calm, hazard:PER_HOUR (losses per node and billed hour) or trace:FILE (trace:demo comes with slm).

    The last two take options behind commas: notice=SHARE and notice_seconds=S of the losses that are announced.
    """
    time_scale: PositiveFloat = 1.0
    """Billed seconds per real second."""
    seed: int = 0
    lease_seconds: PositiveFloat = 60.0

    @field_validator("market")
    @classmethod
    def _known_market(cls, value: str) -> str:
        kind, _, argument = value.partition(":")
        rate = argument.partition(",")[0]  # what follows is the market's to understand
        good = {"calm": argument == "" and ":" not in value, "trace": argument != "", "hazard": _is_rate(rate)}
        if not good.get(kind, False):
            raise ValueError(f"should be calm, hazard:PER_HOUR or trace:FILE{did_you_mean(kind, list(good))}")
        return value


class Cloud(_Part):
    """How the sky backend rents; real seconds."""

    lease_seconds: PositiveFloat = 900.0
    """How far ahead nodes are paid for, and how long they live without hearing from the supervisor."""
    ttl_seconds: PositiveFloat | None = None
    """The provider's own limit where it cannot be moved; by default what wastes least."""
    poll_seconds: PositiveFloat = 5.0
    capacity_seconds: PositiveFloat = 120.0
    """How long a node that is not to be had is waited for in a queue before the next offer is tried."""
    drain_seconds: PositiveFloat = 60.0
    """Longest time from asking for a checkpoint and a stop to their end."""
    balance_usd: dict[str, Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """What lies on the prepaid account of a cloud, where only its end stops a hung node (RunPod, Vast)."""


AnyStage = Annotated[SerializeAsAny[StageOptions], BeforeValidator(stage_lists.parse)]
"""Options of a stage, as the model of its kind."""


class Recipe(_Part):
    """One run, from corpus to budget."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    description: str = ""
    backend: Literal["local", "sky"] | None = None
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    """auto: the faster of the others on what is rented; a launch fixes it for the whole run."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: Training
    data: Data = Field(default_factory=Data)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    nodes: Nodes = Field(default_factory=Nodes)
    offers: Offers = Field(default_factory=Offers)
    local: Local = Field(default_factory=Local)
    cloud: Cloud = Field(default_factory=Cloud)
    stages: tuple[AnyStage, ...] | None = None
    """What the run does, one after the other under one budget; null: it prepares the data and pre-trains."""
    budget_usd: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] = Decimal(100)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [problem for check in CHECKS for problem in check(self)]
        if problems:
            raise Inconsistent(problems)
        return self

    @model_serializer(mode="wrap")
    def _without_unsaid_stages(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that lists no stages is written as it always was, so that its digest stays."""
        content: dict[str, Any] = write(self)
        if self.stages is None:
            content.pop("stages", None)
        return content

    def stage_list(self) -> tuple[StageOptions, ...]:
        """What the run does, in order."""
        return stage_lists.usual() if self.stages is None else self.stages

    def without_stages(self) -> Recipe:
        """The same recipe as one stage needs it, which knows nothing of the others."""
        return self.model_copy(update={"stages": None})

    def workload(self) -> Workload:
        """Shape and length of the run, as the planner sees it."""
        shape = self._shape(num_tokens=0)
        return shape.with_tokens(self.num_steps() * shape.tokens_per_step)

    def num_params(self) -> int:
        """Weights that the trainer allocates."""
        return self._shape(num_tokens=0).num_params

    def num_steps(self) -> int:
        """Optimizer steps of the whole run; a number of tokens is rounded up to whole steps."""
        asked = self.training
        if asked.num_steps is not None:
            return asked.num_steps
        if asked.num_tokens is not None:
            return self._shape(asked.num_tokens).num_steps
        assert asked.tokens_per_param is not None
        return self._shape(math.ceil(asked.tokens_per_param * self.num_params())).num_steps

    def num_tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.num_steps() * self._shape(num_tokens=0).tokens_per_step

    def train_config(self, checkpoint_interval_seconds: float | None = None) -> TrainConfig:
        """What the trainer is told. The argument, the planner's choice, counts where the recipe gives none."""
        interval = self.checkpoint.interval_seconds or checkpoint_interval_seconds
        return TrainConfig(
            model=self.model,
            optimizer=self.optimizer,
            num_steps=self.num_steps(),
            global_batch_size=self.training.global_batch_size,
            micro_batch_size=self.training.micro_batch_size,
            precision=self.concrete_precision(),
            seed=self.seed,
            eval_every_steps=self.training.eval_every_steps,
            eval_sequences=self.training.eval_sequences,
            checkpoint_interval_seconds=interval or TrainConfig.checkpoint_interval_seconds,
            checkpoint_every_steps=self.checkpoint.every_steps,
            keep_last=self.checkpoint.keep_last,
            milestone_every_steps=self.checkpoint.milestone_every_steps,
            compile=self.training.compile,
            max_documents=self.training.max_documents,
            activation_checkpointing=self.training.activation_checkpointing,
            fp8=self.training.fp8,
            sharding=self.training.sharding,
            initial_weights=self._initial_weights_file(),
            profile=self.training.profile,
            num_threads=self.training.num_threads,
        )

    def _initial_weights_file(self) -> str | None:
        folder = self.training.initial_weights
        return None if folder is None else str(Path(folder) / IMPORTED_WEIGHTS)

    def concrete_precision(self) -> ConcretePrecision:
        """What the trainer computes in.

        Raises:
            UserError: It was left to the planner, and no plan has fixed it.
        """
        if self.precision == AUTO:
            raise UserError(
                f"recipe {self.name} leaves precision {AUTO} to the planner, so it cannot be trained as it is; "
                "`slm launch` fixes it, or say --set precision=bf16 or --set precision=fp32."
            )
        return self.precision

    def in_precision(self, precision: ConcretePrecision) -> Recipe:
        """The same run, computed in this precision from the first step to the last."""
        return self.model_copy(update={"precision": precision})

    def canonical_json(self) -> str:
        """One text for one recipe: keys sorted, defaults written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def _shape(self, num_tokens: int) -> Workload:
        return self.model.workload(
            num_tokens=num_tokens,
            global_batch_size=self.training.global_batch_size,
            precision=PRECISIONS[0] if self.precision == AUTO else self.precision,
        )


# ---------------------------------------------------------------- what one field alone cannot tell


@dataclass(frozen=True)
class Problem:
    """A value that does not fit: its dotted key, and what is wrong with it."""

    key: str
    message: str


class Inconsistent(ValueError):
    """Fields that are each well-formed, but not together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{problem.key}: {problem.message}" for problem in problems))


def _check_model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    sizes = ("vocab_size", "sequence_length", "num_layers", "width", "num_heads", "num_kv_heads", "hidden_size")
    for name in (*sizes, "rope_base", "norm_eps"):
        value = getattr(model, name)
        if not (value > 0 and math.isfinite(value)):
            yield Problem(f"model.{name}", "should be greater than 0")
            return
    for name in ("head_size", "window"):
        value = getattr(model, name)
        if value is not None and value <= 0:
            yield Problem(f"model.{name}", "should be greater than 0, or null")
            return
    if not 0 <= model.logit_softcap < math.inf:
        yield Problem("model.logit_softcap", "should be 0 for no bound, or greater")
    if model.head_size is None and model.width % model.num_heads:
        heads = [h for h in range(1, model.width + 1) if model.width % (2 * h) == 0]
        way_out = f"; {min(heads, key=lambda h: abs(h - model.num_heads))} does" if heads else ""
        yield Problem("model.num_heads", f"does not divide model.width={model.width}{way_out}")
    elif model.positions == "rotary" and model.size_of_heads % 2:
        name, size = "num_heads" if model.head_size is None else "head_size", model.size_of_heads
        yield Problem(f"model.{name}", f"makes heads of size {size}; rotary positions need an even size")
    if model.num_heads % model.num_kv_heads:
        yield Problem("model.num_kv_heads", f"does not divide model.num_heads={model.num_heads}")
    least = NUM_BYTES + len(recipe.data.special_tokens)
    if not least <= model.vocab_size <= MAX_VOCAB_SIZE:
        allowed = f"{least} (all bytes and the special tokens) to {MAX_VOCAB_SIZE} (16-bit ids)"
        yield Problem("model.vocab_size", f"should be {allowed}")


def _check_optimizer(recipe: Recipe) -> Iterator[Problem]:
    optimizer = recipe.optimizer
    rates = ("learning_rate", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate")
    for name in (*rates, "scalar_learning_rate", "clip_norm"):
        value = getattr(optimizer, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Problem(f"optimizer.{name}", "should be greater than 0")
    for name in ("weight_decay", "warmup_steps"):
        if not getattr(optimizer, name) >= 0:
            yield Problem(f"optimizer.{name}", "should not be negative")
    for name in ("decay_fraction", "final_fraction"):
        if not 0 <= getattr(optimizer, name) <= 1:
            yield Problem(f"optimizer.{name}", "should be between 0 and 1")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Problem("optimizer.betas", "should each be at least 0 and below 1")


def _check_training(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    given = [name for name in LENGTHS if getattr(training, name) is not None]
    if len(given) != 1:
        have = f"has {' and '.join(given)}" if given else "has none"
        yield Problem("training", f"{have}; give exactly one of {', '.join(LENGTHS)}")
    if training.micro_batch_size > training.global_batch_size:
        limit = training.global_batch_size
        yield Problem("training.micro_batch_size", f"is larger than training.global_batch_size={limit}")
    if recipe.nodes.min > recipe.nodes.max:
        yield Problem("nodes.min", f"is larger than nodes.max={recipe.nodes.max}")
    if recipe.nodes.max > training.global_batch_size:
        yield Problem("nodes.max", f"leaves nodes without work: global_batch_size={training.global_batch_size}")


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    specials = data.special_tokens
    if END_OF_TEXT not in specials or len(set(specials)) < len(specials) or not all(specials):
        yield Problem("data.special_tokens", f"should hold {END_OF_TEXT} and no token twice or empty")
    for name in data.weights or {}:
        if name not in data.sources():
            hint = did_you_mean(name, data.sources())
            sources = ", ".join(data.sources())
            yield Problem(f"data.weights.{name}", f"is no source of this corpus, which has {sources}{hint}")
    for name in data.sources():
        if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", name):
            yield Problem("data.corpus", f"source name {name!r} should be letters, digits and _ only")


def _check_stages(recipe: Recipe) -> Iterator[Problem]:
    if recipe.stages is not None:
        yield from (Problem("stages", message) for message in stage_lists.problems_of(recipe.stages))


CHECKS = (_check_model, _check_optimizer, _check_training, _check_data, _check_stages)


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class RecipeSummary:
    """One line of `slm recipes`."""

    name: str
    description: str
    num_params: int
    num_tokens: int


def list_recipes() -> list[RecipeSummary]:
    """The recipes that come with slm, smallest first."""
    recipes = [load_recipe(path.stem) for path in RECIPE_FOLDER.glob("*.yaml")]
    lines = [RecipeSummary(r.name, r.description, r.num_params(), r.num_tokens()) for r in recipes]
    return sorted(lines, key=lambda line: (line.num_params, line.name))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path; each override is `a.b=VALUE` with VALUE in YAML.

    Overriding one of num_steps, num_tokens and tokens_per_param replaces the file's choice among them. A relative
    corpus path counts from the current directory. `model.preset`, `shape` and `depth` become the fields they stand for.

    Raises:
        UserError: No such recipe, bad YAML, or a key or value that is wrong; each with its place.
    """
    from tasks.recipe import text as recipe_text

    document = recipe_text.read(recipe_text.find(name_or_path, RECIPE_FOLDER))
    for override in overrides:
        document.override(override)
    document.expand("model", expand)
    document.refuse_truth_values(Recipe)
    document.settle_choice("training", LENGTHS)
    document.make_paths_absolute("data", "corpus", keep={STDLIB_CORPUS})
    document.make_paths_absolute("training", "initial_weights", keep=())
    document.values.setdefault("name", document.path.stem)
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        raise document.explain(error, Recipe) from None


def recipe_from_json(path: Path) -> Recipe:
    """Read a recipe from the JSON that another process wrote.

    Raises:
        UserError: It cannot be read, or is no recipe of this version.
    """
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole text"
        raise UserError(f"{path} is no recipe that this version can use ({where}: {first['msg']}).") from None

"""A recipe: everything that decides what a run trains, as checked YAML.

Invariant: a `Recipe` that exists is whole and consistent, so nothing after it checks shapes or ranges again. Its
sections are in `tasks.recipe.sections`, most of them groups of `trainer.config`; what they must satisfy together is in
`tasks.recipe.checks`; files are read by `tasks.recipe.load`. Parameters are counted by `cost.performance.workload`.
Imports no numpy, torch or ray: the planner reads recipes too.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cost.errors import UserError
from cost.performance.workload import Workload
from tasks.recipe import checks
from tasks.recipe import stages as stage_lists
from tasks.recipe.sections import Cloud, Data, Local, Nodes, Offers, Section, Training
from tasks.recipe.stages import StageOptions
from trainer.config import (
    DEFAULT_CHECKPOINT_INTERVAL_SECONDS,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    part,
)

IMPORTED_WEIGHTS = "weights.pt"
"""In the folder that `slm import` makes."""

ConcretePrecision = Literal["bf16", "fp32"]
PRECISIONS: tuple[ConcretePrecision, ...] = get_args(ConcretePrecision)
AUTO: Final = "auto"

AnyStage = Annotated[SerializeAsAny[StageOptions], BeforeValidator(stage_lists.parse)]
"""Options of a stage, as the model of its kind."""


class Recipe(Section):
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
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    nodes: Nodes = Field(default_factory=Nodes)
    offers: Offers = Field(default_factory=Offers)
    local: Local = Field(default_factory=Local)
    cloud: Cloud = Field(default_factory=Cloud)
    stages: tuple[AnyStage, ...] | None = None
    """What the run does, one after the other under one budget; null: it prepares the data and pre-trains."""
    budget_usd: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] = Decimal(100)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [
            *checks.check_ranges("training", self.training),
            *checks.check_ranges("checkpoint", self.checkpoint),
            *checks.check_model(self.model, self.data),
            *checks.check_optimizer(self.optimizer),
            *checks.check_training(self.training, self.nodes),
            *checks.check_data(self.data),
            *checks.check_stages(self.stages),
        ]
        if problems:
            raise checks.Inconsistent(problems)
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

    def train_config(self, planned_interval_seconds: float | None = None) -> TrainConfig:
        """What the trainer is told. The argument, the planner's choice, counts where the recipe gives none."""
        training, interval = self.training, self.checkpoint_interval_seconds(planned_interval_seconds)
        return TrainConfig(
            model=self.model,
            optimizer=self.optimizer,
            num_steps=self.num_steps(),
            precision=self.concrete_precision(),
            seed=self.seed,
            initial_weights=self._initial_weights_file(),
            batch=part(BatchConfig, training),
            evaluation=part(EvaluationConfig, training),
            execution=part(ExecutionConfig, training),
            checkpoint=replace(self.checkpoint, interval_seconds=interval),
        )

    def checkpoint_interval_seconds(self, planned: float | None = None) -> float:
        """From one checkpoint to the next, as far as it is known before anything was measured."""
        return self.checkpoint.interval_seconds or planned or DEFAULT_CHECKPOINT_INTERVAL_SECONDS

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

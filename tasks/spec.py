"""What one attempt at a stage of a run is told: recipe, stage, places, and how many workers. JSON in the run store.

The recipe in it lists no stages: a node knows the stage that its lease belongs to, and no other. Invariant: a spec is
written whole by the supervisor and never changed by a node. Imports no numpy, torch or ray.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cost.errors import SlmError
from tasks.recipe.schema import AnyStage, Recipe
from tasks.recipe.stages import PretrainOptions
from tasks.run_store_keys import SPEC
from trainer.config import InterruptionConfig, TrainConfig
from trainer.run_store.envelope import RecordError, Writer, unwrap, wrap

PositiveInt = Annotated[int, Field(gt=0)]


class SpecError(SlmError):
    """The spec in the run store is not one that this version can run."""


class Losses(BaseModel):
    """What the supervisor knows of this lease's losses; rates are in real time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_node_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    saved_at_notice: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that the work since the last checkpoint is saved within a notice."""
    restart_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class RunSpec(BaseModel):
    """One attempt: which lease does what, from where, with how many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    lease_id: str
    attempt: PositiveInt
    recipe: Recipe
    stage: AnyStage = Field(default_factory=PretrainOptions)
    inputs: dict[str, str] = Field(default_factory=dict)
    """Digest of the manifest of each earlier stage, for the manifest of this one."""
    store_uri: str
    data_dir: str
    num_nodes: PositiveInt
    workers_per_node: PositiveInt = 1
    min_workers: PositiveInt = 1
    max_workers: PositiveInt
    checkpoint_interval_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    losses: Losses | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if not self.min_workers <= self.max_workers <= self.num_nodes * self.workers_per_node:
            raise ValueError(
                f"min_workers={self.min_workers} <= max_workers={self.max_workers} <= "
                f"num_nodes={self.num_nodes} x workers_per_node={self.workers_per_node} does not hold"
            )
        return self

    def train_config(self) -> TrainConfig:
        """What the trainer is told in this attempt; an interval that the recipe fixes stays as it is."""
        config = self.recipe.train_config(self.checkpoint_interval_seconds)
        if self.losses is None or self.recipe.checkpoint.interval_seconds is not None:
            return config
        known = InterruptionConfig(
            losses_per_worker_hour=self.losses.per_node_hour / self.workers_per_node,
            saved_at_notice=self.losses.saved_at_notice,
            restart_seconds=self.losses.restart_seconds,
        )
        return replace(config, interruptions=known)

    def to_bytes(self) -> bytes:
        """JSON as it stands in the run store."""
        return wrap(self.model_dump(mode="json"), Writer.SUPERVISOR, indent=1) + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, *, origin: str = SPEC) -> RunSpec:
        """Read the JSON; `origin` names it in an error.

        Raises:
            SpecError: It is damaged, or was written by another version.
        """
        try:
            return cls.model_validate(unwrap(content, origin))
        except RecordError as error:
            raise SpecError(
                f"{origin} is no spec that this version can run (the whole text: it {error.reason}); "
                "start the run again with the version of slm that began it."
            ) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole text"
            raise SpecError(
                f"{origin} is no spec that this version can run ({where}: {first['msg']}); "
                "start the run again with the version of slm that began it."
            ) from None

    @classmethod
    def load(cls, path: Path) -> RunSpec:
        """Read a spec from a file."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SpecError(f"cannot read the spec {path}: {error.strerror}; is the run store there?") from None
        return cls.from_bytes(content, origin=str(path))

    def dump(self, path: Path) -> None:
        """Write a spec to a file, whole or not at all."""
        half = path.with_name(path.name + ".half")
        half.write_bytes(self.to_bytes())
        half.replace(path)

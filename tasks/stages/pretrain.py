"""The stage that trains the recipe's model on the prepared data (`tasks.ray_train`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.own_module import own_arguments
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions
from tasks.run_store_keys import CHECKPOINTS, INCARNATIONS, METRICS, PROGRESS, RESULT, stage_folder
from tasks.stages.base import Needs, Place

FIRST = "pretrain"
"""The stage of this name keeps its checkpoints and progress at the top of the run store, where they always were."""
TRAINING = (CHECKPOINTS, INCARNATIONS, METRICS, PROGRESS, RESULT)


@dataclass(frozen=True, slots=True)
class Pretrain:
    """Ray Train workers on the nodes of a lease, from the newest whole checkpoint."""

    options: StageOptions
    reads: Sequence[str] = ()
    repeats: bool = False

    @property
    def root(self) -> str:
        return "" if self.options.name == FIRST else stage_folder(self.options.name)

    @property
    def writes(self) -> Sequence[str]:
        return (f"{self.root}/",) if self.root else TRAINING

    def needs(self, recipe: Recipe, /) -> Needs:
        return Needs(devices=True, workload=recipe.workload())

    def command(self, _place: Place | None, /) -> Sequence[str]:
        return own_arguments("tasks", "pretrain")

    def facts(self, printed: Mapping[str, Any], /) -> Mapping[str, Any]:
        return printed

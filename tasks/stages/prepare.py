"""The stage that makes tokenizer and token shards, beside the supervisor (`tasks.data.prepare`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.own_module import own_arguments
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions
from tasks.run_store_keys import DATA, stage_folder
from tasks.stages.base import Needs, Place


@dataclass(frozen=True, slots=True)
class Prepare:
    """Costs nothing. Data sets are found by what was asked for, so repeating it is quick."""

    options: StageOptions
    reads: Sequence[str] = ()
    writes: Sequence[str] = (DATA,)
    repeats: bool = True

    @property
    def root(self) -> str:
        return stage_folder(self.options.name)

    def needs(self, _recipe: Recipe, /) -> Needs:
        return Needs(devices=False)

    def command(self, place: Place | None, /) -> Sequence[str]:
        assert place is not None, "runs beside the supervisor only"
        arguments = ("--recipe-json", place.recipe_file, "--data-root", place.data_root)
        return own_arguments("tasks", "prepare", *arguments)

    def facts(self, printed: Mapping[str, Any], /) -> Mapping[str, Any]:
        return {"data_set": Path(printed["data_dir"]).name}

"""All kinds of stages, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from cost.errors import SlmError
from tasks.recipe import stages as recipe_stages
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions
from tasks.stages.base import Stage
from tasks.stages.prepare import Prepare
from tasks.stages.pretrain import Pretrain
from trainer.run_store.base import Store, scoped

MakeStage = Callable[[StageOptions], Stage]


class UnknownStage(SlmError):
    """A kind of stage that this version does not have."""


_KINDS: dict[str, MakeStage] = {"prepare": Prepare, "pretrain": Pretrain}


def register(kind: str, make: MakeStage, options: type[StageOptions]) -> None:
    """Make a kind of stage known to this process, with what recipes may say of it."""
    _KINDS[kind] = make
    recipe_stages.KINDS[kind] = options


def stage_of(options: StageOptions) -> Stage:
    """The stage that a recipe or a spec asks for.

    Raises:
        UnknownStage: Nobody has registered its kind.
    """
    try:
        return _KINDS[options.kind](options)
    except KeyError:
        raise UnknownStage(
            f"stage {options.name} is of the kind {options.kind}, which this version of slm does not have; "
            f"it has {', '.join(_KINDS)}."
        ) from None


def stages_of(recipe: Recipe) -> list[Stage]:
    """What a run of this recipe does, in order."""
    return [stage_of(options) for options in recipe.stage_list()]


def store_of_stage(store: Store, stage: Stage) -> Store:
    """The run store as the stage sees it: its own checkpoints, progress and failures under the usual keys."""
    return scoped(store, stage.root) if stage.root else store


def missing_inputs(store: Store, stage: Stage) -> list[str]:
    """What the stage reads and nobody has written yet."""
    return [pattern for pattern in stage.reads if not fnmatch.filter(store.list(pattern.partition("*")[0]), pattern)]

"""Kinds of stages: those that come with slm, and one that is registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.recipe.load import load_recipe
from tasks.recipe.stages import StageOptions, usual
from tasks.stages.base import Place
from tasks.stages.registry import UnknownStage, stage_of, stages_of, store_of_stage
from trainer.run_store.base import DirectoryStore


def test_a_recipe_without_stages_prepares_and_pre_trains() -> None:
    recipe = load_recipe("demo")
    prepare, pretrain = stages_of(recipe)
    assert (prepare.options.name, pretrain.options.name) == ("prepare", "pretrain")
    assert not prepare.needs(recipe).devices
    assert pretrain.needs(recipe).workload == recipe.workload()


def test_an_unknown_kind_is_named_with_those_that_there_are() -> None:
    options = StageOptions.model_construct(kind="dream", name="dream")
    with pytest.raises(UnknownStage, match=r"of the kind dream.*it has prepare, pretrain"):
        stage_of(options)


def test_pre_training_keeps_its_checkpoints_at_the_top_of_the_run_store(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    pretrain = stage_of(usual()[1])
    assert store_of_stage(store, pretrain) is store
    second = stage_of(usual()[1].model_copy(update={"name": "annealing"}))
    store_of_stage(store, second).write("checkpoints/1", b"x")
    assert store.list("stages/") == ["stages/annealing/checkpoints/1"]


def test_the_preparation_is_told_where_its_recipe_and_its_data_are() -> None:
    command = stage_of(usual()[0]).command(Place("recipe.json", "data", "store"))
    assert command == ("-P", "-m", "tasks", "prepare", "--recipe-json", "recipe.json", "--data-root", "data")

"""The list of stages in a recipe: what it may say, and what is refused with its place."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import UserError
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe


def test_a_recipe_without_stages_is_written_as_before_there_were_any() -> None:
    recipe = load_recipe("demo")
    assert recipe.stages is None
    assert "stages" not in recipe.model_dump()
    assert "stages" not in recipe.canonical_json()  # so that the digest finds an unfinished run of before


def test_stages_are_kinds_or_mappings_with_options() -> None:
    recipe = load_recipe("demo", ["stages=[prepare, {kind: pretrain, name: base, reserve_usd: 2.5}]"])
    prepare, base = recipe.stage_list()
    assert (prepare.kind, prepare.name, prepare.reserve_usd) == ("prepare", "prepare", None)
    assert (base.kind, base.name, base.reserve_usd) == ("pretrain", "base", Decimal("2.5"))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_stages_change_the_digest_and_are_left_out_for_a_node() -> None:
    recipe = load_recipe("demo", ["stages=[prepare, pretrain]"])
    assert recipe.digest() != load_recipe("demo").digest()
    assert recipe.without_stages() == load_recipe("demo")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[]", "should hold at least one stage"),
        ("[pretrain]", "has pretrain, which needs a stage of kind prepare before it"),
        ("[prepare, prepare]", "has two stages called 'prepare'; give one of them another name"),
        ("[prepaer]", "no kind of stage is called 'prepaer'; did you mean prepare?"),
        ("[{name: prepare}]", "each stage should be a kind, or a mapping that has one"),
        ("[{kind: prepare, nmae: x}]", "stage prepare has no option 'nmae'; did you mean name?"),
        ("[{kind: prepare, name: A b}]", "stage prepare: name = 'A b': string should match pattern"),
        ("[{kind: prepare, reserve_usd: -1}]", "reserve_usd = -1: should be greater than or equal to 0"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused_with_the_reason(stages: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("demo", [f"stages={stages}"])
    assert message in str(refused.value)


def test_the_line_of_the_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {num_steps: 3}\nstages:\n  - kind: prepaer\n")
    with pytest.raises(UserError, match=r"mine\.yaml:2: stages"):
        load_recipe(path)

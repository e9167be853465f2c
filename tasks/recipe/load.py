"""Recipes by name, by path, and from the JSON of another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cost.errors import UserError
from tasks.recipe.schema import AUTO, Recipe
from tasks.recipe.sections import LENGTHS, STDLIB_CORPUS
from trainer.model.presets import expand

RECIPE_FOLDER = Path(__file__).parent / "recipes"


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
    On the local backend the precision is `auto` unless it is given.

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
    if document.values.get("backend") == "local":
        document.values.setdefault("precision", AUTO)
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

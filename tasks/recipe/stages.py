"""What a recipe says of its stages: for each its kind, its name, and the options of that kind.

Each kind has one model of its options, registered in `KINDS`; what a stage does is in `tasks.stages`, under the same
kind. Invariant: a list in which `problems_of` finds nothing has each name once, and no stage before one that it
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cost.spelling import did_you_mean

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class StageOptions(BaseModel):
    """What every stage can be told; a kind of stage adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    needs_before: ClassVar[tuple[str, ...]] = ()
    """Kinds of stages of which one must stand earlier in the list."""

    kind: str
    name: Name
    """Under which its progress, its costs and its manifest are kept; by default its kind."""
    reserve_usd: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] | None = None
    """Dollars that stay reserved for it while earlier stages run; null: what it is planned to cost."""


class PrepareOptions(StageOptions):
    """Tokenizer and token shards, from `data`."""

    kind: Literal["prepare"] = "prepare"
    name: Name = "prepare"


class PretrainOptions(StageOptions):
    """Training from random or imported weights, as `training` says."""

    needs_before: ClassVar[tuple[str, ...]] = ("prepare",)

    kind: Literal["pretrain"] = "pretrain"
    name: Name = "pretrain"


KINDS: dict[str, type[StageOptions]] = {"prepare": PrepareOptions, "pretrain": PretrainOptions}
"""The options of each kind of stage; `tasks.stages.base.register` adds one."""


def usual() -> tuple[StageOptions, ...]:
    """The stages of a recipe that lists none."""
    return PrepareOptions(), PretrainOptions()


def parse(value: object) -> StageOptions:
    """The options of one stage, as the model of their kind.

    Raises:
        ValueError: The kind is unknown, or an option is wrong; the message says which.
    """
    if isinstance(value, StageOptions):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("each stage should be a kind, or a mapping that has one")
    kind = value["kind"]
    model = KINDS.get(kind)
    if model is None:
        raise ValueError(f"no kind of stage is called {kind!r}{_suggestion(kind, list(KINDS))}")
    try:
        return model.model_validate({"name": kind, **value})
    except ValidationError as error:
        raise ValueError(_explained(error, kind, model)) from None


def problems_of(stages: Sequence[StageOptions]) -> list[str]:
    """What is wrong with a list of stages as a whole; nothing for a good one."""
    problems = [] if stages else ["should hold at least one stage"]
    seen: list[StageOptions] = []
    for stage in stages:
        if any(stage.name == earlier.name for earlier in seen):
            problems.append(f"has two stages called {stage.name!r}; give one of them another name")
        missing = [kind for kind in stage.needs_before if kind not in [earlier.kind for earlier in seen]]
        problems += [f"has {stage.name}, which needs a stage of kind {kind} before it" for kind in missing]
        seen.append(stage)
    return problems


def _explained(error: ValidationError, kind: str, model: type[StageOptions]) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return f"stage {kind} has no option {name!r}{_suggestion(name, known)}; it has {', '.join(known)}"
    if first["type"] == "missing":
        return f"stage {kind} needs the option {name!r}"
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"stage {kind}: {name} = {first['input']!r}: {message[:1].lower() + message[1:]}"


def _suggestion(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known) or f"; there are {', '.join(known)}"

"""The sections of a recipe file: what may stand under `training`, `data`, `nodes` and so on.

`model`, `optimizer` and `checkpoint` are the trainer's own groups, and `training` holds the trainer's groups batch,
evaluation and execution beside what only a recipe says. A field that is added to one of these groups in
`trainer.config` is thereby a field of the recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cost.spelling import did_you_mean
from trainer.config import FORBID_EXTRA, POSITIVE, BatchConfig, EvaluationConfig, ExecutionConfig

STDLIB_CORPUS = "stdlib"
"""Corpus kind: the Python standard library found on the machine."""
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
"""A byte-level vocabulary begins with every byte."""
MAX_VOCAB_SIZE = 65_536
"""Token shards hold unsigned 16-bit ids."""
PLAIN_SOURCES = ("text", "code")
"""Source names of a corpus that names none: told apart by file suffix."""
LENGTHS = ("num_steps", "num_tokens", "tokens_per_param")
"""Ways to say how long a run is."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Length:
    """How long a run is: exactly one of these."""

    num_steps: Annotated[int | None, POSITIVE] = None
    num_tokens: Annotated[int | None, POSITIVE] = None
    tokens_per_param: Annotated[float | None, POSITIVE] = None


@dataclass(frozen=True)
class Training(ExecutionConfig, EvaluationConfig, BatchConfig, Length):
    """How long, in which batches, how often the held-out loss is measured, and how the devices carry it out."""

    initial_weights: str | None = None
    """Folder that `slm import` made: where training begins."""

    __pydantic_config__ = FORBID_EXTRA


class Section(BaseModel):
    """A section that only a recipe has."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Data(Section):
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


class Nodes(Section):
    """How few nodes a run may go on with, and how many it wants."""

    min: PositiveInt = 1
    max: PositiveInt = 1


class Offers(Section):
    """What may be rented; null means anything."""

    clouds: tuple[str, ...] | None = None
    gpus: tuple[str, ...] | None = None
    spot: bool | None = None


class Local(Section):
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


class Cloud(Section):
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


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False

"""What one field of a recipe alone cannot tell: sizes that divide each other, ranges, names that must exist.

Every check yields the problems that it finds, each at the dotted key that a person would change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cost.spelling import did_you_mean
from tasks.recipe.sections import END_OF_TEXT, LENGTHS, MAX_VOCAB_SIZE, NUM_BYTES, Data, Nodes, Training
from tasks.recipe.stages import StageOptions, problems_of
from trainer.config import POSITIVE, ModelConfig, OptimizerConfig, marks


@dataclass(frozen=True)
class Problem:
    """A value that does not fit: its dotted key, and what is wrong with it."""

    key: str
    message: str


class Inconsistent(ValueError):
    """Fields that are each well-formed, but not together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{problem.key}: {problem.message}" for problem in problems))


def check_ranges(key: str, section: Any) -> Iterator[Problem]:
    """Numbers of a section that its fields say are positive."""
    said = marks(type(section))
    for name in (field.name for field in fields(section)):
        value = getattr(section, name)
        if POSITIVE in said[name] and value is not None and not 0 < value < math.inf:
            yield Problem(f"{key}.{name}", "should be greater than 0" if value <= 0 else "should be a finite number")


def check_model(model: ModelConfig, data: Data) -> Iterator[Problem]:
    """Shapes of the model, and that its vocabulary holds what the data needs."""
    sizes = ("vocab_size", "sequence_length", "num_layers", "width", "num_heads", "num_kv_heads", "hidden_size")
    for name in (*sizes, "rope_base", "norm_eps"):
        value = getattr(model, name)
        if not (value > 0 and math.isfinite(value)):
            yield Problem(f"model.{name}", "should be greater than 0")
            return
    for name in ("head_size", "window"):
        value = getattr(model, name)
        if value is not None and value <= 0:
            yield Problem(f"model.{name}", "should be greater than 0, or null")
            return
    if not 0 <= model.logit_softcap < math.inf:
        yield Problem("model.logit_softcap", "should be 0 for no bound, or greater")
    if model.head_size is None and model.width % model.num_heads:
        heads = [h for h in range(1, model.width + 1) if model.width % (2 * h) == 0]
        fix = f"; {min(heads, key=lambda h: abs(h - model.num_heads))} does" if heads else ""
        yield Problem("model.num_heads", f"does not divide model.width={model.width}{fix}")
    elif model.positions == "rotary" and model.size_of_heads % 2:
        name, size = "num_heads" if model.head_size is None else "head_size", model.size_of_heads
        yield Problem(f"model.{name}", f"makes heads of size {size}; rotary positions need an even size")
    if model.num_heads % model.num_kv_heads:
        yield Problem("model.num_kv_heads", f"does not divide model.num_heads={model.num_heads}")
    least = NUM_BYTES + len(data.special_tokens)
    if not least <= model.vocab_size <= MAX_VOCAB_SIZE:
        allowed = f"{least} (all bytes and the special tokens) to {MAX_VOCAB_SIZE} (16-bit ids)"
        yield Problem("model.vocab_size", f"should be {allowed}")


def check_optimizer(optimizer: OptimizerConfig) -> Iterator[Problem]:
    """Ranges of rates and shares."""
    rates = ("learning_rate", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate")
    for name in (*rates, "scalar_learning_rate", "clip_norm"):
        value = getattr(optimizer, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Problem(f"optimizer.{name}", "should be greater than 0")
    for name in ("weight_decay", "warmup_steps"):
        if not getattr(optimizer, name) >= 0:
            yield Problem(f"optimizer.{name}", "should not be negative")
    for name in ("decay_fraction", "final_fraction"):
        if not 0 <= getattr(optimizer, name) <= 1:
            yield Problem(f"optimizer.{name}", "should be between 0 and 1")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Problem("optimizer.betas", "should each be at least 0 and below 1")


def check_training(training: Training, nodes: Nodes) -> Iterator[Problem]:
    """One length, and batches that can be divided."""
    given = [name for name in LENGTHS if getattr(training, name) is not None]
    if len(given) != 1:
        have = f"has {' and '.join(given)}" if given else "has none"
        yield Problem("training", f"{have}; give exactly one of {', '.join(LENGTHS)}")
    if training.micro_batch_size > training.global_batch_size:
        limit = training.global_batch_size
        yield Problem("training.micro_batch_size", f"is larger than training.global_batch_size={limit}")
    if nodes.min > nodes.max:
        yield Problem("nodes.min", f"is larger than nodes.max={nodes.max}")
    if nodes.max > training.global_batch_size:
        yield Problem("nodes.max", f"leaves nodes without work: global_batch_size={training.global_batch_size}")


def check_data(data: Data) -> Iterator[Problem]:
    """Special tokens, and weights of sources that exist."""
    specials = data.special_tokens
    if END_OF_TEXT not in specials or len(set(specials)) < len(specials) or not all(specials):
        yield Problem("data.special_tokens", f"should hold {END_OF_TEXT} and no token twice or empty")
    for name in data.weights or {}:
        if name not in data.sources():
            hint = did_you_mean(name, data.sources())
            sources = ", ".join(data.sources())
            yield Problem(f"data.weights.{name}", f"is no source of this corpus, which has {sources}{hint}")
    for name in data.sources():
        if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", name):
            yield Problem("data.corpus", f"source name {name!r} should be letters, digits and _ only")


def check_stages(stages: Sequence[StageOptions] | None) -> Iterator[Problem]:
    """The list of stages as a whole, where a recipe has one."""
    if stages is not None:
        yield from (Problem("stages", message) for message in problems_of(stages))

"""What is said at the fields of a configuration, and what of it decides the weights."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from tests.support.configs import changed
from trainer.config import MAY_CHANGE, NAMED_GROUPS, POSITIVE, BatchConfig, TrainConfig, decisive, marks, part

FREE = {
    "micro_batch_size": 4,
    "eval_every_steps": 7,
    "eval_sequences": 7,
    "checkpoint_interval_seconds": 7.0,
    "checkpoint_every_steps": 7,
    "keep_last": 7,
    "milestone_every_steps": 7,
    "losses_per_worker_hour": 7.0,
    "saved_at_notice": 0.7,
    "restart_seconds": 7.0,
    "compile": True,
    "activation_checkpointing": True,
    "sharding": "sharded",
    "profile": True,
    "initial_weights": "weights.pt",
    "num_threads": 7,
}


@pytest.mark.parametrize(("name", "value"), FREE.items())
def test_what_may_change_on_resume_decides_nothing(name: str, value: Any) -> None:
    assert decisive(changed(TrainConfig(), **{name: value})) == decisive(TrainConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 7),
        ("precision", "fp32"),
        ("seed", 7),
        ("global_batch_size", 7),
        ("max_documents", 7),
        ("fp8", True),
    ],
)
def test_everything_else_decides_the_weights(name: str, value: Any) -> None:
    assert decisive(changed(TrainConfig(), **{name: value})) == {**decisive(TrainConfig()), name: value}


def test_all_of_model_and_optimizer_decides_the_weights_under_the_groups_name() -> None:
    config = TrainConfig()
    for name in NAMED_GROUPS:
        assert decisive(config)[name].keys() == {each.name for each in fields(getattr(config, name))}


def test_fields_of_groups_without_a_name_in_checkpoints_are_called_differently() -> None:
    config = TrainConfig()
    groups = [getattr(config, each.name) for each in fields(config) if each.name not in NAMED_GROUPS]
    names = [each.name for group in groups if is_dataclass(group) for each in fields(group)]
    names += [each.name for each in fields(config)]
    assert len(names) == len(set(names))


def test_marks_are_read_from_the_annotations() -> None:
    assert marks(BatchConfig)["micro_batch_size"] == (POSITIVE, MAY_CHANGE)
    assert marks(BatchConfig)["global_batch_size"] == (POSITIVE,)
    assert marks(TrainConfig)["seed"] == ()


def test_a_part_takes_the_fields_of_its_group() -> None:
    class Wide:
        global_batch_size, micro_batch_size, max_documents, seed = 8, 4, None, 3

    assert part(BatchConfig, Wide()) == BatchConfig(8, 4, None)

"""A spec goes to the node and comes back the same, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.recipe.load import load_recipe
from tasks.spec import Losses, RunSpec, SpecError
from trainer.config import InterruptionConfig


def make_spec(**changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "run_id": "demo-1",
        "lease_id": "lease-1",
        "attempt": 1,
        "recipe": load_recipe("demo", ["precision=bf16", "checkpoint.interval_seconds=null"]),
        "store_uri": "file:///tmp/store",
        "data_dir": "/tmp/data",
        "num_nodes": 2,
        "min_workers": 1,
        "max_workers": 2,
        "checkpoint_interval_seconds": 12.5,
    }
    return RunSpec(**{**fields, **changes})


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    spec = make_spec()
    spec.dump(tmp_path / "spec.json")
    assert RunSpec.load(tmp_path / "spec.json") == spec
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]


def test_losses_reach_the_trainer_per_worker_unless_the_recipe_fixes_the_interval() -> None:
    losses = Losses(per_node_hour=0.8, saved_at_notice=0.9, restart_seconds=20)
    config = make_spec(losses=losses, workers_per_node=4).train_config()
    assert config.interruptions == InterruptionConfig(0.2, saved_at_notice=0.9, restart_seconds=20)
    fixed = make_spec(losses=losses, recipe=load_recipe("demo", ["precision=bf16", "checkpoint.interval_seconds=6"]))
    assert fixed.train_config().interruptions.losses_per_worker_hour is None
    assert make_spec().train_config().interruptions.losses_per_worker_hour is None


def test_the_planned_checkpoint_interval_reaches_the_trainer() -> None:
    assert make_spec().train_config().checkpoint.interval_seconds == 12.5


def test_more_workers_than_places_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_workers=5 <= num_nodes=2 x workers_per_node=2"):
        make_spec(max_workers=5, workers_per_node=2)


def test_a_damaged_spec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(make_spec().to_bytes()[:100])
    with pytest.raises(SpecError, match=r"spec.json is no spec that this version can run \(the whole text: "):
        RunSpec.load(path)


def test_a_spec_of_another_version_is_refused() -> None:
    content = json.loads(make_spec().to_bytes()) | {"colour": "red"}
    with pytest.raises(SpecError, match=r"\(colour: Extra inputs are not permitted\); start the run again"):
        RunSpec.from_bytes(json.dumps(content).encode())


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the spec .*: No such file or directory; is the run store there"):
        RunSpec.load(tmp_path / "spec.json")

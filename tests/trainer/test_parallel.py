"""Copies and shards on two workers agree with one worker."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.configs import changed
from trainer.config import TrainConfig
from trainer.loop import Result
from trainer.model.presets import expand

RunSingle = Callable[..., Result]
RunGroup = Callable[..., list[list[dict[str, Any]]]]
SavedTensors = Callable[[Path], dict[str, Tensor]]
MetricsOf = Callable[[Path], list[dict[str, Any]]]
WithOptimizer = Callable[..., TrainConfig]

WAYS = ("replicated", "sharded")
PRESETS = ("llama", "speedrun", "gpt2")
CURVE_STEPS = 50
CURVES = ("speedrun adamw", "speedrun muon")
"""The cases that are trained to their end."""


def job(config: TrainConfig, store: Path, **options: Any) -> dict[str, Any]:
    return {"config": asdict(config), "store": str(store), **options}


def relative_error(tensor: Tensor, two: Tensor) -> float:
    return float((tensor - two).norm() / two.norm())


@pytest.fixture(scope="module")
def cases(tiny: TrainConfig, with_optimizer: WithOptimizer) -> dict[str, TrainConfig]:
    """AdamW over many steps, and one step of Muon, of models with every kind of part."""
    found = {}
    for preset in PRESETS:
        fields = expand({"preset": preset, "num_kv_heads": 2 if preset == "gpt2" else 1})
        config = changed(tiny, model=replace(tiny.model, **fields), num_steps=CURVE_STEPS, eval_every_steps=CURVE_STEPS)
        found[f"{preset} adamw"] = with_optimizer(config, name="adamw")
    found["speedrun muon"] = replace(found["speedrun adamw"], optimizer=tiny.optimizer)
    return found


@pytest.fixture(scope="module")
def runs(
    cases: dict[str, TrainConfig], run_single: RunSingle, run_group: RunGroup, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All cases by one worker, by two copies, and by two shards: from one first step on, which one worker made."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, config in cases.items():
        run_single(config, folder / name / "alone", stop_after=1)
        for way in WAYS:
            run_single(config, folder / name / way, stop_after=1)
    for stop_after in (2, None):
        going_on = {name: config for name, config in cases.items() if stop_after is not None or name in CURVES}
        for name, config in going_on.items():
            run_single(config, folder / name / "alone", stop_after=stop_after)
        for way in WAYS:
            jobs = [
                job(changed(config, sharding=way), folder / name / way, stop_after=stop_after)
                for name, config in going_on.items()
            ]
            reports = run_group(2, jobs)
            assert all("error" not in report for of_job in reports for report in of_job), reports
        if stop_after == 2:
            for each in list(folder.glob("*/*")):
                copy = folder.parent / f"{folder.name}-after-2" / each.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(each, copy)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_one_step_from_the_same_checkpoint_is_that_of_one_worker(
    runs: Path, cases: dict[str, TrainConfig], saved_tensors: SavedTensors, way: str
) -> None:
    after_2 = runs.parent / f"{runs.name}-after-2"
    for name in cases:
        found, wanted = (saved_tensors(after_2 / name / which) for which in (way, "alone"))
        assert found.keys() - wanted.keys() <= {"random/cpu/1"}
        weights = [key for key in wanted if key.startswith("model/")]
        joined = [torch.cat([each[key].flatten() for key in weights]) for each in (found, wanted)]
        # Muon orthogonalizes in bf16: what differs in the last bit of a gradient moves its update by more.
        assert relative_error(*joined) < (1e-5 if "adamw" in name else 1e-3), name
        moments = [key for key in wanted if key.endswith(("/exp_avg", "/momentum_buffer"))]
        joined = [torch.cat([each[key].flatten() for key in moments]) for each in (found, wanted)]
        assert relative_error(*joined) < 1e-5, name


@pytest.mark.parametrize("way", WAYS)
def test_curves_of_adamw_are_those_of_one_worker(runs: Path, metrics_of: MetricsOf, way: str) -> None:
    for name in CURVES:
        losses = [[row["loss"] for row in metrics_of(runs / name / which)] for which in (way, "alone")]
        assert len(losses[0]) == len(losses[1]) == CURVE_STEPS
        drift = max(abs(loss - two) / two for loss, two in zip(*losses, strict=True))
        if "adamw" in name:
            assert drift < 1e-5, name
        else:
            print(f"Muon's bf16 drift over {CURVE_STEPS} steps, {way}: {drift:.1e}")  # noqa: T201
            assert drift < 2e-2, name


def test_a_sharded_run_goes_on_as_copies_and_alone(
    tiny: TrainConfig, run_single: RunSingle, run_group: RunGroup, tmp_path: Path, metrics_of: MetricsOf
) -> None:
    run_single(tiny, tmp_path / "whole")
    sharded = changed(tiny, sharding="sharded")
    first = run_group(2, [job(sharded, tmp_path / "run", stop_after=2)])
    second = run_group(2, [job(tiny, tmp_path / "run", stop_after=2), job(tiny, tmp_path / "run", stop_after=4)])
    assert first[0][0]["weights_sha256"] == first[0][1]["weights_sha256"] == second[0][0]["weights_sha256"]
    run_single(tiny, tmp_path / "run")
    losses = [[row["loss"] for row in metrics_of(tmp_path / which)] for which in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_shards_in_bf16_are_evaluated_and_saved_in_any_order(
    tiny: TrainConfig, run_group: RunGroup, tmp_path: Path
) -> None:
    config = changed(tiny, precision="bf16", sharding="sharded", activation_checkpointing=True, num_steps=4)
    config = changed(config, checkpoint_every_steps=1, eval_every_steps=2)
    reports = run_group(2, [job(config, tmp_path / "run")])[0]
    assert [report.get("outcome") for report in reports] == ["finished", "finished"], reports
    assert reports[0] == reports[1]

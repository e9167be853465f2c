"""The same run at any number of workers and through kills: batches, schedule, gradients, what the weights have seen.

Small forms of what bench/exactness.py does over a longer run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.support.configs import changed
from tests.support.exact_group import Attempt, Job, Report, only_checkpoint, run_jobs, seen_by_weights
from trainer.checkpoints.lineage import checkpoints_of_chain
from trainer.config import TrainConfig
from trainer.data.loader import TokenShards
from trainer.data.order import sample_places
from trainer.run_store.base import DirectoryStore

MetricsOf = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def config(tiny: TrainConfig) -> TrainConfig:
    return changed(tiny, global_batch_size=32, micro_batch_size=4, eval_every_steps=1000)


def relative_error(tensor: Tensor, two: Tensor) -> float:
    return float((tensor - two).norm() / two.norm())


def newest_step(store: Path) -> int:
    """Of the newest checkpoint that the next attempt goes on from."""
    found = checkpoints_of_chain(DirectoryStore(store))
    return found[0].step if found else 0


def run(world_size: int, job: Job, folder: Path) -> Report:
    reports = run_jobs(world_size, [job], folder)
    assert reports is not None
    return reports[0]


def test_every_world_size_trains_on_the_same_batches_at_the_same_rate(
    config: TrainConfig, data_dir: Path, tmp_path: Path, metrics_of: MetricsOf
) -> None:
    batches, schedules = {}, {}
    for world_size in (1, 2, 3, 4, 8):
        store = tmp_path / f"store{world_size}"
        report = run(world_size, Job(config, data_dir, store), tmp_path / f"group{world_size}")
        assert report.steps == list(range(6))
        batches[world_size] = report.batches()
        schedules[world_size] = [(row["learning_rate"], row["tokens"]) for row in metrics_of(store)]
    assert len(set(batches[1])) == 6
    assert all(each == batches[1] for each in batches.values())
    assert all(each == schedules[1] for each in schedules.values())
    assert [tokens for _, tokens in schedules[1]] == [32 * 16] * 6


def test_a_masked_batch_of_32_is_one_sum_over_its_targets_at_any_world_size(
    config: TrainConfig,
    data_dir: Path,
    tmp_path: Path,
    metrics_of: MetricsOf,
    with_optimizer: Callable[..., TrainConfig],
) -> None:
    config = with_optimizer(replace(config, num_steps=2), name="adamw")
    reports, rows = {}, {}
    for world_size in (1, 3, 5, 7):
        store = tmp_path / f"store{world_size}"
        job = Job(config, data_dir, store, masked=True)
        reports[world_size] = run(world_size, job, tmp_path / f"group{world_size}")
        rows[world_size] = metrics_of(store)
    # Row r keeps its last 5 r mod 16 targets, and every third row none.
    by_hand = [sum(0 if r % 3 == 0 else 5 * r % 16 for r in range(32 * step, 32 * step + 32)) for step in (0, 1)]
    for world_size in (1, 3, 5, 7):
        assert [row["tokens"] for row in rows[world_size]] == by_hand
        assert reports[world_size].batches() == reports[1].batches()
        for mine, alone in zip(rows[world_size], rows[1], strict=True):
            assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert mine["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-5)
        for gradient, of_one in zip(reports[world_size].gradients, reports[1].gradients, strict=True):
            assert relative_error(gradient, of_one) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_step_from_a_checkpoint_is_the_same_at_any_world_size(
    config: TrainConfig,
    data_dir: Path,
    tmp_path: Path,
    metrics_of: MetricsOf,
    with_optimizer: Callable[..., TrainConfig],
    optimizer: str,
) -> None:
    config = with_optimizer(changed(config, checkpoint_every_steps=2, keep_last=10), name=optimizer)
    whole = run(1, Job(config, data_dir, tmp_path / "whole"), tmp_path / "group")
    rows = metrics_of(tmp_path / "whole")
    for world_size in (2, 3):
        stores = {step: tmp_path / f"{world_size}-{step}" for step in (2, 4)}
        jobs = [
            Job(config, data_dir, only_checkpoint(tmp_path / "whole", step, store), stop_after=step + 1)
            for step, store in stores.items()
        ]
        reports = run_jobs(world_size, jobs, tmp_path / f"group{world_size}")
        assert reports is not None
        for (step, store), report in zip(stores.items(), reports, strict=True):
            assert report.steps == [step]
            row = metrics_of(store)[-1]
            assert row["loss"] == pytest.approx(rows[step]["loss"], rel=1e-5)
            assert row["gradient_norm"] == pytest.approx(rows[step]["gradient_norm"], rel=1e-5)
            assert relative_error(report.gradients[0], whole.gradients[step]) < 1e-5


def test_kills_at_changing_world_sizes_repeat_and_lose_no_sample(
    config: TrainConfig, data_dir: Path, tmp_path: Path, metrics_of: MetricsOf
) -> None:
    config = changed(config, num_steps=12, checkpoint_every_steps=2)
    draw = random.Random(4)
    attempts: list[Attempt] = []
    for number in range(6):
        world_size = draw.choice([1, 2, 3])
        # All but the last are killed up to five steps after their beginning, between two checkpoints or at one.
        step = newest_step(tmp_path / "store") + draw.randrange(5)
        strike = {} if number == 5 else {"kill_step": min(step, 11), "kill_in": draw.choice(["batch", "poll"])}
        store, rank, lease_id = tmp_path / "store", draw.randrange(world_size), f"lease-{number}"
        job = Job(config, data_dir, store, lease_id=lease_id, kill_rank=rank, **strike)  # type: ignore[arg-type]
        ended = run_jobs(world_size, [job], tmp_path / f"group{number}")
        assert (ended is None) == (number < 5)
        attempts.append(Attempt(lease_id, world_size, tmp_path / f"group{number}"))

    seen = seen_by_weights(tmp_path / "store", attempts)
    assert [step["step"] for step in seen] == list(range(12))
    assert [sample for step in seen for sample in step["samples"]] == list(range(12 * 32))
    shards = TokenShards(data_dir, "train", 16)
    source, window = sample_places(np.arange(12 * 32), shards.weights, shards.num_windows, config.seed)
    assert [place for step in seen for place in step["sources"]] == source.tolist()
    assert [place for step in seen for place in step["windows"]] == window.tolist()
    assert [row["tokens"] for row in metrics_of(tmp_path / "store")][-1] == 32 * 16
    undisturbed = run(1, Job(config, data_dir, tmp_path / "alone"), tmp_path / "alone-group")
    assert [step["rows"] for step in seen] == undisturbed.rows

"""Several processes: the same run as one, whatever their number, and the same end on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.configs import changed
from trainer.checkpoints.lineage import checkpoints_of_chain, read_manifest
from trainer.config import TrainConfig
from trainer.loop import Result
from trainer.run_store.base import DirectoryStore

RunSingle = Callable[..., Result]
RunGroup = Callable[..., list[list[dict[str, Any]]]]
SavedTensors = Callable[[Path], dict[str, Tensor]]
MetricsOf = Callable[[Path], list[dict[str, Any]]]
WithOptimizer = Callable[..., TrainConfig]


def job(config: TrainConfig, store: Path, **options: Any) -> dict[str, Any]:
    return {"config": asdict(config), "store": str(store), **options}


def relative_error(tensor: Tensor, two: Tensor) -> float:
    return float((tensor - two).norm() / two.norm())


def first_moments(tensors: dict[str, Tensor]) -> Tensor:
    """All of them as one vector: after one step, the clipped gradient times a constant of each optimizer."""
    names = sorted(name for name in tensors if name.endswith(("/exp_avg", "/momentum_buffer")))
    return torch.cat([tensors[name].flatten() for name in names])


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_step_of_a_group_is_one_step_of_a_single_process(
    tiny: TrainConfig,
    run_single: RunSingle,
    run_group: RunGroup,
    tmp_path: Path,
    saved_tensors: SavedTensors,
    metrics_of: MetricsOf,
    with_optimizer: WithOptimizer,
    world_size: int,
) -> None:
    # Shares of 8: 4 and 4, or 2, 3 and 3. Of 2 on three ranks: 0, 1 and 1, so that one rank has nothing.
    cases = {
        "even pieces": changed(tiny, micro_batch_size=4),
        "ragged pieces": changed(tiny, micro_batch_size=1),
        "an empty share": changed(tiny, global_batch_size=2, eval_sequences=2),
        "adamw": with_optimizer(tiny, name="adamw"),
    }
    starts = {name: tmp_path / name for name in cases}
    run_group(world_size, [job(config, starts[name], stop_after=1, wishes={}) for name, config in cases.items()])
    for name, config in cases.items():
        run_single(config, tmp_path / f"{name} alone", stop_after=1)
        together, alone = metrics_of(starts[name])[0], metrics_of(tmp_path / f"{name} alone")[0]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6), name
        assert together["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-5), name
        moments = [first_moments(saved_tensors(folder)) for folder in (starts[name], tmp_path / f"{name} alone")]
        assert moments[1].norm() > 0
        assert relative_error(*moments) < 1e-5, name


def test_two_workers_resume_to_bitwise_the_same_weights(
    tiny: TrainConfig, run_group: RunGroup, tmp_path: Path, with_optimizer: WithOptimizer, metrics_of: MetricsOf
) -> None:
    jobs, names = [], []
    for optimizer in ("muon", "adamw"):
        for precision in ("fp32", "bf16"):
            config = with_optimizer(replace(tiny, precision=precision), name=optimizer)
            name = f"{optimizer}-{precision}"
            jobs.append(job(config, tmp_path / f"{name}-whole"))
            for stop in (1, 2, 5):
                jobs.append(job(config, tmp_path / f"{name}-{stop}", stop_after=stop))
                jobs.append(job(config, tmp_path / f"{name}-{stop}"))
            names.append(name)
    results = iter(run_group(2, jobs))
    for name in names:
        whole = next(results)
        assert whole[0] == whole[1]
        assert whole[0]["outcome"] == "finished"
        losses = [row["loss"] for row in metrics_of(tmp_path / f"{name}-whole")]
        for stop in (1, 2, 5):
            assert [(each["outcome"], each["step"]) for each in next(results)] == [("stopped", stop)] * 2
            assert next(results) == whole
            assert [row["loss"] for row in metrics_of(tmp_path / f"{name}-{stop}")] == losses


def test_a_run_goes_on_at_another_world_size_from_the_same_weights_and_position(
    tiny: TrainConfig,
    run_single: RunSingle,
    run_group: RunGroup,
    tmp_path: Path,
    metrics_of: MetricsOf,
) -> None:
    run_single(tiny, tmp_path / "whole")
    run_single(tiny, tmp_path / "run", stop_after=2)
    two = run_group(2, [job(tiny, tmp_path / "run", stop_after=2), job(tiny, tmp_path / "run", stop_after=4)])
    alone = run_single(tiny, tmp_path / "run", stop_after=4)
    assert two[1][0]["weights_sha256"] == two[1][1]["weights_sha256"] == alone.weights_sha256
    run_single(tiny, tmp_path / "run")
    rows, whole = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in whole]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in whole]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-3)
    worlds = [json.loads((tmp_path / "run" / "incarnations" / f"{n}.json").read_text())["world_size"] for n in range(5)]
    assert worlds == [1, 2, 2, 1, 1]


def test_a_checkpoint_goes_from_replicated_to_sharded_and_back_to_one_worker(
    tiny: TrainConfig,
    run_single: RunSingle,
    run_group: RunGroup,
    tmp_path: Path,
    saved_tensors: SavedTensors,
    metrics_of: MetricsOf,
    with_optimizer: WithOptimizer,
) -> None:
    configs = {name: with_optimizer(tiny, name=name) for name in ("muon", "adamw")}
    jobs = []
    for name, config in configs.items():
        jobs += [
            job(config, tmp_path / f"{name}-replicated", stop_after=2),
            job(config, tmp_path / f"{name}-again", stop_after=2),
            job(config, tmp_path / f"{name}-again", sharded=True, save_again=True),
            job(config, tmp_path / name, stop_after=2),
            job(changed(config, micro_batch_size=4), tmp_path / name, sharded=True, stop_after=3),
        ]
    run_group(2, jobs)
    for name, config in configs.items():
        # Nothing was trained: what a sharded group has read is what it saved, bit by bit.
        replicated, sharded = saved_tensors(tmp_path / f"{name}-replicated"), saved_tensors(tmp_path / f"{name}-again")
        assert sharded.keys() == replicated.keys()
        assert all(torch.equal(sharded[item], replicated[item]) for item in sharded if not item.startswith("random/"))
        store = DirectoryStore(tmp_path / f"{name}-again")
        head = read_manifest(store, checkpoints_of_chain(store)[0]).tensors["model/head.weight"]
        assert [(item["offsets"], item["sizes"], item["part"]) for item in head["chunks"]] == [
            ([0, 0], [32, 16], 0),
            ([32, 0], [32, 16], 1),
        ]
        run_single(config, tmp_path / name, stop_after=4)
    run_group(2, [job(config, tmp_path / name, sharded=True) for name, config in configs.items()])
    for name, config in configs.items():  # 2 replicated, 2 sharded with another micro-batch, 1, 2 sharded to the end
        run_single(config, tmp_path / f"{name}-whole")
        rows, whole = metrics_of(tmp_path / name), metrics_of(tmp_path / f"{name}-whole")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-3)
        norms = [row["gradient_norm"] for row in whole]
        assert [row["gradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-2)


@pytest.fixture(scope="module")
def ends(tiny: TrainConfig, run_group: RunGroup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One group of two that ran one job after the other: the reports and where each was stored."""
    folder = tmp_path_factory.mktemp("ends")
    wishes = {"1": {"1": {"checkpoint": True}}, "3": {"1": {"stop": True, "reason": "notice"}}}
    jobs = {
        "wished": job(tiny, folder / "wished", wishes=wishes),
        "one step": job(tiny, folder / "broken", stop_after=1),
        "broken": job(tiny, folder / "broken", stop_after=3, broken_upload_on=1),
    }
    return {"folder": folder, **dict(zip(jobs, run_group(2, list(jobs.values())), strict=True))}


def test_what_one_rank_wants_all_do_at_the_same_step(ends: dict[str, Any]) -> None:
    assert [(each["outcome"], each["step"]) for each in ends["wished"]] == [("stopped", 4)] * 2
    assert [place.step for place in checkpoints_of_chain(DirectoryStore(ends["folder"] / "wished"))] == [4, 2]


def test_each_rank_saves_its_share(ends: dict[str, Any]) -> None:
    store = DirectoryStore(ends["folder"] / "wished")
    sizes = {key.rsplit("/", 1)[1]: len(store.read(key)) for key in store.list("checkpoints/incarnation=0/step=4/")}
    assert sizes.keys() == {"part-00000.bin", "part-00001.bin", "manifest.json"}
    assert 0.4 < sizes["part-00000.bin"] / sizes["part-00001.bin"] < 2.5


def test_an_upload_that_fails_on_one_rank_is_raised_on_all_and_leaves_no_checkpoint(
    ends: dict[str, Any],
) -> None:
    assert [each["outcome"] for each in ends["one step"]] == ["stopped", "stopped"]
    assert [each["error"] for each in ends["broken"]] == ["StoreError", "StoreError"]
    assert all("this rank's disk is full" in each["message"] for each in ends["broken"])
    assert [place.step for place in checkpoints_of_chain(DirectoryStore(ends["folder"] / "broken"))] == [1]

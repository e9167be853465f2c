"""What saving costs training: the stall of a checkpoint that is stored in the background, beside a synchronous save.

    python bench/checkpoint.py [--gigabytes 1.05] [--saves 5] [--folder DIR]

Prints JSON. Between two saves a step of training is played by matrix products on this process's threads, so that the
writer competes with it as it would on a node. `synchronous` is our own save waited for; torch's `dcp.save` and
`dcp.async_save` stand beside it as they come. The state lies in memory, the store is a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cost.market.preemption import checkpoint_interval_seconds
from trainer.checkpoints.interval import SAVES_PER_INTERVAL
from trainer.checkpoints.manager import Checkpoints, Counters, Identity
from trainer.config import TrainConfig
from trainer.run_store.base import DirectoryStore

LOSSES_PER_NODE_HOUR = 0.6
NUM_TENSORS = 150
STALL_BOUND = 0.05
"""Of a synchronous save, from the second save on."""
TIME_BOUND = 0.01
"""Of training time, at the interval of Young and Daly."""
MATRIX_SIZE = 1024


def main() -> int:
    options = argparse.ArgumentParser(description="Measure how long training waits for a checkpoint; prints JSON.")
    options.add_argument("--gigabytes", type=float, default=1.05)
    options.add_argument("--saves", type=int, default=5, help="of each kind, after the first")
    options.add_argument("--folder", type=Path, help="where to store; default: a temporary folder")
    given = options.parse_args()
    warnings.filterwarnings("ignore")  # torch says often that one process is no group
    state = make_state(given.gigabytes)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory(prefix="slm-bench-", dir=given.folder) as name:
        folder = Path(name)
        synchronous = measured(given.saves, ours(folder / "sync", state, durable=True))
        background = measured(given.saves, ours(folder / "background", state, durable=False))
        for each in ("sync", "background"):
            shutil.rmtree(folder / each)
        torch_sync = measured(max(1, given.saves // 2), torchs(folder / "dcp", state, background=False))
        torch_async = measured(max(1, given.saves // 2), torchs(folder / "dcp-async", state, background=True))
    stall = statistics.median(save["stall_seconds"] for save in background[1:])
    durable = statistics.median(save["save_seconds"] for save in background[1:])
    sync_seconds = statistics.median(synchronou["stall_seconds"] for synchronou in synchronous[1:])
    dcp_seconds = statistics.median(save["stall_seconds"] for save in torch_sync[1:])
    dcp_stall = statistics.median(save["stall_seconds"] for save in torch_async[1:])
    interval = checkpoint_interval_seconds(stall, LOSSES_PER_NODE_HOUR, 0.0, SAVES_PER_INTERVAL * durable)
    writer = [save["writer_cpu_seconds"] for save in background[1:]]
    report = {
        "gigabytes": round(num_bytes / 1e9, 3),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "first_save_stall_seconds": round(background[0]["stall_seconds"], 3),
        "stall_seconds": round(stall, 4),
        "stalls_seconds": [round(save["stall_seconds"], 4) for save in background[1:]],
        "durable_after_seconds": round(durable, 3),
        "synchronous_seconds": round(sync_seconds, 3),
        "stall_share_of_synchronous": round(stall / sync_seconds, 4),
        "dcp_save_seconds": round(dcp_seconds, 3),
        "stall_share_of_dcp_save": round(stall / dcp_seconds, 4),
        "dcp_async_save_first_stall_share": round(torch_async[0]["stall_seconds"] / dcp_seconds, 4),
        "dcp_async_save_stall_share": round(dcp_stall / dcp_seconds, 4),
        "writer_cpu_seconds": round(statistics.median(writer), 3),
        "writer_cpu_share_while_saving": round(statistics.median(writer) / durable, 3),
        "step_seconds_alone": round(statistics.median(background[-1]["steps_alone"]), 4),
        "step_seconds_while_saving": round(
            statistics.median(chain.from_iterable(save["steps"] for save in background[1:])), 4
        ),
        "losses_per_node_hour": LOSSES_PER_NODE_HOUR,
        "interval_seconds": round(interval, 1),
        "stall_share_of_training_time": round(stall / (interval + stall), 5),
        "writer_cpu_share_of_one_core": round(statistics.median(writer) / interval, 5),
        "within_bounds": stall / sync_seconds <= STALL_BOUND and stall / (interval + stall) <= TIME_BOUND,
    }
    assert math.isfinite(interval)
    print(json.dumps(report, indent=1))
    return 0


Save = Callable[[int], dict[str, Any]]


def make_state(gigabytes: float) -> dict[str, torch.Tensor]:
    """Tensors of the sizes that a model's weights and moments have: mostly a few megabytes."""
    size = int(gigabytes * 1e9 / 4 / NUM_TENSORS / 1024) + 1
    return {f"tensor/{number}": torch.full((size, 1024), float(number)) for number in range(NUM_TENSORS)}


def measured(saves: int, save: Save) -> list[dict[str, Any]]:
    """The first save and so many more."""
    return [save(number) for number in range(saves + 1)]


def ours(folder: Path, state: dict[str, torch.Tensor], *, durable: bool) -> Save:
    checkpoints = Checkpoints(DirectoryStore(folder), rank=0, world_size=1, keep_last=2)
    identity = Identity(TrainConfig(), "tokenizer", "data")
    checkpoints.begin(state, identity, "bench")

    def save(number: int) -> dict[str, Any]:
        alone = [step() for _ in range(5)]
        began = time.monotonic()
        checkpoints.save(state, identity, Counters(step=number + 1), durable=durable)
        stall = time.monotonic() - began
        steps = []
        while checkpoints.is_saving:
            steps.append(step())
        checkpoints.wait()
        return {
            "stall_seconds": stall,
            "save_seconds": checkpoints.last_save_seconds,
            "writer_cpu_seconds": checkpoints.last_cpu_seconds,
            "steps": steps,
            "steps_alone": alone,
        }

    return save


def torchs(folder: Path, state: dict[str, torch.Tensor], *, background: bool) -> Save:
    def save(number: int) -> dict[str, Any]:
        target = folder / str(number)
        began = time.monotonic()
        if background:
            pending = dcp.async_save(state, checkpoint_id=target, no_dist=True)
        else:
            dcp.save(state, checkpoint_id=target, no_dist=True)
        stall = time.monotonic() - began
        if background:
            pending.result()  # type: ignore[union-attr]
        shutil.rmtree(target)
        return {"stall_seconds": stall}

    return save


MATRIX = torch.full((MATRIX_SIZE, MATRIX_SIZE), 0.5)


def step() -> float:
    """A little training; how long it took."""
    began = time.monotonic()
    for _ in range(3):
        torch.mm(MATRIX, MATRIX)
    return time.monotonic() - began


if __name__ == "__main__":
    raise SystemExit(main())

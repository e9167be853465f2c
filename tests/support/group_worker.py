"""One of several processes that train together, started by `run_group`.

`python -m tests.support.group_worker DATA_DIR FOLDER` reads FOLDER/jobs.json and writes FOLDER/report<rank>.json; the
processes find each other as torchrun's do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from cost.errors import SlmError
from tests.support.configs import config_from
from trainer.checkpoints.manager import Checkpoints, Identity
from trainer.config import TrainConfig
from trainer.loop import Signal, fabric_precision, train
from trainer.model.transformer import build_model
from trainer.optim import Updates
from trainer.parallel import strategy_class, strategy_options
from trainer.run_store.base import Bytes, DirectoryStore


class Wishes:
    """Asks for what `wishes` says of this rank: {"step": {"rank": Signal fields}}."""

    def __init__(self, wishes: dict[str, dict[str, dict[str, Any]]], rank: int) -> None:
        self.wishes = wishes
        self.rank = rank

    def poll(self, step: int) -> Signal:
        return Signal(**self.wishes.get(str(step), {}).get(str(self.rank), {}))


def job(
    fabric: Fabric,
    data_dir: Path,
    *,
    config: dict[str, Any],
    store: str,
    stop_after: int | None = None,
    wishes: dict[str, dict[str, dict[str, Any]]] | None = None,
    broken_upload_on: int | None = None,
    save_again: bool = False,
) -> dict[str, Any]:
    """Train once; returns the result or the error that this rank saw.

    With `save_again` nothing is trained: what was read is saved once more, as the next step.
    """
    told = config_from(config)
    target = BrokenUpload(Path(store)) if fabric.global_rank == broken_upload_on else DirectoryStore(Path(store))
    if save_again:
        return saved_again(fabric, told, target)
    try:
        result = train(
            told,
            fabric=fabric,
            data_dir=data_dir,
            store=target,
            lease_id="lease-0",
            signals=Wishes(wishes or {}, fabric.global_rank),
            phase=lambda name: None,
            stop_after=stop_after,
        )
    except SlmError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return asdict(result)


def saved_again(fabric: Fabric, config: TrainConfig, store: DirectoryStore) -> dict[str, Any]:
    weights = build_model(config.model, seed=99)
    fabric.setup_module(weights)
    updates = Updates(weights, config.optimizer)
    tensors = {f"model/{name}": value.detach() for name, value in weights.named_parameters()}
    tensors |= {f"optimizer/{name}": value for name, value in updates.state().items()}
    checkpoints = Checkpoints(store, rank=fabric.global_rank, world_size=fabric.world_size, keep_last=9)
    identity = Identity(config, "t" * 64, "f" * 64)
    counters = checkpoints.begin(tensors, identity, "lease-0")
    counters.step += 1
    checkpoints.save(tensors, identity, counters)
    return {"bytes_read": checkpoints.bytes_read}


class BrokenUpload(DirectoryStore):
    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        raise self.failure(key)

    def failure(self, key: str) -> SlmError:
        from trainer.run_store.base import StoreError

        return StoreError(f"cannot upload {key}: this rank's disk is full")


def main() -> None:
    data_dir, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    reports = []
    fabrics: dict[str, Fabric] = {}
    for arguments in json.loads((folder / "jobs.json").read_text()):
        if arguments.pop("sharded", False):
            arguments["config"]["execution"]["sharding"] = "sharded"
        kind = config_from(arguments["config"])
        if (name := f"{kind.precision} {kind.execution.sharding}") not in fabrics:
            world_size = int(os.environ["WORLD_SIZE"])
            options = strategy_options(kind, world_size)
            fabrics[name] = Fabric(
                accelerator="cpu",
                devices=world_size,
                strategy=strategy_class(kind)(process_group_backend="gloo", **options),
                precision=fabric_precision(kind),
            )
            fabrics[name].launch()
        fabric = fabrics[name]
        reports.append(job(fabric, data_dir, **arguments))
    (folder / f"report{fabric.global_rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()

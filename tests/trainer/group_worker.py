"""One of several processes that train together: `group_worker.py DATA_DIR FOLDER`, started by `run_group`.

Reads FOLDER/jobs.json and writes FOLDER/report<rank>.json; the processes find each other as torchrun's do.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from cost.errors import SlmError
from trainer.config import ModelConfig, OptimizerConfig, TrainConfig
from trainer.loop import Signal, fabric_precision, train
from trainer.parallel import strategy_class, strategy_options
from trainer.store import DirectoryStore


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
) -> dict[str, Any]:
    """Train once; returns the result or the error that this rank saw."""
    fields = {**config, "model": ModelConfig(**config["model"]), "optimizer": OptimizerConfig(**config["optimizer"])}
    target = BrokenUpload(Path(store)) if fabric.global_rank == broken_upload_on else DirectoryStore(Path(store))
    try:
        result = train(
            TrainConfig(**fields),
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


class BrokenUpload(DirectoryStore):
    def upload(self, key: str, source: Path) -> None:
        raise self.failure(key)

    def failure(self, key: str) -> SlmError:
        from trainer.store import StoreError

        return StoreError(f"cannot upload {key}: this rank's disk is full")


def main() -> None:
    data_dir, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    reports = []
    fabrics: dict[str, Fabric] = {}
    for arguments in json.loads((folder / "jobs.json").read_text()):
        asked = {name: arguments["config"][name] for name in ("precision", "sharding")}
        kind = TrainConfig(**asked)
        if (name := " ".join(asked.values())) not in fabrics:
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

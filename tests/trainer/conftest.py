"""A small learnable data set, a small run on it, and groups of real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.checkpoints.lineage import checkpoints_of_chain
from trainer.checkpoints.manager import read_tensors
from trainer.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer.loop import Result, Signal, fabric_precision, train
from trainer.run_store.base import DirectoryStore, Store

VOCAB_SIZE = 64
GROUP_TIMEOUT_SECONDS = 600
ROOT = Path(__file__).parents[2]

TINY = TrainConfig(
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        sequence_length=16,
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        hidden_size=32,
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=2, decay_fraction=0.5),
    num_steps=6,
    precision="fp32",
    seed=5,
    batch=BatchConfig(global_batch_size=8, micro_batch_size=3),  # pieces of 3, 3 and 2
    evaluation=EvaluationConfig(eval_every_steps=4, eval_sequences=8),
    execution=ExecutionConfig(num_threads=1),
    checkpoint=CheckpointConfig(interval_seconds=3600),
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> TrainConfig:
    return TINY


def write_data(folder: Path, sources: dict[str, tuple[float, list[int]]], seed: int = 0) -> Path:
    """Sources of shards of so many tokens, with weights. The next token is 3 x + 7 (mod vocabulary), mostly."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    splits: dict[str, Any] = {}
    for split in ("train", "heldout"):
        entries = []
        for name, (weight, sizes) in sources.items():
            shards = []
            for number, size in enumerate(sizes):
                tokens = np.empty(size, dtype="<u2")
                tokens[0] = rng.integers(VOCAB_SIZE)
                noise = rng.random(size) < 0.1
                for i in range(1, size):
                    tokens[i] = rng.integers(VOCAB_SIZE) if noise[i] else (3 * int(tokens[i - 1]) + 7) % VOCAB_SIZE
                file = f"{split}-{name}-{number:05d}.bin"
                tokens.tofile(folder / file)
                shards.append({"file": file, "num_tokens": size, "sha256": ""})
            entries.append({"name": name, "weight": weight, "shards": shards})
        splits[split] = {"sources": entries}
    index = {
        "version": 1,
        "vocab_size": VOCAB_SIZE,
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": "t" * 64,
        "bytes_per_token": 1.0,
        "splits": splits,
        "heldout_unigram_entropy_nats": 4.1,
        "fingerprint": "f" * 64,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Path]:
    return write_data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), {"text": (0.7, [1500, 900]), "code": (0.3, [700])})


class Quiet:
    """Wants nothing."""

    def poll(self, step: int) -> Signal:
        return Signal()


@pytest.fixture(scope="session")
def run_single(data_dir: Path) -> Callable[..., Result]:
    """Train in this process; the second argument is a store or its folder."""

    def run(config: TrainConfig, store: Store | Path, **options: Any) -> Result:
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1, precision=fabric_precision(config))
        arguments: dict[str, Any] = {
            "data_dir": data_dir,
            "lease_id": "lease-0",
            "signals": Quiet(),
            "phase": lambda name: None,
            **options,
        }
        return train(
            config, fabric=fabric, store=DirectoryStore(store) if isinstance(store, Path) else store, **arguments
        )

    return run


@pytest.fixture(scope="session")
def run_group(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[dict[str, Any]]]]:
    """Train in `world_size` processes that all-reduce by gloo. Each job is keyword arguments of `group_worker.job`.

    Returns, per job, what each rank reports.
    """

    def run(world_size: int, jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder = tmp_path_factory.mktemp("group")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        workers = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "TORCHELASTIC_RUN_ID": "test",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "tests.support.group_worker", str(data_dir), str(folder)]
            log = (folder / f"log{rank}").open("w")
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
            log.close()
        try:
            codes = [worker.wait(timeout=GROUP_TIMEOUT_SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait(timeout=10)
        logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(world_size))
        assert codes == [0] * world_size, logs
        reports = [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(world_size)]
        return [list(of_job) for of_job in zip(*reports, strict=True)]

    return run


@pytest.fixture(scope="session")
def saved_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of the newest checkpoint in a store's folder."""

    def read(folder: Path) -> dict[str, Tensor]:
        store = DirectoryStore(folder, create=False)
        return read_tensors(store, checkpoints_of_chain(store)[0], prefix="")

    return read


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Every row of a store's metrics, the newest incarnation's where steps were repeated."""

    def read(folder: Path) -> list[dict[str, Any]]:
        store = DirectoryStore(folder, create=False)
        rows: dict[int, dict[str, Any]] = {}
        for key in sorted(store.list("metrics/"), key=lambda key: int(key.split("/")[1].removeprefix("incarnation="))):
            rows |= {row["step"]: row for row in map(json.loads, store.read(key).splitlines())}
        return [rows[step] for step in sorted(rows)]

    return read


@pytest.fixture(scope="session")
def with_optimizer() -> Callable[..., TrainConfig]:
    """A configuration with other optimizer fields."""
    return lambda config, **fields: replace(config, optimizer=replace(config.optimizer, **fields))

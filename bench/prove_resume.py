"""Killed anywhere and resumed, a run is bitwise what it would have been: loss curve, gradient norms and weights.

    python -m bench.prove_resume --kills 50 --seed 0

The real loop in real processes (Fabric, gloo between two workers, a folder as the store), for one and two workers,
AdamW and Muon, fp32 and bf16, with gradient accumulation. Every process that trains is ended by SIGKILL: inside a step,
before, in the middle of and after writing a part or a manifest, while it deletes, while an incarnation begins, or at a
random time. Then the same run continues, until the next kill. At its end it is compared with the run that was never
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from bench.forked import Forked
from tasks import run_store_keys as keys
from trainer.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer.loop import Signal, fabric_precision, train
from trainer.run_store.base import Bytes, DirectoryStore

VOCAB_SIZE = 64
CONFIG = TrainConfig(
    model=ModelConfig(VOCAB_SIZE, 16, num_layers=2, width=16, num_heads=2, num_kv_heads=1, hidden_size=32),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, decay_fraction=0.5),
    num_steps=24,
    seed=5,
    # One worker's 8 sequences in pieces of 3, 3 and 2; two workers' 4 in 3 and 1.
    batch=BatchConfig(global_batch_size=8, micro_batch_size=3),
    evaluation=EvaluationConfig(eval_every_steps=8, eval_sequences=8),
    execution=ExecutionConfig(num_threads=1),
    checkpoint=CheckpointConfig(interval_seconds=3600, every_steps=2),
)
CASES = tuple(itertools.product((1, 2), ("muon", "adamw"), ("fp32", "bf16")))
"""World size, optimizer, precision."""
MOMENTS = {
    "before a part": ("before", "part"),
    "in the middle of a part": ("within", "part"),
    "after a part": ("after", "part"),
    "before a manifest": ("before", "manifest"),
    "after a manifest": ("after", "manifest"),
    "before a deletion": ("before", "deletion"),
    "before an incarnation begins": ("before", "incarnation"),
    "after an incarnation began": ("after", "incarnation"),
}
"""When around which change of the store."""
PLACES = ("in a step", *MOMENTS, "at a random time")
RANDOM_SECONDS = 1.0
GROUP_SECONDS = 120.0


def main() -> int:
    options = argparse.ArgumentParser(description="Kill training anywhere, resume it, and compare bit by bit.")
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(given.seed)
    began = time.monotonic()
    places = [PLACES[number % len(PLACES)] for number in range(given.kills)]
    rng.shuffle(places)
    with tempfile.TemporaryDirectory(prefix="slm-resume-") as name:
        folder = Path(name)
        write_data(folder / "data")
        shares = [places[number :: len(CASES)] for number in range(len(CASES))]
        cases = [prove(Case(*case, folder), share, rng) for case, share in zip(CASES, shares, strict=True) if share]
    report = {
        "seed": given.seed,
        "kills": sum(case["kills"] for case in cases),
        "bitwise_the_same": all(case["same"] for case in cases),
        "killed": dict(Counter(places)),
        "cases": cases,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(report, indent=1))
    return 0 if report["bitwise_the_same"] and report["kills"] >= given.kills else 1


@dataclass(frozen=True)
class Case:
    world_size: int
    optimizer: str
    precision: str
    folder: Path

    @property
    def config(self) -> TrainConfig:
        optimizer = replace(CONFIG.optimizer, name=self.optimizer)
        return replace(CONFIG, optimizer=optimizer, precision=self.precision)

    def store(self, name: str) -> Path:
        return self.folder / f"{self.world_size}-{self.optimizer}-{self.precision}-{name}"


@dataclass(frozen=True)
class Kill:
    """Where one rank of a group ends itself, or, with `after_seconds`, is ended."""

    place: str
    rank: int
    number: int
    """The n-th step or change of that kind."""
    after_seconds: float


def prove(case: Case, places: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """One run killed at all these places in turn, beside one that is left alone."""
    alone, killed = case.store("alone"), case.store("killed")
    assert run_group(case, alone, None), (alone / "log").read_text()[-2000:]
    waiting, kills, finished = list(places), 0, False
    while waiting or not finished:
        if finished and waiting:  # the run came to its end between two kills: it is killed again from the beginning
            finished = compare(alone, killed)["same"]
            if not finished:
                break
            killed = case.store(f"killed-{kills}")
        kill = a_kill(waiting.pop(0), case, rng) if waiting else None
        finished = run_group(case, killed, kill)
        kills += kill is not None and not finished
        if finished and kill is not None:
            waiting.append(kill.place)  # it ended before that moment came
    return {
        "workers": case.world_size,
        "optimizer": case.optimizer,
        "precision": case.precision,
        "kills": kills,
        **compare(alone, killed),
    }


def a_kill(place: str, case: Case, rng: random.Random) -> Kill:
    rank = 0 if "manifest" in place or "deletion" in place or "incarnation" in place else rng.randrange(case.world_size)
    return Kill(place, rank, rng.randint(1, 1 if "incarnation" in place else 3), rng.uniform(0.0, RANDOM_SECONDS))


def run_group(case: Case, store: Path, kill: Kill | None) -> bool:
    """Train until the end or the kill; whether it came to its end."""
    store.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        Forked(lambda say, rank=rank: work(case, store, rank, port, kill, say), store / "log")
        for rank in range(case.world_size)
    ]
    due = None
    if kill is not None and kill.place == "at a random time":
        ranks[kill.rank].line()  # it says so once it trains
        due = time.monotonic() + kill.after_seconds
    deadline = time.monotonic() + GROUP_SECONDS
    try:
        while any(rank.poll() is None for rank in ranks):
            if due is not None and time.monotonic() >= due:
                ranks[kill.rank].kill()  # type: ignore[union-attr]
            if any(rank.poll() not in (None, 0) for rank in ranks):
                break  # one is dead: the whole group is lost, as when a node goes
            assert time.monotonic() < deadline, f"a group hangs: {(store / 'log').read_text()[-2000:]}"
            time.sleep(0.005)
    finally:
        for rank in ranks:
            rank.kill()
        codes = [rank.wait() for rank in ranks]
        for rank in ranks:
            rank.close()
    bugs = [code for code in codes if code not in (0, -signal.SIGKILL)]
    assert not bugs or kill is not None, f"exit codes {codes}: {(store / 'log').read_text()[-2000:]}"
    return codes == [0] * case.world_size


def compare(alone: Path, killed: Path) -> dict[str, Any]:
    """The end and every step that was ever made, those made twice included."""
    results = [json.loads((folder / keys.RESULT).read_bytes()) for folder in (alone, killed)]
    curve = {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows_of(alone)}
    rows = rows_of(killed)
    differing = sorted({row["step"] for row in rows if (row["loss"], row["gradient_norm"]) != curve[row["step"]]})
    seen = {row["step"] for row in rows}
    same = not differing and seen == set(curve) and results[0] == results[1]
    return {
        "same": same,
        "differing_steps": differing,
        "incarnations": len(list((killed / keys.INCARNATIONS).iterdir())),
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob(f"{keys.METRICS}*/*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


# -- in a child


def work(case: Case, folder: Path, rank: int, port: int, kill: Kill | None, say: Callable[[str], None]) -> None:
    os.environ.update(
        TORCHELASTIC_RUN_ID="resume",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(case.world_size),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    strategy = DDPStrategy(process_group_backend="gloo") if case.world_size > 1 else "auto"
    fabric = Fabric(
        accelerator="cpu",
        devices=case.world_size,
        strategy=strategy,
        precision=fabric_precision(case.config),
    )
    fabric.launch()
    mine = kill if kill is not None and kill.rank == rank else None
    train(
        case.config,
        fabric=fabric,
        data_dir=case.folder / "data",
        store=KillingStore(folder, mine),
        lease_id="lease",
        signals=KillingSignals(mine, say),
        phase=lambda _: None,
    )
    sys.stdout.flush()
    os._exit(0)  # as quick as can be: nothing is left to do


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class KillingSignals:
    """Wants nothing; ends the process at the n-th step of this group where a kill says so."""

    def __init__(self, kill: Kill | None, say: Callable[[str], None]) -> None:
        self.kill, self.say, self.count = kill, say, 0

    def poll(self, step: int) -> Signal:
        del step
        self.count += 1
        if self.count == 1:
            self.say("trains")
        if self.kill is not None and self.kill.place == "in a step" and self.count == self.kill.number + 1:
            die()
        return Signal()


class KillingStore(DirectoryStore):
    """A folder whose n-th change of one kind is the last thing that the process does."""

    def __init__(self, root: Path, kill: Kill | None) -> None:
        super().__init__(root)
        self.when, self.what = MOMENTS.get(kill.place, ("", "")) if kill is not None else ("", "")
        self.number = 0 if kill is None else kill.number
        self.count = 0

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        if self._is_due("part") and self.when == "within":
            content = b"".join(pieces)
            with self._temp().open("xb") as half:
                half.write(content[: len(content) // 2])
                half.flush()
                die()
        self._around("part", lambda: super(KillingStore, self).write_pieces(key, pieces), counted=True)

    def write(self, key: str, data: bytes) -> None:
        kind = "manifest" if key.endswith(keys.MANIFEST) else ""
        self._around(kind, lambda: super(KillingStore, self).write(key, data))

    def delete(self, key: str) -> None:
        self._around("deletion", lambda: super(KillingStore, self).delete(key))

    def create(self, key: str, data: bytes) -> bool:
        made = []
        self._around("incarnation", lambda: made.append(super(KillingStore, self).create(key, data)))
        return made[0]

    def _is_due(self, kind: str) -> bool:
        if kind != self.what:
            return False
        self.count += 1
        return self.count == self.number

    def _around(self, kind: str, change: Callable[[], object], *, counted: bool = False) -> None:
        due = (kind == self.what and self.count == self.number) if counted else self._is_due(kind)
        if due and self.when == "before":
            die()
        change()
        if due and self.when == "after":
            die()


def write_data(folder: Path) -> None:
    """Sequences in which the next token is mostly 3 x + 7 (mod the vocabulary)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split, size in (("train", 4000), ("heldout", 800)):
        tokens = np.empty(size, dtype="<u2")
        tokens[0] = 1
        noise = rng.random(size) < 0.1
        for i in range(1, size):
            tokens[i] = rng.integers(VOCAB_SIZE) if noise[i] else (3 * int(tokens[i - 1]) + 7) % VOCAB_SIZE
        tokens.tofile(folder / f"{split}.bin")
        shards = [{"file": f"{split}.bin", "num_tokens": size, "sha256": ""}]
        splits[split] = {"sources": [{"name": "text", "weight": 1.0, "shards": shards}]}
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


if __name__ == "__main__":
    raise SystemExit(main())

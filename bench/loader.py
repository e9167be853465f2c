"""How many tokens per second of one core the loader gives: batches as the training loop takes them, from real shards.

    python bench/loader.py [--json] [--seconds 2]

The shards are written to a temporary folder and read through memory maps; the file cache is warm, as it is for all but
the first epoch. CPU time, not wall time: reading is what training does not wait for, the core is what it takes away.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.loader import Loader, TokenShards

FLOOR_TOKENS_PER_CPU_SECOND = 100e6
SHARD_TOKENS = 2**24
SOURCES = {"text": (0.7, 3), "code": (0.3, 2)}
"""Weight, and how many shards."""
MEAN_DOCUMENT_TOKENS = 400
CASES = (
    # sequence_length, global_batch_size, world_size, max_documents
    (128, 32, 1, None),
    (1024, 32, 1, None),
    (1024, 512, 8, None),
    (2048, 512, 8, None),
    (2048, 512, 8, 64),
)


def write_shards(folder: Path) -> None:
    """Random tokens in documents of random lengths, in the form of `tasks.data.prepare`."""
    rng = np.random.default_rng(0)
    entries = []
    for name, (weight, count) in SOURCES.items():
        shards = []
        for number in range(count):
            file = f"train-{name}-{number:05d}.bin"
            rng.integers(0, 50_000, SHARD_TOKENS, dtype=np.uint16).astype("<u2").tofile(folder / file)
            shards.append({"file": file, "num_tokens": SHARD_TOKENS, "sha256": ""})
        total = count * SHARD_TOKENS
        starts = np.unique(rng.integers(1, total, total // MEAN_DOCUMENT_TOKENS)).astype(np.uint64)
        starts = np.union1d(starts, np.arange(count, dtype=np.uint64) * np.uint64(SHARD_TOKENS))
        np.save(folder / f"train-{name}-docs.npy", starts)
        entry = {"name": name, "weight": weight, "shards": shards, "num_documents": len(starts)}
        entries.append(entry | {"documents": f"train-{name}-docs.npy"})
    facts = {"version": 1, "vocab_size": 50_000, "tokenizer_sha256": "", "fingerprint": "random"}
    index = {**facts, "heldout_unigram_entropy_nats": 10.8, "splits": {"train": {"sources": entries}}}
    (folder / "index.json").write_text(json.dumps(index))


def measure(folder: Path, case: tuple[int, int, int, int | None], seconds: float) -> dict[str, Any]:
    """Rank 0's batches, one step after the other, until so much processor time is spent."""
    sequence_length, batch, world_size, max_documents = case
    shards = TokenShards(folder, "train", sequence_length, with_documents=max_documents is not None)
    loader = Loader(shards, batch, seed=1, max_documents=max_documents)
    for step in range(3):
        loader.batch(step, 0, world_size)
    tokens, step, began = 0, 3, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        tokens += loader.batch(step, 0, world_size).tokens.numel()
        step += 1
    return {
        "sequence_length": sequence_length,
        "global_batch_size": batch,
        "world_size": world_size,
        "max_documents": max_documents,
        "steps": step - 3,
        "tokens_per_cpu_second": round(tokens / spent),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of each case")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slm-loader-") as name:
        write_shards(Path(name))
        for shard in Path(name).glob("*.bin"):
            shard.read_bytes()  # into the file cache
        cases = [measure(Path(name), case, options.seconds) for case in CASES]
    slowest = min(case["tokens_per_cpu_second"] for case in cases if case["max_documents"] is None)
    holds = slowest >= FLOOR_TOKENS_PER_CPU_SECOND
    facts = {"cases": cases, "slowest_tokens_per_cpu_second": slowest, "floor": FLOOR_TOKENS_PER_CPU_SECOND}
    if options.json:
        print(json.dumps({**facts, "holds": holds}, indent=1))
    else:
        print(f"{'tokens':>7} {'batch':>6} {'world':>6} {'documents':>10} {'M tokens/cpu s':>15}")
        for case in cases:
            documents = case["max_documents"] or "-"
            shape = f"{case['sequence_length']:>7} {case['global_batch_size']:>6} {case['world_size']:>6}"
            print(f"{shape} {documents:>10} {case['tokens_per_cpu_second'] / 1e6:>15.0f}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

"""How many tokens each recipe needs: `speedrun` with Muon beside `llama` with AdamW, same data, batch and parameters.

`python -m bench.quality run` trains what is missing, one run after the other, and adds each to RESULTS when it is
done, so it can be stopped and started again; `report` prints the table. Learning rates are swept with seed 0, the
chosen ones run with SEEDS. A short run is a whole one: its rate falls to zero at its own end.
Text: the Python standard library of this machine, prepared as `slm prepare` does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tasks.recipe.load import load_recipe
from tasks.run_store_keys import METRICS
from trainer.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer.model.presets import expand

RESULTS = Path(__file__).resolve().parent / "results" / "quality-runs.jsonl"
SEEDS = (0, 1, 2)
FULL_STEPS = 400
SHORT_STEPS = 260
"""65 % of the tokens."""
EVERY_STEPS = 20
SHAPE = {"vocab_size": 1024, "sequence_length": 128, "num_layers": 4, "width": 128, "num_heads": 4, "num_kv_heads": 4}
LLAMA_HIDDEN = 352
RELU2_HIDDEN = 528
"""Two matrices of this size have as many weights as SwiGLU's three."""
LLAMA_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MUON_RATES = (0.01, 0.02, 0.04)
ADAMW_RATES = (4e-3, 8e-3, 1.6e-2)
"""Of what Muon leaves to AdamW."""
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Run:
    """One training: `part` says what it is for."""

    part: str
    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    num_steps: int
    seed: int

    def config(self) -> TrainConfig:
        return TrainConfig(
            model=self.model,
            optimizer=self.optimizer,
            num_steps=self.num_steps,
            precision="bf16",
            seed=self.seed,
            batch=BatchConfig(global_batch_size=16, micro_batch_size=16),
            evaluation=EvaluationConfig(eval_every_steps=EVERY_STEPS, eval_sequences=256),
            execution=ExecutionConfig(compile=True, num_threads=1),
            checkpoint=CheckpointConfig(interval_seconds=1e9),
        )

    def key(self) -> str:
        return f"{self.name} steps={self.num_steps} seed={self.seed}"


def llama(rate: float, seed: int = 0, part: str = "sweep", num_steps: int = FULL_STEPS) -> Run:
    model = ModelConfig(**expand({**SHAPE, "preset": "llama", "hidden_size": LLAMA_HIDDEN}))
    optimizer = OptimizerConfig(name="adamw", learning_rate=rate, weight_decay=WEIGHT_DECAY, warmup_steps=40)
    return Run(part, f"llama adamw lr={rate:g}", model, replace(optimizer, decay_fraction=0.4), num_steps, seed)


def speedrun(
    muon: float,
    adamw: float,
    seed: int = 0,
    part: str = "sweep",
    num_steps: int = SHORT_STEPS,
    label: str = "",
    model_fields: dict[str, Any] | None = None,
    optimizer_fields: dict[str, Any] | None = None,
) -> Run:
    fields = {**SHAPE, "preset": "speedrun", "hidden_size": RELU2_HIDDEN, **(model_fields or {})}
    optimizer = OptimizerConfig(
        name="muon", learning_rate=adamw, muon_learning_rate=muon, weight_decay=WEIGHT_DECAY, warmup_steps=20
    )
    optimizer = replace(optimizer, decay_fraction=0.6, **(optimizer_fields or {}))
    name = f"speedrun muon={muon:g} adamw={adamw:g}{' ' + label if label else ''}"
    return Run(part, name, ModelConfig(**expand(fields)), optimizer, num_steps, seed)


ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "- Muon (AdamW for all)": ({}, {"name": "adamw"}),
    "- QK-norm": ({"qk_norm": False}, {}),
    "- ReLU² (SwiGLU)": ({"mlp": "swiglu", "hidden_size": LLAMA_HIDDEN}, {}),
    "- zero-init projections": ({"zero_init": False}, {}),
    "- residual and x0 scalars": ({"residual_scalars": False}, {}),
    "- logit softcap": ({"logit_softcap": 0.0}, {}),
    "+ value embeddings (more parameters)": ({"value_embeddings": True}, {}),
    "+ cautious weight decay": ({}, {"cautious": True}),
}


def runs(done: dict[str, dict[str, Any]]) -> Iterator[Run]:
    """All, in the order in which later ones depend on earlier ones' results."""

    def loss(run: Run) -> float:
        return float(done[run.key()]["heldout_loss"])

    def best(candidates: list[Run]) -> Run:
        return min(candidates, key=loss)

    llamas = [llama(rate) for rate in LLAMA_RATES]
    yield from llamas
    muons = [speedrun(rate, ADAMW_RATES[1]) for rate in MUON_RATES]
    yield from muons
    muon = best(muons).optimizer.muon_learning_rate
    pairs = [speedrun(muon, rate) for rate in ADAMW_RATES]
    yield from pairs
    llama_rate, adamw = best(llamas).optimizer.learning_rate, best(pairs).optimizer.learning_rate
    for seed in SEEDS:
        yield llama(llama_rate, seed, "comparison")
        yield speedrun(muon, adamw, seed, "comparison")
    for label, (model_fields, optimizer_fields) in ABLATIONS.items():
        yield speedrun(muon, adamw, 0, "ablation", SHORT_STEPS, label, model_fields, optimizer_fields)
    yield speedrun(muon, adamw, 0, "all tokens", FULL_STEPS)


def train_one(run: Run, data_dir: Path) -> dict[str, Any]:
    """Train by the project's own loop, in this process; the held-out losses by step."""
    from lightning.fabric import Fabric

    from trainer.loop import Signal, fabric_precision, train
    from trainer.run_store.base import DirectoryStore

    class Quiet:
        def poll(self, step: int) -> Signal:
            return Signal()

    began = time.process_time()
    config = run.config()
    with tempfile.TemporaryDirectory(prefix="slm-quality-") as folder:
        store = DirectoryStore(Path(folder))
        fabric = Fabric(accelerator="cpu", devices=1, precision=fabric_precision(config))
        result = train(
            config,
            fabric=fabric,
            data_dir=data_dir,
            store=store,
            lease_id="quality",
            signals=Quiet(),
            phase=lambda name: None,
        )
        rows = [json.loads(line) for key in store.list(METRICS) for line in store.read(key).splitlines()]
    return {
        "key": run.key(),
        "part": run.part,
        "name": run.name,
        "seed": run.seed,
        "num_steps": run.num_steps,
        "tokens": sum(row["tokens"] for row in rows),
        "num_params": run.model.workload().num_params,
        "heldout_loss": result.heldout_loss,
        "curve": {row["step"]: round(row["heldout_loss"], 4) for row in rows if "heldout_loss" in row},
        "cpu_seconds": round(time.process_time() - began, 1),
        "model": asdict(run.model),
        "optimizer": asdict(run.optimizer),
    }


def read_done() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def prepared(data_root: Path) -> Path:
    from tasks.data.prepare import prepare

    overrides = ["data.max_bytes=12000000", f"model.vocab_size={SHAPE['vocab_size']}"]
    return prepare(load_recipe("demo", overrides), data_root)


def train_missing(data_root: Path, at_most: int) -> int:
    """Train up to `at_most` runs that have no result yet; how many were trained."""
    data_dir, done, trained = prepared(data_root), read_done(), 0
    for run in runs(done):
        if run.key() in done:
            continue
        if trained == at_most:
            break
        row = train_one(run, data_dir)
        done[run.key()] = row
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        trained += 1
        print(f"{run.part}: {run.key()}: {row['heldout_loss']:.4f} in {row['cpu_seconds']} s", file=sys.stderr)
    return trained


def report() -> dict[str, Any]:
    """What the runs that are done say; a part that is not done is missing."""
    done = read_done()
    found: dict[str, Any] = {"sweep": [], "ablation": []}
    try:
        plan = list(runs(done))
    except KeyError:
        plan = []
    rows = [done[run.key()] | {"part": run.part} for run in plan if run.key() in done] or list(done.values())
    for row in rows:
        if row["part"] in ("sweep", "ablation"):
            facts = {name: row[name] for name in ("name", "num_steps", "tokens", "num_params", "heldout_loss")}
            if facts not in found[row["part"]]:
                found[row["part"]].append(facts)
    pairs = {
        preset: [row for row in rows if row["part"] == "comparison" and row["name"].startswith(preset)]
        for preset in ("llama", "speedrun")
    }
    if all(len(each) == len(SEEDS) for each in pairs.values()):
        losses = {preset: [row["heldout_loss"] for row in each] for preset, each in pairs.items()}
        differences = [mine - theirs for mine, theirs in zip(losses["speedrun"], losses["llama"], strict=True)]
        first = {preset: each[0] for preset, each in pairs.items()}
        found["comparison"] = {
            "tokens": {preset: row["tokens"] for preset, row in first.items()},
            "token_share": first["speedrun"]["tokens"] / first["llama"]["tokens"],
            "num_params": {preset: row["num_params"] for preset, row in first.items()},
            "heldout_loss": losses,
            "mean": {preset: statistics.mean(each) for preset, each in losses.items()},
            "difference": statistics.mean(differences),
            "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
            "reached": statistics.mean(differences) <= 0,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--data-root", type=Path, default=Path(".quality"), help="where prepared text is kept")
    parser.add_argument("--at-most", type=int, default=1000, help="runs to train before stopping")
    arguments = parser.parse_args()
    if arguments.what == "run":
        return 0 if train_missing(arguments.data_root, arguments.at_most) else 3
    print(json.dumps(report(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

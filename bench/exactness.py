"""What another number of workers, and kills, change of a run: nothing but rounding.

    python bench/exactness.py [--steps 100] [--kills 12] [--seed 0] [--json]

Real processes on gloo, one thread each, with a small model in fp32, at 1, 2, 3, 4 and 8 workers:
- batches: a hash of every global batch, in order; learning rate and target tokens of every step;
- single steps: from 20 checkpoints along a run, loss, gradient norm and clipped gradient of the next step;
- curves: the loss of the first 50 steps, under AdamW, and under Muon with its orthogonalisation in fp32; how far the
  shipped bf16 form drifts is printed;
- kills: workers SIGKILL themselves at random steps of attempts with random numbers of workers; every sample must be in
  the weights once. Masked targets everywhere, so that ranks hold unequal numbers of them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.run_store_keys import METRICS, incarnation_of_metrics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.configs import changed
from tests.support.exact_group import Attempt, Job, Report, only_checkpoint, run_jobs, seen_by_weights
from tests.trainer.conftest import TINY, write_data
from trainer.checkpoints.lineage import checkpoints_of_chain
from trainer.config import TrainConfig
from trainer.run_store.base import DirectoryStore

WORLD_SIZES = (1, 2, 3, 4, 8)
TOLERANCE = 1e-5
CURVE_STEPS = 50
NUM_CHECKPOINTS = 20
KILL_WORLD_SIZES = (1, 2, 3, 4)
STEPS_BETWEEN_KILLS = 6


@dataclass
class Bench:
    """Where the runs are, and what was found."""

    folder: Path
    steps: int
    failures: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def config(self, optimizer: str, **changes: Any) -> TrainConfig:
        rates = replace(TINY.optimizer, name=optimizer, learning_rate=0.003, warmup_steps=10)
        model = replace(TINY.model, sequence_length=32, width=32, hidden_size=64, num_layers=3)
        base = changed(TINY, model=model, optimizer=rates, num_steps=self.steps, global_batch_size=32)
        return changed(base, micro_batch_size=4, eval_every_steps=10**6, **changes)

    def run(self, world_size: int, job: Job) -> Report:
        reports = run_jobs(world_size, [job], job.store.with_name(f"{job.store.name}-group"))
        assert reports is not None
        return reports[0]

    def check(self, holds: bool, claim: str) -> None:
        if not holds:
            self.failures.append(claim)
            print(f"FAILED: {claim}", file=sys.stderr, flush=True)


def rows_of(store: Path) -> list[dict[str, Any]]:
    """The newest numbers of every step."""
    rows: dict[int, dict[str, Any]] = {}
    parts = {
        path: incarnation_of_metrics(path.relative_to(store).as_posix()) for path in store.glob(f"{METRICS}*/*.jsonl")
    }
    for path in sorted(parts, key=lambda path: parts[path] or 0):
        rows |= {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def relative(item: float, two: float) -> float:
    return abs(item - two) / abs(two)


def far(item: Any, two: Any) -> float:
    """Relative distance of two vectors."""
    return float((item - two).norm() / two.norm())


def worst(values: Sequence[float]) -> float:
    return max(values) if all(map(math.isfinite, values)) else math.inf


def batches(bench: Bench) -> dict[str, Any]:
    """The same batches and schedule; the runs are also the AdamW curves."""
    reports, rows = {}, {}
    config = bench.config("adamw", checkpoint_every_steps=bench.steps // NUM_CHECKPOINTS, keep_last=NUM_CHECKPOINTS + 5)
    for world_size in WORLD_SIZES:
        store = bench.folder / f"adamw-{world_size}"
        stop = None if world_size == 1 else CURVE_STEPS
        reports[world_size] = bench.run(world_size, Job(config, bench.data, store, stop_after=stop, masked=True))
        rows[world_size] = rows_of(store)
        say(f"adamw at {world_size} workers: {len(rows[world_size])} steps")
    alone = reports[1].batches()
    bench.check(len(set(alone)) == bench.steps, "every global batch is another one")
    errors = []
    for world_size in WORLD_SIZES:
        mine, of_one = rows[world_size][:CURVE_STEPS], rows[1][:CURVE_STEPS]
        bench.check(reports[world_size].batches()[:CURVE_STEPS] == alone[:CURVE_STEPS], f"batches at {world_size}")
        for what in ("learning_rate", "tokens"):
            bench.check([row[what] for row in mine] == [row[what] for row in of_one], f"{what} at {world_size}")
        errors.append(worst([relative(a["loss"], b["loss"]) for a, b in zip(mine, of_one, strict=True)]))
        bench.check(errors[-1] <= TOLERANCE, f"AdamW's curve at {world_size} workers: off by {errors[-1]:.1e}")
    return {
        "world_sizes": WORLD_SIZES,
        "steps": CURVE_STEPS,
        "first_batches": alone[:3],
        "tokens_of_first_steps": [row["tokens"] for row in rows[1][:3]],
        "adamw_curve_relative_error": dict(zip(map(str, WORLD_SIZES), errors, strict=True)),
    }


def single_steps(bench: Bench) -> dict[str, Any]:
    """One step from each of many checkpoints of the run alone."""
    whole, rows = bench.folder / "adamw-1", rows_of(bench.folder / "adamw-1")
    every = bench.steps // NUM_CHECKPOINTS
    starts = [every * number for number in range(1, NUM_CHECKPOINTS)]
    config = bench.config("adamw", checkpoint_every_steps=every, keep_last=NUM_CHECKPOINTS + 5)
    gradients: dict[int, Any] = {}
    found: dict[str, dict[str, float]] = {}
    for world_size in WORLD_SIZES:
        stores = {0: bench.folder / f"step-{world_size}-0"}
        stores |= {at: only_checkpoint(whole, at, bench.folder / f"step-{world_size}-{at}") for at in starts}
        jobs = [Job(config, bench.data, store, stop_after=at + 1, masked=True) for at, store in stores.items()]
        reports = run_jobs(world_size, jobs, bench.folder / f"steps-{world_size}")
        assert reports is not None
        losses, norms, vectors = [], [], []
        for (at, store), report in zip(stores.items(), reports, strict=True):
            row = rows_of(store)[-1]
            assert row["step"] == at + 1
            losses.append(relative(row["loss"], rows[at]["loss"]))
            norms.append(relative(row["gradient_norm"], rows[at]["gradient_norm"]))
            vectors.append(far(report.gradients[0], gradients.setdefault(at, report.gradients[0])))
        errors = {"loss": worst(losses), "gradient_norm": worst(norms), "clipped_gradient": worst(vectors)}
        found[str(world_size)] = errors
        for what, error in errors.items():
            bench.check(error <= TOLERANCE, f"{what} of single steps at {world_size} workers: off by {error:.1e}")
        say(f"single steps at {world_size} workers: {errors}")
    return {"checkpoints": len(starts) + 1, "worst_relative_error": found}


def muon(bench: Bench) -> dict[str, Any]:
    """Curves with the orthogonalisation in fp32, and the drift of the shipped form."""
    found: dict[str, dict[str, float]] = {"fp32": {}, "shipped_bf16": {}}
    for form in found:
        alone: list[dict[str, Any]] = []
        for world_size in WORLD_SIZES:
            store = bench.folder / f"muon-{form}-{world_size}"
            job = Job(bench.config("muon"), bench.data, store, CURVE_STEPS, masked=True, muon_fp32=form == "fp32")
            bench.run(world_size, job)
            mine = rows_of(store)
            alone = alone or mine
            error = worst([relative(a["loss"], b["loss"]) for a, b in zip(mine, alone, strict=True)])
            found[form][str(world_size)] = error
            if form == "fp32":
                bench.check(error <= TOLERANCE, f"Muon's curve at {world_size} workers: off by {error:.1e}")
        say(f"muon, {form}: {found[form]}")
    return {"steps": CURVE_STEPS, "curve_relative_error": found}


def kills(bench: Bench, num_kills: int, seed: int) -> dict[str, Any]:
    """Attempts that kill themselves, each going on from the newest checkpoint with another number of workers."""
    draw = random.Random(seed)
    store = bench.folder / "kills"
    config = bench.config("adamw", checkpoint_every_steps=3)
    attempts: list[Attempt] = []
    trained = 0
    for number in range(num_kills + 1):
        world_size = draw.choice(KILL_WORLD_SIZES)
        begun = checkpoints_of_chain(DirectoryStore(store))
        step = (begun[0].step if begun else 0) + draw.randrange(STEPS_BETWEEN_KILLS)
        rank, place = draw.randrange(world_size), draw.choice(("batch", "poll"))
        job = Job(config, bench.data, store, lease_id=f"lease-{number}", masked=True)
        if number < num_kills:
            job = replace(job, kill_rank=rank, kill_step=min(step, bench.steps - 1), kill_in=place)
        folder = bench.folder / f"kills-{number}"
        ended = run_jobs(world_size, [job], folder)
        assert (ended is None) == (number < num_kills)
        attempts.append(Attempt(job.lease_id, world_size, folder))
        trained += sum(1 for path in folder.glob("job0-rank0.jsonl") for _ in path.read_text().splitlines())
        say(f"attempt {number} at {world_size} workers: {f'killed at step {step}' if ended is None else 'finished'}")
    seen = seen_by_weights(store, attempts)
    undisturbed = bench.run(1, Job(config, bench.data, bench.folder / "undisturbed", masked=True))
    samples = [sample for step in seen for sample in step["samples"]]
    bench.check(samples == list(range(bench.steps * config.batch.global_batch_size)), "every sample once, in order")
    bench.check([step["rows"] for step in seen] == undisturbed.rows, "the very sequences of a run without kills")
    return {
        "kills": num_kills,
        "attempts_world_sizes": [attempt.world_size for attempt in attempts],
        "steps_done_again": trained - bench.steps,
        "samples_in_weights": len(samples),
        "samples_repeated": len(samples) - len(set(samples)),
        "samples_lost": bench.steps * config.batch.global_batch_size - len(set(samples)),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of a whole run, a multiple of 20")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.steps < CURVE_STEPS or options.steps % NUM_CHECKPOINTS:
        parser.error(f"--steps must be a multiple of {NUM_CHECKPOINTS} and at least {CURVE_STEPS}")
    with tempfile.TemporaryDirectory(prefix="slm-exactness-") as name:
        bench = Bench(Path(name), options.steps)
        write_data(bench.data, {"text": (0.7, [15_000, 9_000]), "code": (0.3, [7_000])})
        facts = {
            "batches": batches(bench),
            "single_steps": single_steps(bench),
            "muon": muon(bench),
            "kills": kills(bench, options.kills, options.seed),
        }
    facts["failures"] = bench.failures  # type: ignore[assignment]
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        curve, single, drift, killed = facts["batches"], facts["single_steps"], facts["muon"], facts["kills"]
        print(f"batches, rates, tokens the same at {WORLD_SIZES} workers over {CURVE_STEPS} steps")
        print(f"AdamW's loss off by {max(curve['adamw_curve_relative_error'].values()):.1e} at most")
        worst_step = max(max(errors.values()) for errors in single["worst_relative_error"].values())
        print(f"single steps from {single['checkpoints']} checkpoints off by {worst_step:.1e} at most")
        for form, errors in drift["curve_relative_error"].items():
            print(f"Muon's loss, {form}: off by {max(errors.values()):.1e} at most")
        print(f"{killed['kills']} kills: {killed['samples_repeated']} repeated, {killed['samples_lost']} lost samples")
        print("\n".join(f"FAILED: {claim}" for claim in bench.failures) or "all of it holds")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())

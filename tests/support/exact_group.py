"""Groups of real training processes that note what they trained on: for test_trainer_exactness and bench/exactness.py.

Processes are forked from a server that has imported torch once, so that a group of eight starts in a second or two.
They all-reduce by gloo, one thread each, as torchrun's would. A process may be told to SIGKILL itself at one point.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed", "lightning.fabric", "numpy", "trainer.loop"]
GROUP_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """One call of `train` by every process of a group."""

    config: Any
    data_dir: Path
    store: Path
    stop_after: int | None = None
    lease_id: str = "lease-0"
    masked: bool = False
    """Leave out targets, unevenly over rows: every third row has none at all."""
    muon_fp32: bool = False
    kill_rank: int | None = None
    kill_step: int | None = None
    kill_in: str = "batch"
    """Before the step's batch is read, or in `poll`: after the backward pass and before the update."""


@dataclass
class Report:
    """What a job's processes noted, put together. Lists are in the order of steps."""

    result: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """A digest of each row of the global batch: of its tokens and targets."""
    gradients: list[Any] = field(default_factory=list)
    """After clipping, as one vector."""

    def batches(self) -> list[str]:
        """One digest per global batch."""
        return [hashlib.sha256("".join(rows).encode()).hexdigest()[:16] for rows in self.rows]


def context() -> ForkServerContext:
    """The server that processes are forked from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def run_jobs(world_size: int, jobs: list[Job], folder: Path) -> list[Report] | None:
    """Every job, one after the other, in one group of processes; None when one of them was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context().Process(target=_work, args=(rank, world_size, port, jobs, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(GROUP_TIMEOUT_SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    if -signal.SIGKILL in codes:
        return None
    if any(codes):
        logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(world_size))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return [_together(folder, number, world_size) for number in range(len(jobs))]


def notes_of(folder: Path, number: int, world_size: int) -> dict[int, dict[int, dict[str, Any]]]:
    """Step to rank to what that rank noted of its batch in that job; killed processes' last words too."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for rank in range(world_size):
        path = folder / f"job{number}-rank{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            note = json.loads(line)
            found.setdefault(note["step"], {})[rank] = note
    return found


def _together(folder: Path, number: int, world_size: int) -> Report:
    import torch

    report = Report(result=json.loads((folder / f"job{number}-result.json").read_text()))
    for step, by_rank in sorted(notes_of(folder, number, world_size).items()):
        assert sorted(by_rank) == list(range(world_size)), f"step {step} lacks a rank: {sorted(by_rank)}"
        report.steps.append(step)
        report.rows.append([row for rank in range(world_size) for row in by_rank[rank]["rows"]])
    report.gradients = torch.load(folder / f"job{number}-gradients.pt")
    return report


# ---------------------------------------------------------------- attempts that were killed


@dataclass(frozen=True)
class Attempt:
    """One group of processes that trained on, or tried to."""

    lease_id: str
    world_size: int
    folder: Path


def seen_by_weights(store: Path, attempts: list[Attempt]) -> list[dict[str, Any]]:
    """What every step that the newest weights went through was trained on, first to last: all ranks' notes in order.

    Goes back from the newest incarnation to its parent checkpoint, to that one's incarnation, and so on to step 0.
    """
    incarnations = {int(path.stem): json.loads(path.read_text()) for path in (store / "incarnations").glob("*.json")}
    result = json.loads((store / "result.json").read_text())
    incarnation, upto = max(incarnations), int(result["step"])
    found: list[dict[str, Any]] = []
    while True:
        attempt = next(each for each in attempts if each.lease_id == incarnations[incarnation]["lease_id"])
        parent = incarnations[incarnation]["parent"]
        begun = 0 if parent is None else int(parent["step"])
        notes = notes_of(attempt.folder, 0, attempt.world_size)
        for step in reversed(range(begun, upto)):
            ranks = [notes[step][rank] for rank in range(attempt.world_size)]
            kinds = ("samples", "sources", "windows", "rows")
            together = {kind: [value for note in ranks for value in note[kind]] for kind in kinds}
            found.append({"step": step, "incarnation": incarnation, **together})
        if parent is None:
            return found[::-1]
        incarnation, upto = int(parent["incarnation"]), begun


def only_checkpoint(store: Path, step: int, target: Path) -> Path:
    """A copy of a store of one incarnation with the checkpoint of one step alone."""
    source = store / "checkpoints" / "incarnation=0" / f"step={step}"
    shutil.copytree(source, target / "checkpoints" / "incarnation=0" / f"step={step}")
    (target / "incarnations").mkdir()
    shutil.copy(store / "incarnations" / "0.json", target / "incarnations" / "0.json")
    return target


# ---------------------------------------------------------------- in a process of the group


def _work(rank: int, world_size: int, port: int, jobs: list[Job], folder: Path) -> None:
    import sys

    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "exact"}
    os.environ |= {name: str(value) for name, value in (place | rendezvous).items()}

    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from trainer.loop import fabric_precision

    torch.set_num_threads(1)
    precision = fabric_precision(jobs[0].config)
    if world_size == 1:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    else:
        strategy = DDPStrategy(process_group_backend="gloo")
        fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy, precision=precision)
    fabric.launch()
    for number, job in enumerate(jobs):
        _train(fabric, job, folder, number)


def _train(fabric: Any, job: Job, folder: Path, number: int) -> None:
    import torch

    from trainer import loop
    from trainer.data.order import sample_places
    from trainer.loop import Signal, train
    from trainer.model.transformer import IGNORED
    from trainer.run_store.base import DirectoryStore

    rank = fabric.global_rank
    notes = (folder / f"job{number}-rank{rank}.jsonl").open("w", buffering=1)
    gradients: list[Any] = []
    plain_loader, plain_clip = loop.Loader, loop.scale_and_clip

    def strike(place: str, step: int) -> None:
        if (rank, step, place) == (job.kill_rank, job.kill_step, job.kill_in):
            os.kill(os.getpid(), signal.SIGKILL)

    class NotingLoader(plain_loader):  # type: ignore[misc, valid-type]
        """Writes down what it gives out, before it gives it out."""

        def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Any:
            batch = super().batch(step, rank, world_size)
            if self.shards.split != "train":
                return batch
            strike("batch", step)
            first = step * self.global_batch_size + self.global_batch_size * rank // world_size
            if job.masked:
                batch = batch._replace(targets=_masked(batch.targets, first, IGNORED))
            shards = self.shards
            samples = torch.arange(first, first + len(batch.tokens)).numpy()
            source, window = sample_places(samples, shards.weights, shards.num_windows, self.seed)
            rows = [
                hashlib.sha256(tokens.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()[:16]
                for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
            ]
            note = {"step": step, "samples": samples.tolist(), "rows": rows}
            notes.write(json.dumps(note | {"sources": source.tolist(), "windows": window.tolist()}) + "\n")
            return batch

    def noting_clip(parameters: Any, scale: float, max_norm: float) -> float:
        parameters = list(parameters)
        norm = plain_clip(parameters, scale, max_norm)
        if rank == 0:
            gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return norm

    class Signals:
        def poll(self, step: int) -> Signal:
            strike("poll", step)
            return Signal()

    loop.Loader, loop.scale_and_clip = NotingLoader, noting_clip  # type: ignore[misc]
    shipped = torch.optim._muon._zeropower_via_newtonschulz
    if job.muon_fp32:
        torch.optim._muon._zeropower_via_newtonschulz = newton_schulz_fp32
    try:
        result = train(
            job.config,
            fabric=fabric,
            data_dir=job.data_dir,
            store=DirectoryStore(job.store),
            lease_id=job.lease_id,
            signals=Signals(),
            phase=lambda name: None,
            stop_after=job.stop_after,
        )
    finally:
        loop.Loader, loop.scale_and_clip = plain_loader, plain_clip  # type: ignore[misc]
        torch.optim._muon._zeropower_via_newtonschulz = shipped
        notes.close()
    if rank == 0:
        (folder / f"job{number}-result.json").write_text(json.dumps(asdict(result)))
        torch.save(gradients, folder / f"job{number}-gradients.pt")


def _masked(targets: Any, first_sample: int, ignored: int) -> Any:
    """Row r of the run keeps its last 5 r mod T targets; every third row keeps none."""
    targets = targets.clone()
    T = targets.shape[1]
    for row in range(len(targets)):
        sample = first_sample + row
        keep = 0 if sample % 3 == 0 else 5 * sample % T
        targets[row, : T - keep] = ignored
    return targets


def newton_schulz_fp32(grad: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """torch.optim.Muon's orthogonalisation without its cast to bf16: `_zeropower_via_newtonschulz` of torch 2.13."""
    import torch

    a, b, c = coefficients
    out = grad.float()
    if grad.size(0) > grad.size(1):
        out = out.T
    out = out / out.norm().clamp(min=eps)
    for _ in range(steps):
        gram = out @ out.T
        out = torch.addmm(out, torch.addmm(gram, gram, gram, beta=b, alpha=c), out, beta=a)
    return out.T if grad.size(0) > grad.size(1) else out

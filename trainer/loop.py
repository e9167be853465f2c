"""The training loop: from tokens to a checkpoint, through any number of interruptions.

Invariants: step, learning rate, global batch and token count are the same at every world size; the weights after n
steps are bitwise the same however often the run was resumed, at the same world size on the same machine; every rank
leaves a step with the same decision, since all of them come from one small all-reduce.

A tour, in the order in which things happen. Every rank runs all of it.
1.  `train` is the only entrance. Its `TrainConfig` (`trainer.config`) says everything that a run is; the caller
    brings Fabric, the folder of tokens, the run store, the signals and the objective.
2.  `_Run.__init__` opens the token shards of both splits (`trainer.data.loader.TokenShards`). A `Loader` turns a step
    number into the batch of that step; it holds no position, so nothing about data has to be saved.
3.  `set_up_model` (`trainer.parallel`) builds the `Transformer` (`trainer.model`) with seeded weights and wraps it for
    several devices; `Updates` (`trainer.optim`) makes Muon and AdamW over its parameters.
4.  `Checkpoints.begin` (`trainer.checkpoints.manager`) takes the next incarnation of the run, so that an older group
    of workers can write nothing more, and fills all tensors from the newest whole checkpoint, if there is one.
5.  `_Run.until` evaluates once at the very beginning, compiles where that is asked for, and then repeats 6 to 11.
6.  `_step` takes this rank's share of the global batch, and `_micro_batches` cuts it into equally many pieces on
    every rank.
7.  `_backward` has the objective (`trainer.objectives`) compute a loss sum and a number of targets of each piece, and
    adds up gradients; ranks are joined only in the last piece.
8.  `_agree` is the one small all-reduce of a step: it sums loss and targets, and joins what the ranks' signals want
    (a checkpoint, a stop, a hold before a node is taken away) and whether a save is due or has failed.
9.  `scale_and_clip` makes the gradient that of the mean over all targets; `learning_rate_factor`
    (`trainer.schedule`) gives the rate of this step; `Updates.step` changes the weights. A loss that is not finite
    ends the run before that.
10. `_evaluate` measures the held-out loss every few steps; `_report` hands the step's numbers to the `Reporter`
    (`trainer.metrics`), which writes progress once a second and metrics in parts.
11. `_save`, when the interval of `Pace` (`trainer.checkpoints.interval`) is over or somebody asked, copies the tensors
    into a buffer; a thread stores that buffer as this rank's part, and rank 0 writes the manifest when all parts are
    durable. Training goes on meanwhile.
12. `_finish` returns the digest of the weights and, at the last step, writes the result to the run store.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cost.errors import SlmError, UserError
from trainer.checkpoints.interval import Pace
from trainer.checkpoints.lineage import require_newest
from trainer.checkpoints.manager import Checkpoints, Identity
from trainer.config import TrainConfig
from trainer.data.loader import Batch, Loader, TokenShards
from trainer.memory import peak_bytes
from trainer.metrics import Progress as Progress
from trainer.metrics import Rate, Reporter, flops_per_token, peak_flops
from trainer.model.loss import IGNORED
from trainer.model.transformer import parameters_sha256
from trainer.objectives.base import LossSum, Objective
from trainer.objectives.pretrain import Pretrain
from trainer.optim import Updates, scale_and_clip
from trainer.parallel import fabric_precision as fabric_precision
from trainer.parallel import set_up_model
from trainer.profile import profiler
from trainer.run_store import keys
from trainer.run_store.base import Store
from trainer.run_store.envelope import Writer, wrap
from trainer.schedule import learning_rate_factor

log = logging.getLogger(__name__)

PHASES = ("data", "model", "load", "first_step")
"""What `train` calls `phase` with, in this order; with compilation, `compile` before the last."""
HELDOUT_SEED = 0
"""The held-out windows are the same in all runs on the same data, so that their losses can be compared."""


@dataclass(frozen=True)
class Signal:
    """What a worker wants of the loop. One worker is enough: requests are joined over all of them."""

    checkpoint: bool = False
    stop: bool = False
    reason: str = ""
    due: bool = False
    """The interval is over; the loop says so itself."""
    hold: bool = False
    """A node goes soon, and what was begun now would not end in time or would be in the way of the last save."""


class Signals(Protocol):
    def poll(self, step: int) -> Signal:
        """Called on every rank in every step, with the number of steps already done."""
        ...


@dataclass(frozen=True)
class Result:
    outcome: Literal["finished", "stopped"]
    step: int
    heldout_loss: float | None
    weights_sha256: str


@dataclass(frozen=True)
class StepFacts:
    """The newest step's numbers; one row of the metrics."""

    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    memory_bytes: int = 0


def train(
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    fabric: Any,
    data_dir: Path,
    store: Store,
    lease_id: str,
    signals: Signals,
    phase: Callable[[str], None],
    stop_after: int | None = None,
    start_seconds: Mapping[str, float] | None = None,
    stage: str = "pretrain",
) -> Result:
    """Train until done or told to stop; goes on from the newest whole checkpoint by itself.

    Call it on every rank of a launched `fabric`. `objective` is what is minimized, pre-training by default.
    `stop_after` ends at that step as a stop signal would. `start_seconds`, which the caller goes on filling, is
    reported as what the start took; `stage` is the stage of the run that progress names.
    Raises SlmError when the loss is not finite, StoreError when the store or a disk fails.
    """
    took = start_seconds or {}
    run = _Run(config, objective or Pretrain(), fabric, data_dir, store, lease_id, signals, phase, took, stage)
    try:
        return run.until(config.num_steps if stop_after is None else min(stop_after, config.num_steps))
    finally:
        run.checkpoints.close()


class _Run:
    """One group of workers' share of a run."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        fabric: Any,
        data_dir: Path,
        store: Store,
        lease_id: str,
        signals: Signals,
        phase: Callable[[str], None],
        start_seconds: Mapping[str, float],
        stage: str,
    ) -> None:
        self.start_seconds = start_seconds
        self.stage = stage
        self.objective = objective
        self.config, self.fabric, self.store, self.signals, self.phase = config, fabric, store, signals, phase
        self.rank, self.world_size = fabric.global_rank, fabric.world_size
        self.started_at = self.saved_at = time.monotonic()
        if config.execution.num_threads is not None:
            torch.set_num_threads(config.execution.num_threads)
        torch.manual_seed(config.seed + self.rank)

        apart = config.batch.max_documents is not None
        shards = TokenShards(data_dir, "train", config.model.sequence_length, with_documents=apart)
        heldout = TokenShards(data_dir, "heldout", config.model.sequence_length, with_documents=apart)
        self.index = shards.index
        _check_vocabulary(config.model.vocab_size, self.index.vocab_size)
        max_documents = config.batch.max_documents
        self.loader = Loader(shards, config.batch.global_batch_size, config.seed, max_documents=max_documents)
        num_heldout = min(config.evaluation.eval_sequences, sum(heldout.num_windows))
        self.heldout = Loader(heldout, num_heldout, HELDOUT_SEED, max_documents=max_documents)
        phase("data")

        self.weights, self.model = set_up_model(config, fabric)
        for module in objective.frozen_modules.values():
            fabric.to_device(module.requires_grad_(False).eval())
        self.updates = Updates(self.weights, config.optimizer)
        phase("model")

        self.identity = Identity(config, self.index.tokenizer_sha256, self.index.fingerprint, objective.name)
        self.checkpoints = Checkpoints(
            store,
            rank=self.rank,
            world_size=self.world_size,
            keep_last=config.checkpoint.keep_last,
            milestone_every_steps=config.checkpoint.milestone_every_steps,
        )
        self.pace = Pace(config, self.world_size)
        self.at = self.checkpoints.begin(self._tensors(), self.identity, lease_id)
        phase("load")

        self.reporter = Reporter(store, incarnation=self.checkpoints.incarnation, writes=self.rank == 0)
        self.rate = Rate()
        self.newest = StepFacts()
        self.flops_per_token = flops_per_token(config.model)
        self.peak_flops = peak_flops(fabric.device, config)

    def until(self, last_step: int) -> Result:
        """Steps, evaluations and checkpoints, up to `last_step` or a stop."""
        at, config = self.at, self.config
        if at.first_heldout_loss is None:
            at.heldout_loss = at.first_heldout_loss = self._evaluate()
        self.reporter.progress(self._progress())
        if config.execution.compile and at.step < last_step:
            self._compile()
            self.phase("compile")
        self.saved_at = time.monotonic()
        first, stop = True, at.step >= last_step
        wants_trace = config.execution.profile and self.rank == 0
        with profiler(self.store, self.checkpoints.incarnation, wanted=wants_trace) as tracer:
            while not stop:
                signal = self._step()
                if tracer is not None:
                    tracer.step()
                if first:
                    self.phase("first_step")
                    self.pace.started(time.monotonic() - self.started_at)
                    first = False
                stop = signal.stop or at.step >= last_step
                evaluated = at.step == config.num_steps or at.step % config.evaluation.eval_every_steps == 0
                if evaluated:
                    at.heldout_loss = self._evaluate()
                self._report(evaluated)
                # What somebody asked for is stored for good before training goes on: what follows may be the end.
                durable = stop or signal.checkpoint
                wanted = durable or signal.due or _divides(config.checkpoint.every_steps, at.step)
                if stop or (wanted and not signal.hold):
                    self._save(durable=durable)
        return self._finish()

    def _step(self) -> Signal:
        """One optimizer step; returns what the workers together want next."""
        began_at = time.monotonic()
        config, step = self.config, self.at.step
        batch = self.loader.batch(step, self.rank, self.world_size)
        data_wait_seconds = time.monotonic() - began_at

        loss_sum, num_targets, signal = self._agree(self._backward(batch))
        loss = loss_sum / num_targets
        # Gradients are of sums, averaged over ranks: so scaled, they are those of the mean over all targets.
        norm = scale_and_clip(
            self.updates.parameters.values(), self.world_size / num_targets, config.optimizer.clip_norm
        )
        factor = learning_rate_factor(step, config.num_steps, config.optimizer)
        if not math.isfinite(loss + norm):
            raise SlmError(self._diverged(loss, norm, factor))
        self.updates.step(factor)
        self.updates.zero_grad()

        self.at.step += 1
        self.at.tokens += num_targets
        seconds = time.monotonic() - began_at
        self.rate.add(num_targets, seconds)
        rate = factor * config.optimizer.learning_rate
        memory = peak_bytes(self.fabric.device)
        self.newest = StepFacts(loss, norm, rate, num_targets, seconds, data_wait_seconds, memory)
        return signal

    def _compile(self) -> None:
        """Have forward and backward compiled, on the first piece of the coming batch; nothing of it is kept."""
        batch = self.loader.batch(self.at.step, self.rank, self.world_size)
        piece = next(self._micro_batches(batch, self.config.batch.global_batch_size))
        self.fabric.backward(self.objective(self.model, piece).loss_sum)
        self.updates.zero_grad()

    def _backward(self, batch: Batch) -> LossSum:
        """Add the gradients of this rank's share, reduced over ranks with the last; returns its summed loss."""
        loss_sum, num_targets = self._zeros()
        pieces = list(self._micro_batches(batch, self.config.batch.global_batch_size))
        for number, piece in enumerate(pieces, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(pieces)):
                loss = self.objective(self.model, piece)
                self.fabric.backward(loss.loss_sum)
            loss_sum += loss.loss_sum.detach()
            num_targets += loss.num_targets
        return LossSum(loss_sum, num_targets)

    def _micro_batches(self, batch: Batch, global_batch_size: int) -> Iterator[Batch]:
        """As many pieces on every rank, so that all join every collective; masked where a share has run out."""
        size = self.config.batch.micro_batch_size
        largest_share = -(-global_batch_size // self.world_size)
        for begin in range(0, largest_share, size):
            piece = batch.rows(begin, begin + size)
            if len(piece.tokens) == 0:
                piece = masked_batch(self.config.model.sequence_length, with_documents=batch.documents is not None)
            yield piece.to(self.fabric.device)

    def _agree(self, sums: LossSum) -> tuple[float, int, Signal]:
        """The one small all-reduce of a step: loss, count, and what any worker wants."""
        mine = self.signals.poll(self.at.step)
        self._note_saves()
        elapsed = time.monotonic() - self.saved_at
        due = self.rank == 0 and not self.checkpoints.is_saving and elapsed >= self.pace.interval_seconds
        wishes = [mine.checkpoint, mine.stop, due, mine.hold, self.checkpoints.has_failed]
        total, count, checkpoint, stop, dues, holds, failures = self._sum(sums, *wishes)
        if failures > 0:  # on all ranks at this step: each raises what one of them met
            self.checkpoints.wait()
        return total, int(count), Signal(checkpoint > 0, stop > 0, mine.reason, due=dues > 0, hold=holds > 0)

    def _note_saves(self) -> None:
        """A save that became durable since the last step counts for the interval."""
        before = self.checkpoints.newest
        self.checkpoints.poll()
        if self.checkpoints.newest != before:
            self._measure_save()

    def _measure_save(self) -> None:
        self.pace.saved(
            stall_seconds=self.checkpoints.last_stall_seconds, save_seconds=self.checkpoints.last_save_seconds
        )

    def _evaluate(self) -> float:
        """Mean held-out loss in nats per token, over all ranks."""
        batch = self.heldout.batch(0, self.rank, self.world_size)
        loss_sum, num_targets = self._zeros()
        with torch.no_grad():
            for piece in self._micro_batches(batch, self.heldout.global_batch_size):
                loss = self.objective(self.model, piece)
                loss_sum += loss.loss_sum
                num_targets += loss.num_targets
        total, count = self._sum(LossSum(loss_sum, num_targets))
        return total / count

    def _zeros(self) -> LossSum:
        zero = torch.zeros((), device=self.fabric.device)
        return LossSum(zero, zero.long())

    def _sum(self, sums: LossSum, *numbers: float) -> list[float]:
        """The sum over ranks of the loss, of the number of targets and of each number."""
        rest = torch.tensor(numbers, dtype=torch.float64, device=sums.loss_sum.device)
        both = torch.cat((torch.stack((sums.loss_sum.double(), sums.num_targets.double())), rest))
        totals: list[float] = self.fabric.all_reduce(both, reduce_op="sum").tolist()
        return totals

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps but counters and random state: the very tensors that training uses."""
        # Not the model's own: after an evaluation, a sharded one may hold parameters whole.
        tensors = {f"model/{name}": value.detach() for name, value in self.updates.parameters.items()}
        return tensors | {f"optimizer/{name}": value for name, value in self.updates.state().items()}

    def _save(self, *, durable: bool) -> None:
        self.reporter.flush()
        self.checkpoints.save(self._tensors(), self.identity, self.at, durable=durable)
        self.saved_at = time.monotonic()
        self.reporter.progress(self._progress())

    def _finish(self) -> Result:
        digest = parameters_sha256(self.updates.parameters)
        finished = self.at.step == self.config.num_steps
        result = Result("finished" if finished else "stopped", self.at.step, self.at.heldout_loss, digest)
        if finished and self.rank == 0:
            require_newest(self.store, self.checkpoints.incarnation)
            facts = {
                **dataclasses.asdict(result),
                "tokens": self.at.tokens,
                "source_epochs": self.loader.epochs(self.at.step),
                "first_heldout_loss": self.at.first_heldout_loss,
                "unigram_entropy": self.index.heldout_unigram_entropy,
            }
            self.store.write(keys.RESULT, wrap(facts, Writer.TRAINER))
        self.reporter.flush()
        self.reporter.progress(self._progress())
        return result

    def _report(self, evaluated: bool) -> None:
        progress, newest = self._progress(), self.newest
        row = {"step": self.at.step, **dataclasses.asdict(newest)}
        row["tokens_per_second"] = newest.tokens / newest.seconds
        row["mfu"] = self._mfu(row["tokens_per_second"])
        row["checkpoint_stall_seconds"] = progress.checkpoint_stall_seconds
        if evaluated:
            row["heldout_loss"] = self.at.heldout_loss
        self.reporter.step(row, progress)

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        """Share of the devices' peak that the model's own FLOPs are; None where the peak is not known."""
        if tokens_per_second is None or self.peak_flops is None:
            return None
        flops_per_second: float = tokens_per_second / self.world_size * self.flops_per_token
        return flops_per_second / self.peak_flops

    def _progress(self) -> Progress:
        rate = self.rate.tokens_per_second()
        return Progress(
            step=self.at.step,
            num_steps=self.config.num_steps,
            tokens=self.at.tokens,
            loss=self.newest.loss,
            heldout_loss=self.at.heldout_loss,
            learning_rate=self.newest.learning_rate,
            tokens_per_second=rate,
            tokens_per_second_per_device=None if rate is None else rate / self.world_size,
            mfu=self._mfu(rate),
            world_size=self.world_size,
            incarnation=self.checkpoints.incarnation,
            checkpoint_step=None if self.checkpoints.newest is None else self.checkpoints.newest.step,
            checkpoint_stall_seconds=self.checkpoints.last_stall_seconds,
            checkpoint_save_seconds=self.checkpoints.last_save_seconds,
            checkpoint_interval_seconds=self.pace.interval_seconds,
            data_wait_seconds=self.newest.data_wait_seconds,
            elapsed_seconds=time.monotonic() - self.started_at,
            source_epochs=self.loader.epochs(self.at.step),
            start_seconds=dict(self.start_seconds),
            stage=self.stage,
        )

    def _diverged(self, loss: float, norm: float, factor: float) -> str:
        self.checkpoints.wait()  # what is on its way will be there
        newest = self.checkpoints.newest
        before = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is at {newest}"
        return (
            f"the loss is {loss} and the gradient norm {norm} at step {self.at.step + 1}, learning rate "
            f"{factor * self.config.optimizer.learning_rate:.3g}; {before}. Start a new run with a smaller "
            "optimizer.learning_rate and optimizer.muon_learning_rate, or with more optimizer.warmup_steps."
        )


def masked_batch(sequence_length: int, *, with_documents: bool = False) -> Batch:
    """One sequence that counts for nothing: its loss and its gradients are zero."""
    tokens_BT = torch.zeros((1, sequence_length), dtype=torch.int64)
    documents_BT = tokens_BT.int() if with_documents else None
    return Batch(tokens_BT, torch.full_like(tokens_BT, IGNORED), documents_BT)


def _divides(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _check_vocabulary(model_size: int, data_size: int) -> None:
    if model_size < data_size:
        raise UserError(
            f"the data has a vocabulary of {data_size} tokens, the model one of {model_size}; set model.vocab_size "
            f"to {data_size}, or prepare the data again."
        )

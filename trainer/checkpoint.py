"""Saving and resuming: model, optimizer, random state and position, whole or not at all.

`torch.distributed.checkpoint` writes each rank's files to a local folder; they are uploaded as parts, and rank 0
writes the manifest last. Loading takes the newest whole checkpoint along the chain of epochs (trainer.chain), at any
world size. All ranks call every method of `Checkpoints` at the same step; a failure on one is raised on all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cost.errors import SlmError, UserError
from trainer.chain import (
    MANIFEST,
    Damaged,
    EpochStart,
    Manifest,
    Place,
    begin_epoch,
    checkpoints_of_chain,
    fetch,
    newest_epoch,
    prune,
    read_manifest,
    require_newest,
    upload_parts,
)
from trainer.config import TrainConfig
from trainer.store import Store, StoreError

log = logging.getLogger(__name__)

FREE_FIELDS = (
    "micro_batch_size",
    "eval_every_steps",
    "eval_sequences",
    "checkpoint_interval_seconds",
    "checkpoint_every_steps",
    "keep_last",
    "compile",
    "activation_checkpointing",
    "sharding",
    "profile",
    "num_threads",
)
"""What may differ between a checkpoint and the run that goes on from it: nothing here is part of what is learned."""

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to."""

    config: TrainConfig
    tokenizer_sha256: str
    data_fingerprint: str

    def facts(self) -> dict[str, Any]:
        """As plain JSON, with one digest of all that decides the weights."""
        config = asdict(self.config)
        decisive = {name: value for name, value in config.items() if name not in FREE_FIELDS}
        text = json.dumps(decisive, sort_keys=True)
        return {
            "config": json.loads(json.dumps(config)),
            "config_digest": hashlib.sha256(text.encode()).hexdigest(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "data_fingerprint": self.data_fingerprint,
        }

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Raises UserError, naming what differs, unless `saved` is of this very run."""
        mine = self.facts()
        if all(mine[key] == saved.get(key) for key in ("config_digest", "tokenizer_sha256", "data_fingerprint")):
            return
        then, now = _decisive(saved), _decisive(mine)
        names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        differences = [f"{name} was {then.get(name)} and is {now.get(name)}" for name in names]
        raise UserError(
            f"the checkpoint is of another run: {'; '.join(differences)}. Set that back, or start a new run."
        )


@dataclass
class Counters:
    """What the loop counts, and wants back after an interruption."""

    step: int = 0
    tokens: int = 0
    heldout_loss: float | None = None
    first_heldout_loss: float | None = None


class Checkpoints:
    """The checkpoints of one group of workers. `begin` first, then `save` as often as you like."""

    def __init__(self, store: Store, *, rank: int, world_size: int, keep_last: int) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.keep_last = keep_last
        self.epoch = -1
        self.newest: Place | None = None
        self.last_stall_seconds = 0.0

    def begin(self, tensors: Mapping[str, Tensor], identity: Identity, lease_id: str) -> Counters:
        """Start an epoch, and fill `tensors` from the checkpoint that it goes on from, if there is one.

        Raises UserError when that checkpoint is of another run, and SlmError when there are checkpoints and all of
        them are damaged.
        """
        with tempfile.TemporaryDirectory(prefix="slm-load-") as name:
            folder = Path(name)
            begun, manifest = self._try_begin(identity, lease_id, folder)
            while not begun:
                log.warning("another group of workers began an epoch meanwhile; looking again")
                begun, manifest = self._try_begin(identity, lease_id, folder)
            if manifest is None:
                return Counters()
            self._together(lambda: _load(tensors, self.rank, folder))
            return Counters(**manifest.facts["counters"])

    def save(self, tensors: Mapping[str, Tensor], identity: Identity, counters: Counters) -> None:
        """Store everything under the step of `counters`; nothing if that is stored already.

        Raises StoreError when a disk is full or a store is gone, and Superseded when a newer epoch has begun.
        """
        if self.newest is not None and self.newest.step == counters.step:
            return
        started = time.monotonic()
        place = Place(self.epoch, counters.step)
        facts = {**identity.facts(), "counters": asdict(counters)}
        with tempfile.TemporaryDirectory(prefix="slm-save-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            self._together(lambda: _stage({**tensors, **_random_state(self.rank)}, folder))
            parts = self._together(lambda: upload_parts(self.store, place, folder))
        manifest = Manifest(place.epoch, place.step, self.world_size, sum(parts, ()), facts)
        self._on_first_rank(lambda: self._publish(place, manifest))
        self.newest = place
        self.last_stall_seconds = time.monotonic() - started

    def _publish(self, place: Place, manifest: Manifest) -> None:
        require_newest(self.store, self.epoch)
        self.store.write(place.prefix + MANIFEST, manifest.to_bytes())
        prune(self.store, self.epoch, self.keep_last)

    def _try_begin(self, identity: Identity, lease_id: str, folder: Path) -> tuple[bool, Manifest | None]:
        """Take the next epoch number, going on from the newest whole checkpoint, whose parts come into `folder`.

        False when another group of workers took that number first; the newest checkpoint may be another one then.
        """
        number = self._on_first_rank(lambda: newest_epoch(self.store) + 1)
        manifest, skipped = self._fetch_newest_whole(folder)
        if manifest is not None:
            identity.require_same(manifest.facts)
        parent = None if manifest is None else Place(manifest.epoch, manifest.step)
        start = EpochStart(
            epoch=number,
            parent=parent,
            lease_id=lease_id,
            world_size=self.world_size,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            skipped=tuple(skipped),
        )
        begun = self._on_first_rank(lambda: begin_epoch(self.store, start))
        self.epoch, self.newest = number, parent
        return begun, manifest

    def _fetch_newest_whole(self, folder: Path) -> tuple[Manifest | None, list[str]]:
        """Bring its parts into `folder` on every rank; also what was wrong with those that were passed over."""
        skipped: list[str] = []
        for place in self._on_first_rank(lambda: checkpoints_of_chain(self.store)):
            outcomes = self._together(functools.partial(_try_fetch, self.store, place, folder))
            reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
            manifest = outcomes[self.rank]
            if not reasons and isinstance(manifest, Manifest):
                return manifest, skipped
            skipped.append(f"{place}: {reasons[0]}")
            log.warning("the checkpoint at %s is damaged: %s; trying the one before", place, reasons[0])
        if skipped:
            raise SlmError(
                f"no checkpoint of this run in {self.store.uri} is whole ({'; '.join(skipped)}); bring the files "
                "back, or delete checkpoints/ and epochs/ there to begin at step 0."
            )
        return None, skipped

    def _on_first_rank(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank."""
        return self._together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return what each got; an error on any of them is raised on all."""
        value: T | None = None
        error: SlmError | None = None
        try:
            value = work()
        except SlmError as raised:
            error = raised
        if not dist.is_initialized():
            outcomes: list[tuple[T | None, SlmError | None]] = [(value, error)]
        else:
            outcomes = [(None, None)] * self.world_size
            dist.all_gather_object(outcomes, (value, error))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [result for result, _ in outcomes]  # type: ignore[misc]


def _stage(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this rank's files. Not synced to disk: what counts is what the store holds."""
    writer = FileSystemWriter(folder, sync_files=False)
    try:
        with _single_process_is_meant():
            save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        cause = _first_cause(error)
        if not isinstance(cause, (OSError, RuntimeError)):
            raise
        free_mib = shutil.disk_usage(folder).free / 2**20
        raise StoreError(
            f"cannot stage a checkpoint in {folder} ({cause}), {free_mib:.0f} MiB free; free space there or set "
            "TMPDIR to a larger disk and run the command again, all checkpoints stored before are intact."
        ) from error


def _try_fetch(store: Store, place: Place, folder: Path) -> Manifest | str:
    """The manifest once all parts are in `folder`, or in what way this checkpoint is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        manifest = read_manifest(store, place)
        fetch(store, place, manifest, folder)
    except Damaged as error:
        return str(error)
    return manifest


def _load(tensors: Mapping[str, Tensor], rank: int, folder: Path) -> None:
    """Copy what was saved into `tensors`, and set the random state."""
    reader = FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    # A rank or a device that was not there when this was saved keeps the random state it was seeded with.
    random_state = {name: value for name, value in _random_state(rank).items() if name in saved}
    with _single_process_is_meant():
        load({**tensors, **random_state}, storage_reader=reader, no_dist=True)
    if f"random/cpu/{rank}" in random_state:
        torch.set_rng_state(random_state[f"random/cpu/{rank}"])
    if f"random/cuda/{rank}" in random_state:
        torch.cuda.set_rng_state(random_state[f"random/cuda/{rank}"])


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Torch warns when it saves or loads without a process group, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"random/cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random/cuda/{rank}"] = torch.cuda.get_rng_state()
    return state


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where something did."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that must not change, one level deep, under the names that a recipe uses."""
    flat: dict[str, Any] = {name: facts.get(name) for name in ("tokenizer_sha256", "data_fingerprint")}
    for name, value in facts.get("config", {}).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        elif name not in FREE_FIELDS:
            flat[name] = value
    return flat

"""Saving and resuming: model, optimizer, random state and position, whole or not at all.

Each rank copies its share of the state into a buffer (trainer.checkpoints.staging), and training goes on while a
thread stores that buffer as one part; rank 0 writes the manifest once all parts are durable. One save is in flight at
most. What the threads of several ranks agree on goes through a process group of their own, never through that of
training. Loading takes the newest whole checkpoint along the chain of incarnations (trainer.checkpoints.lineage), at
any world size and layout. All ranks call every method of `Checkpoints` at the same step; a failure on one is raised on
all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cost.errors import SlmError, UserError
from trainer.checkpoints.lineage import (
    Damaged,
    IncarnationStart,
    Manifest,
    Place,
    begin_incarnation,
    checkpoints_of_chain,
    newest_incarnation,
    prune,
    publish,
    read_manifest,
)
from trainer.checkpoints.parts import write_part
from trainer.checkpoints.staging import Staging, empty_tensors, read_into
from trainer.config import NAMED_GROUPS, TrainConfig, decisive
from trainer.objectives.pretrain import PRETRAIN
from trainer.run_store import keys
from trainer.run_store.base import Store

log = logging.getLogger(__name__)

BESIDE_CONFIG = ("tokenizer_sha256", "data_fingerprint", "objective")
"""What else decides the weights."""
CLOSE_SECONDS = 60.0
"""How long a save in flight may go on when training ended by an error."""

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to."""

    config: TrainConfig
    tokenizer_sha256: str
    data_fingerprint: str
    objective: str = PRETRAIN

    def facts(self) -> dict[str, Any]:
        """As plain JSON, with one digest of all that decides the weights."""
        text = json.dumps(decisive(self.config), sort_keys=True)
        return {
            "config": json.loads(json.dumps(asdict(self.config))),
            "config_digest": hashlib.sha256(text.encode()).hexdigest(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "data_fingerprint": self.data_fingerprint,
            "objective": self.objective,
        }

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Raises UserError, naming what differs, unless `saved` is of this very run."""
        mine, saved = self.facts(), {"objective": PRETRAIN, **saved}  # older checkpoints name none
        if all(mine[key] == saved.get(key) for key in ("config_digest", *BESIDE_CONFIG)):
            return
        then, now = _by_name(saved), _by_name(mine)
        may_differ = now.keys() - _by_name({**mine, "config": decisive(self.config)}).keys()
        names = sorted(name for name in (then.keys() | now.keys()) - may_differ if then.get(name) != now.get(name))
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
    """The checkpoints of one group of workers. `begin` first, then `save` as often as you like, `close` at the end."""

    def __init__(
        self, store: Store, *, rank: int, world_size: int, keep_last: int, milestone_every_steps: int | None = None
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.keep_last = keep_last
        self.milestone_every_steps = milestone_every_steps
        self.incarnation = -1
        self.newest: Place | None = None
        """The newest that is durable."""
        self.last_stall_seconds = 0.0
        """How long training waited for the newest save."""
        self.last_save_seconds = 0.0
        """From the beginning of the newest durable save until it was durable."""
        self.last_cpu_seconds = 0.0
        """What the thread that stored it computed meanwhile: checksums, and copying into the operating system."""
        self.bytes_read = 0
        """What this rank read to begin."""
        self._staging: Staging | None = None
        self._saving: _Saving | None = None
        self._group: Any = None

    def begin(self, tensors: Mapping[str, Tensor], identity: Identity, lease_id: str) -> Counters:
        """Start an incarnation, and fill `tensors` from the checkpoint that it goes on from, if there is one.

        Raises UserError when that checkpoint is of another run, and SlmError when there are checkpoints and all of
        them are damaged.
        """
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        begun, manifest = self._try_begin(tensors, identity, lease_id)
        while not begun:
            log.warning("another group of workers began an incarnation meanwhile; looking again")
            begun, manifest = self._try_begin(tensors, identity, lease_id)
        if manifest is None:
            return Counters()
        for name, owner in sorted(_owners(tensors, self.world_size).items()):
            dist.broadcast(tensors[name], src=owner)
        return Counters(**manifest.facts["counters"])

    def save(
        self, tensors: Mapping[str, Tensor], identity: Identity, counters: Counters, *, durable: bool = True
    ) -> None:
        """Store everything under the step of `counters`; nothing if that is stored already.

        Returns once the state is copied, or with `durable` once it is stored for good. Waits for the save before it.
        Raises StoreError when a disk is full or a store is gone, and Superseded when a newer incarnation has begun: of
        this save, or later of the next call.
        """
        started = time.monotonic()
        self.wait()
        if self.newest is not None and self.newest.step == counters.step:
            return
        place = Place(self.incarnation, counters.step)
        facts = {**identity.facts(), **position(identity.config, counters), "counters": asdict(counters)}
        state = {**tensors, **_random_state(self.rank)}
        if self._staging is None:
            self._staging = Staging(state, self.rank, self._gather)
        self._staging.fill(state)
        self._saving = _Saving(place, started, lambda: self._store(place, facts))
        if durable:
            self.wait()
        self.last_stall_seconds = time.monotonic() - started

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._saving is not None and self._saving.is_running

    @property
    def has_failed(self) -> bool:
        """Whether the save that was in flight failed, which `wait` raises. Joined over ranks by the loop."""
        return self._saving is not None and self._saving.error is not None

    def poll(self) -> None:
        """Take note of a save that has become durable meanwhile."""
        if self._saving is not None and not self._saving.is_running and self._saving.error is None:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is durable; raises what went wrong with it, the same on all ranks."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        seconds = saving.join()
        self.newest, self.last_save_seconds, self.last_cpu_seconds = saving.place, seconds, saving.cpu_seconds

    def close(self, within_seconds: float = CLOSE_SECONDS) -> None:
        """Let a save in flight end, for some time; to be called when training ended, however it did."""
        if self._saving is not None:
            self._saving.thread.join(within_seconds)

    def _store(self, place: Place, facts: Mapping[str, Any]) -> None:
        """In the saving thread of each rank."""
        assert self._staging is not None
        staging = self._staging
        parts = self._together(
            lambda: write_part(self.store, place.prefix, keys.checkpoint_part(self.rank), staging.content())
        )
        manifest = Manifest(place.incarnation, place.step, self.world_size, tuple(parts), staging.tensors, dict(facts))
        self._on_first_rank(lambda: self._publish(manifest))

    def _publish(self, manifest: Manifest) -> None:
        publish(self.store, manifest)
        prune(self.store, self.incarnation, self.keep_last, self.milestone_every_steps)

    def _try_begin(
        self, tensors: Mapping[str, Tensor], identity: Identity, lease_id: str
    ) -> tuple[bool, Manifest | None]:
        """Take the next incarnation's number and continue from the newest whole checkpoint; each rank reads its share.

        False when another group of workers took that number first; the newest checkpoint may be another one then.
        """
        number = self._on_first_rank(lambda: newest_incarnation(self.store) + 1)
        manifest, skipped = self._read_newest_whole(tensors, identity)
        parent = None if manifest is None else Place(manifest.incarnation, manifest.step)
        start = IncarnationStart(
            incarnation=number,
            parent=parent,
            lease_id=lease_id,
            world_size=self.world_size,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            skipped=tuple(skipped),
        )
        begun = self._on_first_rank(lambda: begin_incarnation(self.store, start))
        self.incarnation, self.newest = number, parent
        return begun, manifest

    def _read_newest_whole(
        self, tensors: Mapping[str, Tensor], identity: Identity
    ) -> tuple[Manifest | None, list[str]]:
        """Fill this rank's share of `tensors`; also what was wrong with the checkpoints that were passed over."""
        skipped: list[str] = []
        for place in self._on_first_rank(lambda: checkpoints_of_chain(self.store)):
            manifest = self._on_first_rank(functools.partial(_manifest_or_damage, self.store, place))
            reasons = [manifest] if isinstance(manifest, str) else []
            if isinstance(manifest, Manifest):
                identity.require_same(manifest.facts)
                read = self._together(functools.partial(self._read, tensors, manifest, place))
                reasons = [reason for reason in read if reason]
                if not reasons:
                    return manifest, skipped
            skipped.append(f"{place}: {reasons[0]}")
            log.warning("the checkpoint at %s is damaged: %s; trying the one before", place, reasons[0])
        if skipped:
            raise SlmError(
                f"no checkpoint of this run in {self.store.uri} is whole ({'; '.join(skipped)}); bring the files "
                f"back, or delete {keys.CHECKPOINTS} and {keys.INCARNATIONS} there to begin at step 0."
            )
        return None, skipped

    def _read(self, tensors: Mapping[str, Tensor], manifest: Manifest, place: Place) -> str:
        """Fill this rank's share, and set its random state; in what way the checkpoint is damaged, if it is."""
        owners = _owners(tensors, self.world_size)
        mine = {name: tensor for name, tensor in tensors.items() if owners.get(name, self.rank) == self.rank}
        # A rank or a device that was not there when this was saved keeps the random state it was seeded with.
        random_state = {name: value for name, value in _random_state(self.rank).items() if name in manifest.tensors}
        try:
            self.bytes_read = read_into({**mine, **random_state}, manifest, self.store, place)
        except Damaged as error:
            return str(error)
        if f"random/cpu/{self.rank}" in random_state:
            torch.set_rng_state(random_state[f"random/cpu/{self.rank}"])
        if f"random/cuda/{self.rank}" in random_state:
            torch.cuda.set_rng_state(random_state[f"random/cuda/{self.rank}"])
        return ""

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
        outcomes: list[tuple[T | None, SlmError | None]] = self._gather((value, error))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def _gather(self, value: Any) -> list[Any]:
        """What each rank gave."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


class _Saving:
    """One save in flight."""

    def __init__(self, place: Place, started: float, work: Callable[[], None]) -> None:
        self.place = place
        self.error: BaseException | None = None
        self.cpu_seconds = 0.0
        self._started = started
        self._ended = started
        self._work = work
        # A daemon: where another rank died, this one must be able to end too.
        self.thread = threading.Thread(target=self._run, name=f"save-step-{place.step}", daemon=True)
        self.thread.start()

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive()

    def join(self) -> float:
        """How long it took, once it is durable; raises its error."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self._ended - self._started

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # whatever it is, the loop raises it
            self.error = error
        self.cpu_seconds = time.thread_time()
        self._ended = time.monotonic()


def read_tensors(store: Store, place: Place, prefix: str = "model/") -> dict[str, Tensor]:
    """Every tensor of a checkpoint whose name begins with `prefix`, whole, without that prefix.

    Raises Damaged when a byte of it is not as it was saved.
    """
    manifest = read_manifest(store, place)
    tensors = empty_tensors(manifest, prefix)
    read_into(tensors, manifest, store, place)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def position(config: TrainConfig, counters: Counters) -> dict[str, Any]:
    """Where the schedule and the data stand, for a reader of the manifest; the loop derives both from the step."""
    return {
        "schedule": {"step": counters.step, "num_steps": config.num_steps},
        "sample_position": counters.step * config.batch.global_batch_size,
    }


def _manifest_or_damage(store: Store, place: Place) -> Manifest | str:
    try:
        return read_manifest(store, place)
    except Damaged as error:
        return str(error)


def _owners(tensors: Mapping[str, Tensor], world_size: int) -> dict[str, int]:
    """Who reads each tensor that all ranks hold whole, so that together they read it once; the others get it sent.

    A tensor on the CPU under a process group of GPUs is left out: each rank reads it by itself.
    """
    if world_size == 1:
        return {}
    on_gpu_only = dist.get_backend() == "nccl"
    loads = [0] * world_size
    owners = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if not isinstance(tensor, DTensor) and not (on_gpu_only and tensor.device.type == "cpu"):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += tensor.nbytes
    return owners


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"random/cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random/cuda/{rank}"] = torch.cuda.get_rng_state()
    return state


def _by_name(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint belongs to, one level deep, under the names that a recipe uses.

    Older checkpoints hold the fields of all groups but NAMED_GROUPS beside these, which gives the same names.
    """
    flat: dict[str, Any] = {name: facts.get(name) for name in BESIDE_CONFIG}
    for name, value in facts.get("config", {}).items():
        if not isinstance(value, dict):
            flat[name] = value
        elif name in NAMED_GROUPS:
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat |= value
    return flat

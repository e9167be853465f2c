"""Which checkpoint counts: epochs, each started by one conditional write, and the chain of parents between them.

Every start of a group of workers is an epoch. It writes `epochs/E.json`, which names the checkpoint that it goes on
from, and saves only under `checkpoints/epoch=E/`. A reader walks from the newest epoch to its parent and so on, and
takes the newest whole checkpoint that it meets. What a process of an older epoch adds after the next one began (a
zombie: cut off, but not dead) lies beyond a parent's step and is never met.
Invariants: a checkpoint without its manifest does not exist; a manifest is written last and deleted first; the
KEPT_AT_LEAST newest of the chain are never deleted. This module is torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cost.errors import SlmError
from trainer.store import Store, StoreKeyMissing

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
KEPT_AT_LEAST = 2
"""One could be damaged; and a zombie between its last look and its last deletion cannot take what a newer epoch
starts from, because that is its own newest but one at the worst."""
HASH_BLOCK_BYTES = 2**20

_EPOCH_KEY = re.compile(r"epochs/(\d+)\.json")
_CHECKPOINT_KEY = re.compile(r"checkpoints/epoch=(\d+)/step=(\d+)/(.+)")


class Damaged(Exception):
    """A checkpoint that is not whole; its message says in what way."""


class Superseded(SlmError):
    """A newer group of workers has taken over this run."""

    def __init__(self, epoch: int, newest: int) -> None:
        self.epoch = epoch
        self.newest = newest
        super().__init__(
            f"epoch {epoch} of this run was superseded by epoch {newest}; this process stops and leaves the run "
            "to the newer one."
        )

    def __reduce__(self) -> tuple[type[Superseded], tuple[int, int]]:
        return Superseded, (self.epoch, self.newest)


class Place(NamedTuple):
    """Where a checkpoint lies. Places of one chain sort by age."""

    epoch: int
    step: int

    @property
    def prefix(self) -> str:
        return f"checkpoints/epoch={self.epoch}/step={self.step}/"

    def __str__(self) -> str:
        return f"step {self.step} of epoch {self.epoch}"


@dataclass(frozen=True)
class EpochStart:
    """One group of workers, and what it goes on from."""

    epoch: int
    parent: Place | None
    lease_id: str
    world_size: int
    started_at: str
    skipped: tuple[str, ...] = ()
    """The newer checkpoints that were passed over as damaged, each with the reason."""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint; `key` lies under the checkpoint's prefix, `name` is the file's own."""

    key: str
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What makes a set of parts a checkpoint."""

    epoch: int
    step: int
    world_size: int
    parts: tuple[Part, ...]
    facts: dict[str, Any]
    """Everything else that the loop wants back: configuration, data, counters."""

    def to_bytes(self) -> bytes:
        return json.dumps({"version": MANIFEST_VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises Damaged when the bytes are not a manifest."""
        try:
            fields = json.loads(data)
            if fields.pop("version") != MANIFEST_VERSION:
                raise Damaged("its manifest has another version")
            parts = tuple(Part(**part) for part in fields.pop("parts"))
            return cls(parts=parts, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its manifest cannot be read ({type(error).__name__}: {error})") from error


def newest_epoch(store: Store) -> int:
    """The number of the newest epoch, -1 before the first."""
    found = (_EPOCH_KEY.fullmatch(key) for key in store.list("epochs/"))
    return max((int(match[1]) for match in found if match), default=-1)


def begin_epoch(store: Store, start: EpochStart) -> bool:
    """Record it; False when another group of workers took that number first."""
    parent = None if start.parent is None else start.parent._asdict()
    record = {**asdict(start), "parent": parent}
    return store.create(f"epochs/{start.epoch}.json", json.dumps(record).encode())


def require_newest(store: Store, epoch: int) -> None:
    """Raises Superseded when a newer epoch has begun."""
    newest = newest_epoch(store)
    if newest > epoch:
        raise Superseded(epoch, newest)


def checkpoints_of_chain(store: Store) -> list[Place]:
    """Every checkpoint with a manifest that the newest epoch descends from or made, newest first."""
    complete: dict[int, list[int]] = {}
    for epoch, step, name in _checkpoint_keys(store):
        if name == MANIFEST:
            complete.setdefault(epoch, []).append(step)
    places = []
    epoch, limit = newest_epoch(store), None
    while epoch >= 0:
        steps = sorted(complete.get(epoch, []), reverse=True)
        places += [Place(epoch, step) for step in steps if limit is None or step <= limit]
        parent = _parent_of(store, epoch)
        if parent is None:
            break
        epoch, limit = parent
    return places


def read_manifest(store: Store, place: Place) -> Manifest:
    """Raises Damaged when it is gone or not one."""
    try:
        return Manifest.from_bytes(store.read(place.prefix + MANIFEST))
    except StoreKeyMissing as error:
        raise Damaged("its manifest is missing") from error


def fetch(store: Store, place: Place, manifest: Manifest, folder: Path) -> None:
    """Bring all parts into `folder` under their own names; raises Damaged unless every byte is as it was saved."""
    for part in manifest.parts:
        target = folder / part.name
        try:
            store.download(place.prefix + part.key, target)
        except StoreKeyMissing as error:
            raise Damaged(f"part {part.key} is missing") from error
        size = target.stat().st_size
        if size != part.num_bytes:
            raise Damaged(f"part {part.key} has {size} bytes instead of {part.num_bytes}")
        if file_sha256(target) != part.sha256:
            raise Damaged(f"part {part.key} has another checksum")


def upload_parts(store: Store, place: Place, folder: Path) -> tuple[Part, ...]:
    """Store every file of `folder`. Leading dots go, since a store keeps such names to itself."""
    parts = []
    for path in sorted(folder.iterdir()):
        key = path.name.lstrip(".")
        store.upload(place.prefix + key, path)
        parts.append(Part(key, path.name, path.stat().st_size, file_sha256(path)))
    return tuple(parts)


def prune(store: Store, epoch: int, keep_last: int) -> None:
    """Delete what no reader will need: all but the newest of the chain, and what is no checkpoint at all.

    Raises Superseded, and deletes nothing, when `epoch` is no longer the newest. Call it between two saves.
    """
    kept = set(checkpoints_of_chain(store)[: max(keep_last, KEPT_AT_LEAST)])
    doomed = [
        Place(found, step).prefix + name
        for found, step, name in _checkpoint_keys(store)
        if found <= epoch and Place(found, step) not in kept
    ]
    require_newest(store, epoch)
    for key in sorted(doomed, key=lambda key: not key.endswith("/" + MANIFEST)):
        store.delete(key)


def file_sha256(path: Path) -> str:
    """Of the content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parent_of(store: Store, epoch: int) -> Place | None:
    key = f"epochs/{epoch}.json"
    try:
        parent = json.loads(store.read(key))["parent"]
        return None if parent is None else Place(int(parent["epoch"]), int(parent["step"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SlmError(
            f"{key} in {store.uri} cannot be read ({error}), so it is unknown which checkpoints are this run's; "
            "bring that file back, or start a new run."
        ) from error


def _checkpoint_keys(store: Store) -> list[tuple[int, int, str]]:
    found = (_CHECKPOINT_KEY.fullmatch(key) for key in store.list("checkpoints/"))
    return [(int(match[1]), int(match[2]), match[3]) for match in found if match]

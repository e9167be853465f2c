"""Which checkpoint counts: incarnations, each started by one conditional write, and the chain of their parents.

Every start of a group of workers is an incarnation. It writes `incarnations/I.json`, which names the checkpoint that it
continues from, and saves only under `checkpoints/incarnation=I/`. A reader walks from the newest incarnation to its
parent and so on, and takes the newest whole checkpoint that it meets. What a process of an older incarnation adds after
the next one began (a zombie: cut off, but not dead) lies beyond a parent's step and is never met.
Invariants: a checkpoint without its manifest does not exist; a manifest is written last and deleted first; the
KEPT_AT_LEAST newest of the chain are never deleted. A store whose lists lag behind (S3 itself does not, some that
speak its protocol do) hides neither the newest incarnation nor its newest checkpoint: both are also found by name.
This module is torch-free.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cost.errors import SlmError
from trainer.checkpoints.parts import Damaged as Damaged
from trainer.checkpoints.parts import Part
from trainer.run_store import keys
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import Writer, envelope, require_current_layout, unwrap, wrap

MANIFEST_SCHEMA = 3
KEPT_AT_LEAST = 2
"""One could be damaged; and a zombie between its last look and its last deletion cannot take what a newer incarnation
starts from, because that is its own newest but one at the worst."""


class Superseded(SlmError):
    """A newer group of workers has taken over this run."""

    def __init__(self, incarnation: int, newest: int) -> None:
        self.incarnation = incarnation
        self.newest = newest
        super().__init__(
            f"incarnation {incarnation} of this run was superseded by incarnation {newest}; this process stops and "
            "leaves the run to the newer one."
        )

    def __reduce__(self) -> tuple[type[Superseded], tuple[int, int]]:
        return Superseded, (self.incarnation, self.newest)


class Place(NamedTuple):
    """Where a checkpoint lies. Places of one chain sort by age."""

    incarnation: int
    step: int

    @property
    def prefix(self) -> str:
        return keys.checkpoint_folder(self.incarnation, self.step)

    def __str__(self) -> str:
        return f"step {self.step} of incarnation {self.incarnation}"


@dataclass(frozen=True)
class IncarnationStart:
    """One group of workers, and what it goes on from."""

    incarnation: int
    parent: Place | None
    lease_id: str
    world_size: int
    started_at: str
    skipped: tuple[str, ...] = ()
    """The newer checkpoints that were passed over as damaged, each with the reason."""


@dataclass(frozen=True)
class Manifest:
    """What makes a set of parts a checkpoint."""

    incarnation: int
    step: int
    world_size: int
    parts: tuple[Part, ...]
    tensors: dict[str, Any]
    """Where each tensor lies in the parts, as trainer.checkpoints.staging wrote it."""
    facts: dict[str, Any]
    """Everything else that the loop wants back: configuration, data, counters."""

    def to_bytes(self) -> bytes:
        """JSON with a checksum of itself: a changed position would find the wrong, yet undamaged bytes."""
        body = json.dumps(asdict(self), indent=1)
        digest = hashlib.sha256(body.encode()).hexdigest()
        head = json.dumps({**envelope(Writer.TRAINER), "schema": MANIFEST_SCHEMA, "sha256": digest})
        return f"{head}\n{body}".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises Damaged when the bytes are not a manifest, or not as they were written."""
        try:
            head, _, body = data.decode().partition("\n")
            said = json.loads(head)
            if "version" in said or said["schema"] != MANIFEST_SCHEMA:
                raise Damaged("its manifest has another version")
            if said["sha256"] != hashlib.sha256(body.encode()).hexdigest():
                raise Damaged("its manifest has another checksum")
            fields = json.loads(body)
            parts = tuple(Part(**{**part, "sha256": tuple(part["sha256"])}) for part in fields.pop("parts"))
            return cls(parts=parts, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its manifest cannot be read ({type(error).__name__}: {error})") from error


def newest_incarnation(store: Store) -> int:
    """The number of the newest incarnation, -1 before the first."""
    found = (keys.incarnation_number(key) for key in store.list(keys.INCARNATIONS))
    newest = max((number for number in found if number is not None), default=-1)
    while _exists(store, keys.incarnation(newest + 1)):  # a list may lag behind
        newest += 1
    return newest


def begin_incarnation(store: Store, start: IncarnationStart) -> bool:
    """Record it; False when another group of workers took that number first."""
    parent = None if start.parent is None else start.parent._asdict()
    record = {**asdict(start), "parent": parent}
    return store.create(keys.incarnation(start.incarnation), wrap(record, Writer.TRAINER))


def require_newest(store: Store, incarnation: int) -> None:
    """Raises Superseded when a newer incarnation has begun."""
    newest = newest_incarnation(store)
    if newest > incarnation:
        raise Superseded(incarnation, newest)


def checkpoints_of_chain(store: Store) -> list[Place]:
    """Every checkpoint with a manifest that the newest incarnation descends from or made, newest first."""
    complete: dict[int, set[int]] = {}
    for incarnation, step, name in _checkpoint_keys(store):
        if name == keys.MANIFEST:
            complete.setdefault(incarnation, set()).add(step)
    places: list[Place] = []
    incarnation, limit = newest_incarnation(store), None
    if incarnation < 0:
        require_current_layout(store)
    while incarnation >= 0:
        steps = complete.pop(incarnation, set())
        if not places:
            steps |= _published_step(store, incarnation)
        places += [Place(incarnation, step) for step in sorted(steps, reverse=True) if limit is None or step <= limit]
        parent = _parent_place(store, incarnation)
        if parent is None or (places and not any(older < incarnation for older in complete)):
            break
        incarnation, limit = parent
    return places


def publish(store: Store, manifest: Manifest) -> None:
    """Make what its parts hold a checkpoint; raises Superseded when a newer incarnation has begun."""
    require_newest(store, manifest.incarnation)
    place = Place(manifest.incarnation, manifest.step)
    store.write(place.prefix + keys.MANIFEST, manifest.to_bytes())
    store.write(keys.newest_checkpoint(manifest.incarnation), wrap({"step": manifest.step}, Writer.TRAINER))


def read_manifest(store: Store, place: Place) -> Manifest:
    """Raises Damaged when it is gone or not one."""
    try:
        return Manifest.from_bytes(store.read(place.prefix + keys.MANIFEST))
    except StoreKeyMissing as error:
        raise Damaged("its manifest is missing") from error


def prune(store: Store, incarnation: int, keep_last: int, milestone_every_steps: int | None = None) -> None:
    """Delete what no reader will need: all but milestones and the newest of the chain, and what is no checkpoint.

    Raises Superseded, and deletes nothing, when `incarnation` is no longer the newest. Call it between two saves.
    """
    chain = checkpoints_of_chain(store)
    kept = set(chain[: max(keep_last, KEPT_AT_LEAST)])
    if milestone_every_steps is not None:
        kept |= {place for place in chain if place.step % milestone_every_steps == 0}
    doomed = [
        Place(found, step).prefix + name
        for found, step, name in _checkpoint_keys(store)
        if found <= incarnation and Place(found, step) not in kept
    ]
    require_newest(store, incarnation)
    for key in sorted(doomed, key=lambda key: not key.endswith("/" + keys.MANIFEST)):
        store.delete(key)


def _parent_place(store: Store, incarnation: int) -> Place | None:
    key = keys.incarnation(incarnation)
    try:
        parent = unwrap(store.read(key), key)["parent"]
        return None if parent is None else Place(int(parent["incarnation"]), int(parent["step"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SlmError(
            f"{key} in {store.uri} cannot be read ({error}), so it is unknown which checkpoints are this run's; "
            "bring that file back, or start a new run."
        ) from error


def _published_step(store: Store, incarnation: int) -> set[int]:
    """The step that this incarnation saved last, if that is still there."""
    try:
        key = keys.newest_checkpoint(incarnation)
        step = int(unwrap(store.read(key), key)["step"])
    except (StoreKeyMissing, ValueError, KeyError, TypeError):
        return set()
    return {step} if _exists(store, Place(incarnation, step).prefix + keys.MANIFEST) else set()


def _exists(store: Store, key: str) -> bool:
    try:
        store.read_range(key, 0, 1)
    except StoreKeyMissing:
        return False
    return True


def _checkpoint_keys(store: Store) -> list[tuple[int, int, str]]:
    found = (keys.checkpoint_file(key) for key in store.list(keys.CHECKPOINTS))
    return [file for file in found if file is not None]

"""The manifest that completes a stage.

Invariant: a stage is complete exactly when its manifest is in the run store and was made of the manifests that its
predecessors have now. So a supervisor that takes a run over begins with the first stage that is not complete, and a
stage that was run again makes all after it incomplete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from tasks.recipe.stages import StageOptions
from tasks.run_store_keys import stage_manifest
from tasks.spec import RunSpec
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import Writer, unwrap, wrap


class Outcome(StrEnum):
    """FINISHED: all is done. CAP: its share of the cap was used up; later stages go on with what is there."""

    FINISHED = "finished"
    CAP = "cap"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a stage has made, written once when it has ended."""

    stage: str
    kind: str
    outcome: Outcome
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digest of the manifest of each earlier stage, as it was when this one ended."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of its kind: where the prepared data are, the last step, scores."""
    cap_usd: Decimal | None = None
    """With the outcome CAP: the run's cap then. A higher one makes the stage incomplete again."""

    def to_bytes(self) -> bytes:
        return wrap(self._content(), Writer.SUPERVISOR, indent=1)

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest | None:
        """None for what is no manifest: the stage is then not complete, and is run again."""
        try:
            read = unwrap(content, "manifest")
            cap = read.get("cap_usd")
            return cls(
                stage=str(read["stage"]),
                kind=str(read["kind"]),
                outcome=Outcome(read["outcome"]),
                inputs=dict(read.get("inputs") or {}),
                facts=dict(read.get("facts") or {}),
                cap_usd=None if cap is None else Decimal(str(cap)),
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            return None

    def digest(self) -> str:
        """By which a later stage knows what it was made of."""
        text = json.dumps(self._content(), sort_keys=True, indent=1)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _content(self) -> dict[str, Any]:
        return asdict(self) | {"cap_usd": None if self.cap_usd is None else str(self.cap_usd)}


def read_manifest(store: Store, name: str) -> Manifest | None:
    try:
        return Manifest.from_bytes(store.read(stage_manifest(name)))
    except StoreKeyMissing:
        return None


def write_manifest(store: Store, manifest: Manifest) -> None:
    store.write(stage_manifest(manifest.stage), manifest.to_bytes())


def finish(store: Store, spec: RunSpec, facts: Mapping[str, Any]) -> None:
    """What the program of a stage does on its node before it ends with the exit code of one that finished."""
    stage = spec.stage
    write_manifest(store, Manifest(stage.name, stage.kind, Outcome.FINISHED, spec.inputs, facts))


def inputs_of(store: Store, stages: Sequence[StageOptions], name: str) -> dict[str, str]:
    """Digests of the manifests of all stages before this one."""
    found: dict[str, str] = {}
    for earlier in stages:
        if earlier.name == name:
            break
        manifest = read_manifest(store, earlier.name)
        if manifest is not None:
            found[earlier.name] = manifest.digest()
    return found


def is_complete(store: Store, stages: Sequence[StageOptions], name: str, *, cap_usd: Decimal) -> bool:
    """Whether the stage need not be run again under this cap."""
    manifest = read_manifest(store, name)
    if manifest is None or manifest.inputs != inputs_of(store, stages, name):
        return False
    if manifest.outcome is Outcome.CAP:
        return manifest.cap_usd is not None and cap_usd <= manifest.cap_usd
    return True

"""A third kind of stage, for tests: on a node of its own it counts the bytes of the newest checkpoint, part by part.

Run as a program it is what a node runs (`node`, which makes the kind known to the node task) and what drives the stage
there (`drive`). Each part that is counted is kept, so that a later node continues with the next one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tasks import run_store_keys as keys
from tasks.node.environment import NodeEnv
from tasks.own_module import own_arguments
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions
from tasks.spec import RunSpec
from tasks.stages.base import Needs, Place
from tasks.stages.manifest import finish
from tasks.stages.registry import register, stage_of, store_of_stage
from tasks.stores.opening import open_store
from trainer.run_store.base import Store, StoreKeyMissing

KIND = "count"
COUNTED = "counted/"
PART_SECONDS = 0.5
NODE = own_arguments("tests.support.counting_stage", "node")


class CountOptions(StageOptions):
    """How long it takes, and where it fails."""

    needs_before: ClassVar[tuple[str, ...]] = ("pretrain",)

    kind: Literal["count"] = "count"
    name: str = KIND
    parts: Annotated[int, Field(gt=0)] = 4
    breaks_at: int | None = None
    """Its first node breaks at this part."""


@dataclass(frozen=True, slots=True)
class Count:
    """Counts the bytes of the newest checkpoint."""

    options: StageOptions
    reads: Sequence[str] = (f"{keys.CHECKPOINTS}*/{keys.MANIFEST}",)
    repeats: bool = False

    @property
    def root(self) -> str:
        return keys.stage_folder(self.options.name)

    @property
    def writes(self) -> Sequence[str]:
        return (f"{self.root}/",)

    def needs(self, _recipe: Recipe, /) -> Needs:
        assert isinstance(self.options, CountOptions)
        return Needs(devices=True, node_seconds=self.options.parts * PART_SECONDS)

    def command(self, _place: Place | None, /) -> Sequence[str]:
        return own_arguments("tests.support.counting_stage", "drive")

    def facts(self, printed: Mapping[str, Any], /) -> Mapping[str, Any]:
        return printed


def make_known() -> None:
    """To recipes and specs of this process."""
    register(KIND, Count, CountOptions)


def drive() -> int:
    """Count on node 0; the exit code of the node's command."""
    env = NodeEnv.from_environ()
    spec = RunSpec.load(env.spec_path)
    options = spec.stage
    assert isinstance(options, CountOptions)
    store = open_store(env.store_uri, create=False)
    own = store_of_stage(store, stage_of(options))
    first = counted = len(own.list(COUNTED))
    while counted < options.parts:
        if is_told_to_stop(store, env.lease_id):
            return keys.EXIT_STOPPED
        if counted == options.breaks_at and first < counted and spec.attempt == 1:
            return keys.EXIT_BROKEN
        time.sleep(PART_SECONDS)
        counted += 1
        own.create(f"{COUNTED}{counted:04d}.json", json.dumps({"lease_id": env.lease_id}).encode())
        progress = {"step": counted, "num_steps": options.parts, "incarnation": spec.attempt, "stage": options.name}
        own.write(keys.PROGRESS, json.dumps(progress).encode())
    finish(store, spec, {"num_bytes": newest_checkpoint_bytes(store)})
    return keys.EXIT_FINISHED


def newest_checkpoint_bytes(store: Store) -> int:
    """Of all files beside the newest manifest."""
    newest = max(key for key in store.list(keys.CHECKPOINTS) if key.endswith(f"/{keys.MANIFEST}"))
    folder = newest.removesuffix(keys.MANIFEST)
    return sum(len(store.read(key)) for key in store.list(folder))


def is_told_to_stop(store: Store, lease_id: str) -> bool:
    try:
        return bool(json.loads(store.read(keys.control(lease_id)))["command"] == "stop")
    except StoreKeyMissing:
        return False


if __name__ == "__main__":
    from tests.support import counting_stage  # the module by its own name, not as __main__

    counting_stage.make_known()
    if sys.argv[1] == "drive":
        sys.exit(counting_stage.drive())
    from tasks.__main__ import main

    sys.exit(main(["node"]))

"""The protocol of a stage.

A run is a list of stages under one budget. The supervisor knows a stage only by what stands here: what it needs, what
it reads and writes in the run store, and which program runs it. A stage that needs devices runs on leases of its own,
each started with a `tasks.spec.RunSpec` that names the stage; one that needs none is a child process of the supervisor.
Kinds are registered in `tasks.stages.registry`; `tasks.stages.manifest` says when one is complete.

Torch-free: the orchestrator imports this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cost.performance.workload import Workload
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions


@dataclass(frozen=True, slots=True)
class Needs:
    """What a stage rents. The planner and the memory model go by the workload, the reservation by both."""

    devices: bool
    """False: a program on the supervisor's machine, at no cost."""
    workload: Workload | None = None
    """What is computed, where FLOPs and memory decide how long that takes."""
    node_seconds: float = 0.0
    """Real seconds of one node, where something else decides; added to the time of the workload."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the program of a stage without devices can be told on its command line."""

    recipe_file: str
    """JSON of the recipe."""
    data_root: str
    """Where prepared data sets are."""
    store_uri: str


class Stage(Protocol):
    """One stage of a recipe, as its kind does it."""

    @property
    def options(self) -> StageOptions:
        """What the recipe says of it, its name included."""
        ...

    @property
    def reads(self) -> Sequence[str]:
        """Patterns of keys of the run store, such as `checkpoints/*/manifest.json`.

        A key must match each of them before the stage can begin.
        """
        ...

    @property
    def writes(self) -> Sequence[str]:
        """Prefixes of the run store under which all that it writes lies, beside its manifest."""
        ...

    @property
    def root(self) -> str:
        """Folder of the run store that holds its checkpoints, progress and failures; "" is the store itself."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether each supervisor runs it again before a stage that follows: what it makes lies on its machine."""
        ...

    def needs(self, recipe: Recipe, /) -> Needs:
        """What it rents for this recipe."""
        ...

    def command(self, place: Place | None, /) -> Sequence[str]:
        """Arguments of python: of the program beside the supervisor or, without a place, on node 0 of its lease.

        On a node it finds its spec by the environment (`tasks.node.environment`), writes the manifest when it is done,
        and ends with one of the exit codes of a node's command. Beside the supervisor the last line that it prints is
        JSON, of which `facts` makes the manifest's.
        """
        ...

    def facts(self, printed: Mapping[str, Any], /) -> Mapping[str, Any]:
        """What the manifest says of the stage, from what its program beside the supervisor printed.

        The same on every machine for the same work: no path of this one.
        """
        ...

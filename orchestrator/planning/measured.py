"""What runs on this machine were measured at, for the next plan of the same shape.

Reads the run stores under the home as they are, so that it works beside a living run; a store that cannot be read
counts nothing.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.settings import Home
from tasks import run_store_keys as keys
from tasks.recipe.schema import Recipe

SETTLED_STEPS = 20
"""A run's speed counts from this step on: the first ones warm caches up."""


def measured_tokens_per_second(home: Home, recipe: Recipe) -> float | None:
    """Of the newest run of this shape on as many workers, over all of them; None where there was none."""
    found: list[tuple[float, float]] = []
    for progress in (home.root / "store").glob(f"*/{keys.PROGRESS}"):
        try:
            newest: Any = json.loads(progress.read_bytes())
            spec: Any = json.loads((progress.parents[1] / keys.SPEC).read_bytes())
            speed = _speed(newest, spec["recipe"], recipe)
            written = progress.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if speed is not None:
            found.append((written, speed))
    return max(found)[1] if found else None


def _speed(newest: Any, trained: Any, recipe: Recipe) -> float | None:
    same = _shape(trained) == _shape(recipe.model_dump(mode="json"))
    if not same or newest["world_size"] != recipe.nodes.max or newest["step"] < SETTLED_STEPS:
        return None
    speed = newest["tokens_per_second"]
    return None if speed is None or speed <= 0 else float(speed)


def _shape(recipe: Any) -> Any:
    """What decides the speed."""
    training = {key: recipe["training"][key] for key in ("global_batch_size", "micro_batch_size", "num_threads")}
    return recipe["model"], recipe["optimizer"]["name"], recipe["precision"], recipe["training"]["compile"], training

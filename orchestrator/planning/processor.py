"""How fast this machine's processor is, for runs on the local backend: timed by a child process, once, and then kept.

Torch is never imported here. A timing is kept in the home by processor, torch version and sizes of the model; what
cannot be timed is taken from a table and said to be assumed.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.runs.options import LOCAL
from orchestrator.settings import Home
from tasks.own_module import own_module
from tasks.recipe.schema import AUTO, Recipe
from trainer.processor import ProcessorSpeed, assumed_speed, processor_name

LONGEST_SECONDS = 60.0
"""Importing torch takes most of it."""


def known_speed(home: Home, recipe: Recipe) -> ProcessorSpeed | None:
    """What was timed before, else what is assumed; None for a recipe that does not run on this machine."""
    if recipe.backend != LOCAL:
        return None
    try:
        return ProcessorSpeed(**_kept(home)[_key(recipe)])
    except (KeyError, TypeError):
        return assumed_speed()


def timed_speed(home: Home, recipe: Recipe) -> ProcessorSpeed | None:
    """The same, timed now if it was not before."""
    known = known_speed(home, recipe)
    if known is None or known.is_measured:
        return known
    timed = time_in_child(recipe)
    if timed is None:
        return known
    kept = _kept(home) | {_key(recipe): asdict(timed)}
    path = home.create().processor
    half = path.with_name(f"{path.name}.half")
    half.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    half.replace(path)
    return timed


def in_known_precision(recipe: Recipe, speed: ProcessorSpeed | None) -> Recipe:
    """A recipe of the local backend that leaves its precision open gets the faster one."""
    return recipe if speed is None or recipe.precision != AUTO else recipe.in_precision(speed.precision)


def time_in_child(recipe: Recipe) -> ProcessorSpeed | None:
    """By a child process; None where it cannot run, which a launch will meet in a clearer way."""
    with tempfile.TemporaryDirectory(prefix="slm-processor-") as folder:
        file = Path(folder) / "recipe.json"
        file.write_text(recipe.model_dump_json(), encoding="utf-8")
        command = own_module("tasks", "time-processor", "--recipe-json", str(file))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=True)
            return ProcessorSpeed(**json.loads(done.stdout.strip().splitlines()[-1]))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
            return None


def _kept(home: Home) -> dict[str, Any]:
    try:
        content = json.loads(home.processor.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(recipe: Recipe) -> str:
    """What decides the speed of a product."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    model = recipe.model
    rows = recipe.training.micro_batch_size * model.sequence_length
    return f"{processor_name()}, torch {torch}, {rows} x {model.width} x {model.hidden_size}"

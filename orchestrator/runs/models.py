"""A run's weights in use: export, generation, import. The work is done by `python -m tasks`, which may import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost.errors import SlmError, UserError
from orchestrator.runs import status as report
from orchestrator.settings import Home
from tasks.own_module import own_module
from tasks.run_store_keys import SPEC

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Source:
    """Where a run keeps its checkpoints, and its tokenizer."""

    run_id: str
    store_uri: str
    data_dir: Path

    def arguments(self) -> list[str]:
        """For a task."""
        return ["--store", self.store_uri, "--data-dir", str(self.data_dir)]


def source_of(run_id: str | None, home: Home) -> Source:
    """A run's places, as its newest spec tells them.

    Raises:
        UserError: There is no such run, or it has not begun.
    """
    with report.open_runs(home) as runs:
        run = runs.pick(run_id)
    spec = report.read_json(run, home, SPEC)
    if spec is None:
        raise UserError(f"run {run.run_id} has not begun, so it has no weights; `slm status {run.run_id}` shows it.")
    return Source(run.run_id, str(spec["store_uri"]), Path(spec["data_dir"]))


def export(source: Source, out: Path) -> dict[str, Any]:
    """What was written."""
    return _facts(["export", *source.arguments(), "--out", str(out)])


def import_folder(folder: Path, out: Path) -> dict[str, Any]:
    """What was read."""
    return _facts(["import", str(folder), "--out", str(out)])


def generate(source: Source, prompt: str, options: Sequence[str]) -> None:
    """Write the prompt and what follows to standard output as it comes."""
    command = own_module("tasks", "generate", *source.arguments(), *options, "--", prompt)
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    _require(done)


def _facts(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(own_module("tasks", *arguments), capture_output=True, text=True, check=False)
    _require(done)
    sys.stderr.write(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _require(done: subprocess.CompletedProcess[str]) -> None:
    """Pass on the error of a task as our own."""
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        error = UserError if done.returncode == UserError.exit_code else SlmError
        raise error(last)

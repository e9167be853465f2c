"""Stages that need no devices: a child process on this machine, which a stop ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cost.errors import SlmError, UserError
from cost.ledger.recovery import Stop, StopReason
from orchestrator.events import Emit, Event
from orchestrator.runs.status import FOLLOW_SECONDS
from orchestrator.settings import Home
from orchestrator.supervisor.lease.stopping import StopSwitch
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import PrepareOptions
from tasks.stages.base import Place, Stage
from tasks.stages.manifest import Manifest, Outcome, inputs_of, write_manifest
from tasks.stages.registry import stage_of
from trainer.run_store.base import Store


@dataclass(frozen=True, slots=True)
class Beside:
    """Runs one stage of a run on this machine, and writes its manifest."""

    stage: Stage
    recipe: Recipe
    home: Home
    store: Store
    emit: Emit
    switch: StopSwitch
    done: Callable[[Mapping[str, Any]], None]
    """Hears what the program printed."""

    def until_stop(self) -> Stop:
        """Run it to its end.

        Raises:
            SlmError: It failed; the run stays as it is, and the next supervisor tries again.
        """
        options = self.stage.options
        printed = run_beside(self.stage, self.recipe, self.home, self.store.uri, on_event=self.emit, switch=self.switch)
        inputs = inputs_of(self.store, self.recipe.stage_list(), options.name)
        facts = self.stage.facts(printed)
        write_manifest(self.store, Manifest(options.name, options.kind, Outcome.FINISHED, inputs, facts))
        self.done(printed)
        return Stop(StopReason.FINISHED, f"{options.name} is complete")


def prepare(recipe: Recipe, *, home: Home, on_event: Emit, switch: StopSwitch | None = None) -> Path:
    """The prepared data set of this recipe; a child process makes it if there is none.

    Raises:
        SlmError: The preparation failed; the message is its own.
    """
    stage = stage_of(PrepareOptions())
    return Path(run_beside(stage, recipe, home, "", on_event=on_event, switch=switch)["data_dir"])


def run_beside(
    stage: Stage,
    recipe: Recipe,
    home: Home,
    store_uri: str,
    *,
    on_event: Emit,
    switch: StopSwitch | None = None,
) -> dict[str, Any]:
    """The last line that the program of the stage prints.

    Raises:
        SlmError: It failed; the message is its own.
    """
    options = stage.options
    what = "preparing data" if options.kind == "prepare" else f"running stage {options.name}"
    home.data_root.mkdir(parents=True, exist_ok=True)
    recipe_file = home.data_root / f".{recipe.digest()[:16]}.{os.getpid()}.json"
    recipe_file.write_text(recipe.without_stages().model_dump_json(), encoding="utf-8")
    command = [sys.executable, *stage.command(Place(str(recipe_file), str(home.data_root), store_uri))]
    on_event(Event(options.kind, what, datetime.now(UTC)))
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as child:  # a session of its own: Ctrl-C reaches us only
            output, errors = follow_child(child, switch, what=what)
            code = child.returncode
    finally:
        recipe_file.unlink(missing_ok=True)
    if code != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        error = UserError if code == UserError.exit_code else SlmError
        raise error(last.removeprefix("Error: "))
    printed: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return printed


def follow_child(child: subprocess.Popen[str], switch: StopSwitch | None, *, what: str) -> tuple[str, str]:
    """Wait for the program; a stop ends it."""
    while True:
        try:
            return child.communicate(timeout=FOLLOW_SECONDS)
        except subprocess.TimeoutExpired:
            if switch is not None and switch.level:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                raise SlmError(
                    f"stopped while {what}; nothing was rented, run the command again to continue."
                ) from None

"""Preparing the data of a recipe, in a child process, since tokenizing needs what this program does not import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from cost.errors import SlmError, UserError
from orchestrator.events import Emit, Event
from orchestrator.runs.status import FOLLOW_SECONDS
from orchestrator.settings import Home
from orchestrator.supervisor.lease.stopping import StopSwitch
from tasks.own_module import own_module
from tasks.recipe.schema import Recipe


def prepare(recipe: Recipe, *, home: Home, on_event: Emit, switch: StopSwitch | None = None) -> Path:
    """The prepared data set of this recipe; a child process makes it if there is none.

    Raises:
        SlmError: The preparation failed; the message is its own.
    """
    home.data_root.mkdir(parents=True, exist_ok=True)
    recipe_file = home.data_root / f".{recipe.digest()[:16]}.{os.getpid()}.json"
    recipe_file.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = own_module("tasks", "prepare", "--recipe-json", str(recipe_file), "--data-root", str(home.data_root))
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as child:  # a session of its own: Ctrl-C reaches us only
            assert child.stdout is not None and child.stderr is not None
            output, errors = follow_child(child, on_event, switch)
            code = child.returncode
    finally:
        recipe_file.unlink(missing_ok=True)
    if code != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        error = UserError if code == UserError.exit_code else SlmError
        raise error(last.removeprefix("Error: "))
    return Path(json.loads(output.strip().splitlines()[-1])["data_dir"])


def follow_child(child: subprocess.Popen[str], on_event: Emit, switch: StopSwitch | None) -> tuple[str, str]:
    """Wait for the preparation; a stop ends it."""
    on_event(Event("prepare", "preparing data", datetime.now(UTC)))
    while True:
        try:
            return child.communicate(timeout=FOLLOW_SECONDS)
        except subprocess.TimeoutExpired:
            if switch is not None and switch.level:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                raise SlmError(
                    "stopped while preparing data; nothing was rented, run the command again to continue."
                ) from None

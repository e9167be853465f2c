"""Where each stage of a run is: its manifest, its leases and its progress, put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from cost.ledger.leases import usd
from cost.ledger.ledger import Ledger
from tasks import run_store_keys as keys
from tasks.recipe.schema import Recipe
from tasks.stages.manifest import Outcome, read_manifest
from tasks.stages.registry import stage_of, store_of_stage
from trainer.run_store.base import Store, StoreError, StoreKeyMissing


class StageState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    AT_CAP = "at_cap"
    """It stopped where its share of the cap was used up."""
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage of a run."""

    name: str
    kind: str
    state: StageState
    spent_usd: Decimal
    reserved_usd: Decimal
    """For a stage that has not begun; what a running one holds is in the leases."""
    step: int | None
    num_steps: int | None


def stage_statuses(recipe: Recipe, ledger: Ledger, store: Store | None, *, is_complete: bool) -> list[StageStatus]:
    """All stages in order; `is_complete`: the run has succeeded. A store of None could not be reached."""
    options = recipe.stage_list()
    accounts = ledger.accounts()
    newest = next(
        (index for index, each in enumerate(options) if accounts and each.name == accounts[-1].lease.stage), 0
    )
    spent: dict[str, int] = {}
    for entry in ledger.entries():
        spent[entry.stage] = spent.get(entry.stage, 0) + entry.spent_micro_usd
    found = []
    for index, each in enumerate(options):
        state, step, num_steps = StageState.WAITING, None, None
        if store is not None:
            with suppress(StoreError):
                manifest = read_manifest(store, each.name)
                if manifest is not None:
                    state = StageState.AT_CAP if manifest.outcome is Outcome.CAP else StageState.COMPLETE
                step, num_steps = progress_of(store_of_stage(store, stage_of(each)))
        if any(account.is_open and account.lease.stage == each.name for account in accounts):
            state = StageState.RUNNING
        elif is_complete or (state is StageState.WAITING and index < newest):
            state = StageState.COMPLETE
        found.append(
            StageStatus(
                name=each.name,
                kind=each.kind,
                state=state,
                spent_usd=usd(spent.get(each.name, 0)),
                reserved_usd=ledger.held_for_stage(each.name),
                step=step,
                num_steps=num_steps,
            )
        )
    return found


def current_stage(stages: Sequence[StageStatus]) -> str:
    """The one that is running, else the first that is to be run, else the last."""
    running = [stage.name for stage in stages if stage.state is StageState.RUNNING]
    waiting = [stage.name for stage in stages if stage.state is StageState.WAITING]
    return (running or waiting or [stages[-1].name])[0]


def progress_of(store: Store) -> tuple[int | None, int | None]:
    """Step, and how many there are; None while the stage has told nothing."""
    try:
        progress = json.loads(store.read(keys.PROGRESS))
        return progress.get("step"), progress.get("num_steps")
    except (StoreKeyMissing, ValueError, AttributeError):
        return None, None

"""Looking at runs: status, ledger, logs, summary. Reads only, so that it is safe beside a living supervisor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from cost.ledger.accounts import LeaseAccount
from cost.ledger.database import connect
from cost.ledger.leases import FIRST_STAGE
from cost.ledger.ledger import Balance, Ledger, LedgerEntry
from orchestrator.events import read_events
from orchestrator.runs.goodput import goodput
from orchestrator.runs.journal import store_uri
from orchestrator.runs.records import TERMINAL, Run, Runs, RunState, is_supervised
from orchestrator.runs.stage_status import StageStatus, current_stage, stage_statuses
from orchestrator.settings import Home
from tasks import run_store_keys as keys
from tasks.recipe.schema import Recipe
from tasks.stores.opening import open_store
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import RecordError, unwrap

FOLLOW_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where one run is."""

    run_id: str
    recipe_name: str
    state: RunState
    reason: str
    step: int | None
    num_steps: int
    tokens: int | None
    loss: float | None
    heldout_loss: float | None
    tokens_per_second: float | None
    spent_usd: Decimal
    held_usd: Decimal
    cap_usd: Decimal
    preemptions: int
    failures: int
    num_nodes: int
    eta_seconds: float | None
    """Real seconds to the last step at the measured pace."""
    offer: str | None
    checkpoint_step: int | None
    updated_at: datetime
    supervisor_alive: bool
    source_epochs: Mapping[str, float] = field(default_factory=dict)
    """How often each source of the data has been seen; empty while nobody has said."""
    start_seconds: Mapping[str, float] = field(default_factory=dict)
    """Parts of the newest start of its workers, real seconds."""
    stage: str = FIRST_STAGE
    """That it is in, or that it would continue with."""
    stages: Sequence[StageStatus] = ()


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended."""

    status: RunStatus
    result: Mapping[str, Any] | None
    """The trainer's own: first and final held-out loss, unigram entropy, weights' hash; None before completion."""
    wall_seconds: float
    billed_seconds: float
    """Node-seconds that the ledger charges, in billed time."""
    events: Sequence[Mapping[str, Any]]
    goodput: float | None = None
    """Seconds of the steps that were kept over billed seconds of a cluster, 0..1; None where nothing was billed."""


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The ledger of one run."""

    run_id: str
    balance: Balance
    entries: Sequence[LedgerEntry]
    leases: Sequence[LeaseAccount]


def status(run_id: str | None, *, home: Home) -> list[RunStatus]:
    """One run, or all of them, newest last."""
    with open_runs(home) as runs:
        chosen = runs.all() if run_id is None else [runs.get(run_id)]
        return [status_of(run, runs, home) for run in chosen]


def ledger(run_id: str | None, *, home: Home) -> LedgerView:
    """Every entry and the balance."""
    with open_runs(home) as runs:
        run = runs.pick(run_id)
        view = Ledger(runs.db, run.run_id, fencing_token=run.fencing_token)
        return LedgerView(run.run_id, view.balance(), view.entries(), view.accounts())


def logs(run_id: str | None, *, home: Home, follow: bool = False) -> Iterator[str]:
    """Lines of all nodes' logs, each with its node's name; with `follow`, until the run ends."""
    with open_runs(home) as runs:
        run = runs.pick(run_id)
    offsets: dict[str, int] = {}
    while True:
        with open_runs(home) as runs:
            finished = runs.get(run.run_id).state in TERMINAL
        store = stored(run, home)
        for key in store.list(keys.LOGS) if store is not None else []:
            content = store.read(key)[offsets.get(key, 0) :] if store is not None else b""
            whole = content if finished or not follow else content[: content.rfind(b"\n") + 1]
            offsets[key] = offsets.get(key, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                yield f"{Path(key).stem}: {line}"
        if not follow or finished:
            return
        time.sleep(FOLLOW_SECONDS)


def status_of(run: Run, runs: Runs, home: Home) -> RunStatus:
    """Ledger and the newest progress of the run store, put together."""
    view = Ledger(runs.db, run.run_id, fencing_token=run.fencing_token)
    balance, accounts = view.balance(), view.accounts()
    recipe = Recipe.model_validate_json(run.recipe_json)
    progress = read_json(run, home, keys.PROGRESS) or {}
    step, pace = progress.get("step"), progress.get("tokens_per_second")
    left = None if step is None else recipe.num_tokens() * (1 - step / recipe.num_steps())
    stages = stage_statuses(recipe, view, stored(run, home), is_complete=run.state is RunState.SUCCEEDED)
    updated_ms = max([run.updated_ms, *(int(account.accrued_until_ms) for account in accounts if account.is_open)])
    return RunStatus(
        run_id=run.run_id,
        recipe_name=run.recipe_name,
        state=run.state,
        reason=run.reason,
        step=step,
        num_steps=recipe.num_steps(),
        tokens=progress.get("tokens"),
        loss=progress.get("loss"),
        heldout_loss=progress.get("heldout_loss"),
        tokens_per_second=pace,
        spent_usd=balance.spent_usd,
        held_usd=balance.held_usd,
        cap_usd=balance.cap_usd,
        preemptions=run.preemptions,
        failures=run.failures,
        num_nodes=sum(account.num_nodes for account in accounts if account.is_open),
        eta_seconds=left / pace if left is not None and pace and not run.is_finished else None,
        offer=accounts[-1].lease.offer.offer_id if accounts else None,
        checkpoint_step=progress.get("checkpoint_step"),
        updated_at=datetime.fromtimestamp(min(updated_ms / 1000, time.time()), tz=UTC),
        supervisor_alive=is_supervised(lock_path(home, run.run_id)),
        source_epochs=progress.get("source_epochs", {}),
        start_seconds=progress.get("start_seconds", {}),
        stage=current_stage(stages),
        stages=stages,
    )


def summary_of(runs: Runs, run_id: str, home: Home, *, wall_seconds: float) -> RunSummary:
    run = runs.get(run_id)
    accounts = Ledger(runs.db, run_id, fencing_token=run.fencing_token).accounts()
    units = sum(account.accrued_units / max(1, account.price_micro_usd) for account in accounts)
    return RunSummary(
        status=status_of(run, runs, home),
        result=read_json(run, home, keys.RESULT),
        wall_seconds=wall_seconds,
        billed_seconds=units / 1000,
        events=read_events(home.run_dir(run_id) / "events.jsonl"),
        goodput=goodput_of(run, home, accounts),
    )


def goodput_of(run: Run, home: Home, accounts: Sequence[LeaseAccount]) -> float | None:
    store = stored(run, home)
    if store is None:
        return None
    recipe = Recipe.model_validate_json(run.recipe_json)
    return goodput(store, accounts, time_scale=run.options.time_scale(recipe))


def stored(run: Run, home: Home) -> Store | None:
    """The run's store as it is now; None before there is one, or while it cannot be reached."""
    try:
        return open_store(store_uri(run, home), create=False)
    except StoreError:
        return None


@contextmanager
def open_runs(home: Home) -> Iterator[Runs]:
    """The run records of this home, with their database open."""
    db = connect(home.database)
    try:
        yield Runs(db)
    finally:
        db.close()


def lock_path(home: Home, run_id: str) -> Path:
    return home.run_dir(run_id) / "supervisor.lock"


def read_json(run: Run, home: Home, key: str) -> dict[str, Any] | None:
    store = stored(run, home)
    try:
        return None if store is None else unwrap(store.read(key), key)
    except (StoreKeyMissing, StoreError, RecordError):
        return None

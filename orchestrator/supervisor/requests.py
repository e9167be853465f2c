"""What a person asks for, as functions: launch, resume, recover, stop, prepare.

The command line parses and renders; the loop is in `supervise`, and `orchestrator.runs.status` reads. Everything that a
second run of the same command needs to repair an interrupted one stands in the ledger or in the run store.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from cost.errors import SlmError, UserError
from cost.ledger.database import transaction
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from orchestrator.events import Emit, Event, EventLog
from orchestrator.runs import journal as journals
from orchestrator.runs.options import LaunchRequest, RunOptions
from orchestrator.runs.records import TERMINAL, Run, Runs, RunState, SupervisorLock, is_supervised
from orchestrator.runs.status import FOLLOW_SECONDS, RunStatus, RunSummary, lock_path, open_runs, status_of, summary_of
from orchestrator.settings import Home
from orchestrator.supervisor import assembly
from orchestrator.supervisor.beside import Beside
from orchestrator.supervisor.beside import prepare as prepare
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.lease_policy import TermsOf
from orchestrator.supervisor.losses import learned
from orchestrator.supervisor.notify import keep, notified
from orchestrator.supervisor.stages import StageJob, StageSequence
from orchestrator.supervisor.supervise import Supervisor
from tasks.own_module import own_module
from tasks.recipe.schema import Recipe
from tasks.stages.base import Stage
from tasks.stages.registry import stages_of, store_of_stage
from tasks.stores.opening import below, open_store

MAX_CANDIDATES = 8
STOP_WAIT_SECONDS = 120.0


# -- launching ---------------------------------------------------------------------------------


def launch(request: LaunchRequest, *, home: Home, on_event: Emit, switch: StopSwitch | None = None) -> RunSummary:
    """Run the recipe to its end on the first of the offers that can be had.

    An unfinished run of the same recipe whose supervisor is gone is continued instead of starting another; its cap
    stays unless a budget is given, and it notifies whom it notified, unless another target is given.

    Raises:
        UserError: The budget pays for no lease, or a living supervisor already runs this recipe.
    """
    home.create()
    recipe, options = request.recipe, request.options
    recipe.concrete_precision()  # a run is never created with one that is still open
    cap_usd = recipe.budget_usd if request.budget_usd is None else request.budget_usd
    if not options.is_local:
        options = replace(options, offers=require_cloud(request, cap_usd=cap_usd))
    with open_runs(home) as runs:
        known = unfinished(runs, recipe, home)
        if known is None:
            terms = assembly.lease_terms(recipe, options)
            later_usd = assembly.reserved_for_later_stages(recipe, options, terms)
            require_one_lease(assembly.planned_candidates(recipe, options, terms), cap_usd - later_usd, later_usd)
            open_store(request.store or str(home.root / "store"))  # one that refuses says so before there is a run
            options = replace(options, offers=options.offers[:MAX_CANDIDATES])
        run = known or create_run(runs, home, replace(request, options=options), cap_usd=cap_usd)
        set_notify_target(home, run.run_id, request.notify_target)
    return supervise(run.run_id, home=home, budget_usd=request.budget_usd, on_event=on_event, switch=switch)


def create_run(runs: Runs, home: Home, request: LaunchRequest, *, cap_usd: Decimal) -> Run:
    """A new run, with the places that another machine would look for it in."""
    with transaction(runs.db):
        run = runs.create(
            recipe_name=request.recipe.name,
            recipe_digest=request.recipe.digest(),
            recipe_json=request.recipe.model_dump_json(),
            options=request.options,
            cap_usd=cap_usd,
        )
        store = None if request.store is None else below(request.store, f"slm-{home.owner_id()}-{run.run_id}")
        market = str(home.run_dir(run.run_id) / "market")
        runs.set_options(run.run_id, replace(request.options, store=store, market=market))
    return runs.get(run.run_id)


def recover(store_uri: str, *, home: Home) -> RunStatus:
    """Rebuild the ledger of a run from its run store, on a machine that knows nothing of it, and take it over.

    Nothing is rented or ended: `resume` continues the run, `stop` ends it.

    Raises:
        UserError: There is no ledger in that store, or a living supervisor of this machine has the run.
    """
    home.create()
    store = open_store(store_uri, create=False)
    run_id = journals.run_id_in(store)
    with SupervisorLock(lock_path(home, run_id), run_id), open_runs(home) as runs:
        run = journals.recover(runs, store)
        return status_of(run, runs, home)


def resume(
    run_id: str | None,
    *,
    home: Home,
    budget_usd: Decimal | None,
    on_event: Emit,
    switch: StopSwitch | None = None,
    notify_target: str | None = None,
    single_supervisor: bool = False,
) -> RunSummary:
    """Continue a run that stopped, with a new cap if one is given.

    Raises:
        UserError: It is complete, or a supervisor is alive.
    """
    with open_runs(home) as runs:
        run = runs.pick(run_id)
    if run.state is RunState.SUCCEEDED:
        raise UserError(f"run {run.run_id} is complete; see: slm status {run.run_id}")
    set_notify_target(home, run.run_id, notify_target)
    if single_supervisor and not run.options.single_supervisor:
        with open_runs(home) as runs:
            runs.set_options(run.run_id, replace(run.options, single_supervisor=True))
    return supervise(run.run_id, home=home, budget_usd=budget_usd, on_event=on_event, switch=switch)


def set_notify_target(home: Home, run_id: str, notify_target: str | None) -> None:
    """Whom this supervisor and every later one notifies; None leaves it as it is."""
    if notify_target is not None:
        keep(home, run_id, notify_target)


def unfinished(runs: Runs, recipe: Recipe, home: Home) -> Run | None:
    """The newest run of exactly this recipe that was cut off, so that the same command repairs it."""
    same = [run for run in runs.all() if run.recipe_digest == recipe.digest() and not run.is_finished]
    for run in reversed(same):
        if is_supervised(lock_path(home, run.run_id)):
            raise UserError(
                f"{run.run_id} runs this recipe already; follow it with: slm status {run.run_id}, "
                f"end it with: slm stop {run.run_id}"
            )
    return same[-1] if same else None


def supervise(
    run_id: str, *, home: Home, budget_usd: Decimal | None, on_event: Emit, switch: StopSwitch | None
) -> RunSummary:
    """Take the run over and supervise it until it ends; one supervisor at a time."""
    switch = switch or StopSwitch()
    started = time.monotonic()
    with (
        SupervisorLock(lock_path(home, run_id), run_id),
        open_runs(home) as runs,
        signals(switch),
        notified(home, run_id, EventLog(home.run_dir(run_id) / "events.jsonl", on_event)) as emit,
    ):
        asked_to_stop = runs.get(run_id).stop_requested
        store = assembly.run_store(runs.get(run_id), runs, home)
        run, journal = journals.enter(runs, run_id, store, owner=home.owner_id())
        if asked_to_stop and not run.is_finished:
            switch.press()
        recipe, options = Recipe.model_validate_json(run.recipe_json), run.options
        if options.precision_reason is not None:
            emit(Event("precision", f"precision {options.precision_reason}", datetime.now(UTC)))
        ledger = Ledger(runs.db, run_id, fencing_token=run.fencing_token, journal=journal)
        if budget_usd is not None and budget_usd != run.cap_usd:
            ledger.set_cap(budget_usd)
        clock = assembly.billed_clock(run, recipe, ledger, store, emit)
        terms = assembly.lease_terms(recipe, options)
        backend = assembly.rental_backend(recipe, run, store=store, home=home, emit=emit)
        incidentals = assembly.incidental_costs(options, recipe, ledger)
        data = assembly.DataPlace(str(home.data_root))

        def supervisor(stage: Stage) -> Supervisor:
            candidates = assembly.planned_candidates(recipe, options, terms, stage=stage)

            def write_spec(lease: Lease) -> None:
                losses = learned(options.losses, ledger.accounts(), runs.get(run_id).preemptions)
                assembly.write_spec(lease, run, recipe, store, data.place, losses, stage=stage)

            return Supervisor(
                run_record=run,
                runs=runs,
                ledger=ledger,
                backend=backend,
                store=store,
                clock=clock,
                terms=terms,
                candidates=lambda _: assembly.candidates_now(options, store, ledger, candidates),
                command=own_module("tasks", "node"),
                owner=home.owner_id(),
                owners=options.owners,
                write_spec=write_spec,
                emit=emit,
                switch=switch,
                incidentals=incidentals,
                stage=stage.options.name,
                stage_store=store_of_stage(store, stage),
            )

        def prepared(printed: Mapping[str, Any]) -> None:
            if "data_dir" in printed:
                data_dir = Path(printed["data_dir"])
                data.place = str(data_dir) if options.is_local else assembly.store_data(store, data_dir, emit)

        def job(stage: Stage) -> StageJob:
            if not stage.needs(recipe).devices:
                return StageJob(stage, Beside(stage, recipe, home, store, emit, switch, prepared), rents=False)
            planned = assembly.planned_cost(stage, recipe, options, terms, incidentals)
            return StageJob(stage, supervisor(stage), planned_usd=planned)

        stages = stages_of(recipe)
        renting = [stage for stage in stages if stage.needs(recipe).devices]
        sequence = StageSequence(
            stages=recipe.stage_list(),
            jobs=[job(stage) for stage in (renting if switch.level else stages)],
            ledger=ledger,
            store=store,
            clock=clock,
            concluder=supervisor((renting or stages)[-1]),
            tell=lambda kind, message, **data: emit(Event(kind, message, datetime.now(UTC), data)),
        )
        if not ledger.open_accounts() and not switch.level:
            require_first_lease(sequence, recipe, options, terms)
        sequence.run()
        return summary_of(runs, run_id, home, wall_seconds=time.monotonic() - started)


def require_first_lease(sequence: StageSequence, recipe: Recipe, options: RunOptions, terms: TermsOf) -> None:
    """The same for a run that is continued. Where a later stage is left, what is reserved for it may still pay for it.

    Raises:
        UserError: As `require_one_lease`.
    """
    pending = [job for job in sequence.pending() if job.rents]
    if len(pending) != 1:
        return
    balance, stage = sequence.ledger.balance(), pending[0].stage
    candidates = assembly.planned_candidates(recipe, options, terms, stage=stage)
    free_usd = balance.free_usd + sequence.ledger.held_for_stage(stage.options.name)
    require_one_lease(candidates, free_usd, balance.spent_usd)


def require_one_lease(candidates: Sequence[Candidate], free_usd: Decimal, committed_usd: Decimal) -> None:
    """Refuse a budget that pays for no lease, before anything is rented.

    `committed_usd`: what of the cap is spent, or reserved for later stages.

    Raises:
        UserError: Nothing can be rented, or the free budget is smaller than the smallest lease.
    """
    if not candidates:
        raise UserError("the plan has no offer that can be rented; see why with: slm plan RECIPE --json")
    smallest = min(candidate.needed_usd for candidate in candidates)
    if free_usd < smallest:
        enough = (committed_usd + smallest).quantize(Decimal("0.01"), rounding=ROUND_CEILING)
        raise UserError(
            f"${max(free_usd, Decimal(0)):.2f} of the cap is free, and the smallest lease reserves ${smallest:.2f}; "
            f"give at least --budget {enough}."
        )


def require_cloud(request: LaunchRequest, *, cap_usd: Decimal) -> tuple[Offer, ...]:
    """The offers that may be rented; whatever is missing is reported before there is a run.

    Raises:
        UserError: Nothing may be rented, or nodes could not reach what they need.
    """
    from orchestrator.supervisor import cloud_leases as cloud

    recipe, options = request.recipe, request.options
    if recipe.training.initial_weights is not None:
        raise UserError(
            "training.initial_weights is a folder of this machine, which nodes of a cloud do not reach yet."
        )
    cloud.require_cloud_store(request.store)
    cloud.node_credentials()
    found, reasons = cloud.rentable(options.offers, recipe, free_usd=cap_usd, allow_unguarded=options.allow_unguarded)
    if options.offers and not found:
        raise UserError(f"no offer of the plan may be rented: {'; '.join(reasons)}")
    return tuple(found)


def stop(run_id: str | None, *, home: Home, on_event: Emit) -> RunStatus:
    """Ask a run for a checkpoint and its end, and wait for it; without a supervisor, do it here.

    Raises:
        SlmError: Its supervisor did not stop in time.
    """
    with open_runs(home) as runs:
        run = runs.pick(run_id)
        if not run.is_finished:
            runs.request_stop(run.run_id)
            if not is_supervised(lock_path(home, run.run_id)):
                supervise(run.run_id, home=home, budget_usd=None, on_event=on_event, switch=None)
            wait_until_finished(runs, run.run_id)
        return status_of(runs.get(run.run_id), runs, home)


def wait_until_finished(runs: Runs, run_id: str) -> None:
    deadline = time.monotonic() + STOP_WAIT_SECONDS
    while runs.get(run_id).state not in TERMINAL:
        if time.monotonic() > deadline:
            raise SlmError(
                f"run {run_id} did not stop within {STOP_WAIT_SECONDS:.0f} s; its nodes end by themselves when their "
                f"grant runs out. Look at: slm logs {run_id}"
            )
        time.sleep(FOLLOW_SECONDS)


# -- helpers -----------------------------------------------------------------------------------


@contextmanager
def signals(switch: StopSwitch) -> Iterator[None]:
    """Ctrl-C and SIGTERM press the switch instead of ending this process in the middle of a step."""
    wanted = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {name: signal.signal(name, lambda *_: switch.press()) for name in wanted}
    except ValueError:  # not in the main thread: whoever called us handles signals
        yield
        return
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

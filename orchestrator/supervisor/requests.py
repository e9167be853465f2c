"""What a person asks for, as functions: launch, resume, stop, prepare.

The command line parses and renders; the loop is in `supervise`, looking is in `report`. Everything that a second run of
the same command needs to repair a broken one stands in the ledger or in the run store.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

from cost.errors import SlmError, UserError
from cost.ledger.database import transaction
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from orchestrator.backends.base import Backend
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.clock import SystemClock
from orchestrator.events import Emit, Event, EventLog
from orchestrator.planning.replan import measured_ratio, replanned
from orchestrator.runs import journal as journals
from orchestrator.runs.options import LaunchRequest, RunOptions
from orchestrator.runs.records import TERMINAL, Run, Runs, RunState, SupervisorLock, is_supervised
from orchestrator.runs.status import FOLLOW_SECONDS, RunStatus, RunSummary, lock_path, open_runs, status_of, summary_of
from orchestrator.settings import Home
from orchestrator.supervisor.grants import heard_ms
from orchestrator.supervisor.incidentals import Extras, download_usd, rates_on
from orchestrator.supervisor.lease_policy import Terms, TermsOf, needed_usd, same_terms
from orchestrator.supervisor.lease_watch import StopSwitch
from orchestrator.supervisor.losses import learned
from orchestrator.supervisor.notify import keep, notified
from orchestrator.supervisor.supervise import Supervisor
from tasks.data.store_data import offer_data
from tasks.own_module import own_module
from tasks.recipe.schema import Recipe
from tasks.run_store_keys import SPEC
from tasks.spec import Losses, RunSpec
from tasks.stores.opening import SUPERVISORS, below, open_for_training, open_store
from trainer.run_store.base import Store

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
            require_one_lease(candidates_of(recipe, options, terms_of(recipe, options)), cap_usd, Decimal(0))
            open_store(request.store or str(home.root / "store"))  # one that refuses says so before there is a run
            options = replace(options, offers=options.offers[:MAX_CANDIDATES])
        run = known or created(runs, home, replace(request, options=options), cap_usd=cap_usd)
        remember_whom_to_tell(home, run.run_id, request.notify_target)
    return supervise(run.run_id, home=home, budget_usd=request.budget_usd, on_event=on_event, switch=switch)


def created(runs: Runs, home: Home, request: LaunchRequest, *, cap_usd: Decimal) -> Run:
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
    """Make the ledger of a run from its run store, on a machine that knows nothing of it, and take it over.

    Nothing is rented or ended: `resume` goes on with the run, `stop` ends it.

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
    """Go on with a run that stopped, with a new cap if one is given.

    Raises:
        UserError: It is complete, or a supervisor is alive.
    """
    with open_runs(home) as runs:
        run = runs.pick(run_id)
    if run.state is RunState.SUCCEEDED:
        raise UserError(f"run {run.run_id} is complete; see: slm status {run.run_id}")
    remember_whom_to_tell(home, run.run_id, notify_target)
    if single_supervisor and not run.options.single_supervisor:
        with open_runs(home) as runs:
            runs.set_options(run.run_id, replace(run.options, single_supervisor=True))
    return supervise(run.run_id, home=home, budget_usd=budget_usd, on_event=on_event, switch=switch)


def remember_whom_to_tell(home: Home, run_id: str, notify_target: str | None) -> None:
    """For this supervisor and every later one; None leaves it as it is."""
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
    """Take the run over and keep it going until it ends; one supervisor at a time."""
    switch = switch or StopSwitch()
    started = time.monotonic()
    with (
        SupervisorLock(lock_path(home, run_id), run_id),
        open_runs(home) as runs,
        signals(switch),
        notified(home, run_id, EventLog(home.run_dir(run_id) / "events.jsonl", on_event)) as emit,
    ):
        asked_to_stop = runs.get(run_id).stop_requested
        store = store_of(runs.get(run_id), runs, home)
        run, journal = journals.enter(runs, run_id, store, owner=home.owner_id())
        if asked_to_stop and not run.is_finished:
            switch.press()
        recipe = Recipe.model_validate_json(run.recipe_json)
        ledger = Ledger(runs.db, run_id, fencing_token=run.fencing_token, journal=journal)
        if budget_usd is not None and budget_usd != run.cap_usd:
            ledger.set_cap(budget_usd)
        clock = clock_of(run, recipe, ledger, store, emit)
        data_dir = home.data_root if switch.level else prepare(recipe, home=home, on_event=emit, switch=switch)
        terms = terms_of(recipe, run.options)
        backend = backend_of(recipe, run, store=store, home=home, emit=emit)
        place = str(data_dir) if run.options.is_local or switch.level else brought(store, data_dir, emit)
        supervisor = Supervisor(
            run_record=run,
            runs=runs,
            ledger=ledger,
            backend=backend,
            store=store,
            clock=clock,
            terms=terms,
            candidates=lambda _: candidates_now(run, store, ledger, candidates_of(recipe, run.options, terms)),
            command=own_module("tasks", "node"),
            owner=home.owner_id(),
            owners=run.options.owners,
            write_spec=lambda lease: write_spec(
                lease,
                run,
                recipe,
                store,
                place,
                learned(run.options.losses, ledger.accounts(), preemptions_of(runs, run)),
            ),
            emit=emit,
            switch=switch,
            extras=extras_of(run, recipe, ledger),
        )
        if not ledger.open_accounts() and not switch.level:
            balance = ledger.balance()
            require_one_lease(supervisor.candidates(balance.free_usd), balance.free_usd, balance.spent_usd)
        supervisor.run()
        return summary_of(runs, run_id, home, wall_seconds=time.monotonic() - started)


def store_of(run: Run, runs: Runs, home: Home) -> Store:
    """The run's store. One that vanished after the first lease held checkpoints: that is told, not made anew."""
    return open_for_training(
        journals.store_uri(run, home),
        create=not Ledger(runs.db, run.run_id, fencing_token=run.fencing_token).accounts(),
        single_supervisor=run.options.single_supervisor,
        patience=SUPERVISORS,
    )


def extras_of(run: Run, recipe: Recipe, ledger: Ledger) -> Extras:
    """Storage and transfers of this run; its checkpoints are at most as far apart as it was planned."""
    interval = run.options.checkpoint_interval_seconds or recipe.checkpoint_interval_seconds()
    scale = run.options.time_scale(recipe)
    num_params = recipe.num_params()
    return Extras(
        ledger,
        lambda offer: rates_on(offer, num_params=num_params, interval_seconds=interval * scale),
        lambda offer: download_usd(offer, num_params=num_params),
    )


def require_one_lease(candidates: Sequence[Candidate], free_usd: Decimal, spent_usd: Decimal) -> None:
    """Refuse a budget that pays for nothing before anything is rented.

    Raises:
        UserError: Nothing can be rented, or the free budget is smaller than the smallest lease.
    """
    if not candidates:
        raise UserError("the plan has no offer that can be rented; see why with: slm plan RECIPE --json")
    smallest = min(candidate.needed_usd for candidate in candidates)
    if free_usd < smallest:
        enough = (spent_usd + smallest).quantize(Decimal("0.01"), rounding=ROUND_CEILING)
        raise UserError(
            f"${free_usd:.2f} of the cap is free, and the smallest lease reserves ${smallest:.2f}; "
            f"give at least --budget {enough}."
        )


def require_cloud(request: LaunchRequest, *, cap_usd: Decimal) -> tuple[Offer, ...]:
    """The offers that may be rented; everything that can be known to be missing is told before there is a run.

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


def terms_of(recipe: Recipe, options: RunOptions) -> TermsOf:
    """How leases are paid, by offer."""
    if options.is_local:
        return same_terms(Terms(term_seconds=recipe.local.lease_seconds))
    from orchestrator.supervisor.cloud_leases import terms_on_clouds

    return terms_on_clouds(recipe)


def candidates_of(recipe: Recipe, options: RunOptions, terms: TermsOf) -> list[Candidate]:
    """Offers in plan order with all nodes, then with the fewest, each with what its smallest useful lease holds."""
    scale = options.time_scale(recipe)
    return [
        Candidate(
            offer,
            count,
            needed_usd(offer, terms(offer), num_nodes=count, scale=scale),
            options.expected_usd.get(offer.offer_id),
        )
        for count in dict.fromkeys((recipe.nodes.max, recipe.nodes.min))
        for offer in options.offers
    ]


def candidates_now(run: Run, store: Store, ledger: Ledger, candidates: list[Candidate]) -> list[Candidate]:
    """The plan's candidates in the order that the run's own speed suggests; the local cloud's GPUs are no GPUs."""
    if run.options.is_local:
        return candidates
    ratio = measured_ratio(store, ledger.accounts(), run.options.planned_speed)
    return candidates if ratio is None else replanned(candidates, [ratio])


def preemptions_of(runs: Runs, run: Run) -> int:
    """As the ledger counts them now."""
    return runs.get(run.run_id).preemptions


def write_spec(
    lease: Lease, run: Run, recipe: Recipe, store: Store, data_dir: str, losses: Losses | None = None
) -> None:
    """Tell the nodes of this lease what to do; `data_dir`: a folder, or where the data lie in the run store."""
    workers_per_node = max(1, 1 if run.options.is_local else lease.offer.gpus_per_node)
    spec = RunSpec(
        run_id=run.run_id,
        lease_id=lease.lease_id,
        attempt=lease.attempt,
        recipe=recipe,
        store_uri=store.uri,
        data_dir=data_dir,
        num_nodes=lease.num_nodes,
        workers_per_node=workers_per_node,
        min_workers=min(recipe.nodes.min, lease.num_nodes) * workers_per_node,
        max_workers=lease.num_nodes * workers_per_node,
        checkpoint_interval_seconds=run.options.checkpoint_interval_seconds or recipe.checkpoint_interval_seconds(),
        losses=losses,
    )
    store.write(SPEC, spec.to_bytes())


def backend_of(
    recipe: Recipe,
    run: Run,
    *,
    store: Store,
    home: Home,
    emit: Emit,
) -> Backend:
    """The backend that the run was launched on."""
    if not run.options.is_local:
        from orchestrator.backends.registry import known_leases
        from orchestrator.supervisor.cloud_leases import sky_backend

        return sky_backend(
            home.run_dir(run.run_id),
            store,
            run.options.offers,
            recipe,
            allow_unguarded=run.options.allow_unguarded,
            known_leases=lambda: known_leases(home),
            starts=home.starts,
            tell=lambda message: emit(Event("cloud", message, datetime.now(UTC))),
        )
    return LocalBackend(
        Path(run.options.market or home.run_dir(run.run_id) / "market"),
        run.run_id,
        store_uri=store.uri,
        market=recipe.local.market,
        time_scale=recipe.local.time_scale,
        seed=recipe.local.seed,
        offers=run.options.offers,
    )


def brought(store: Store, data_dir: Path, emit: Emit) -> str:
    """Where nodes find the prepared data in the run store."""
    emit(Event("prepare", "bringing the prepared data to the run store", datetime.now(UTC)))
    return offer_data(store, data_dir)


def clock_of(run: Run, recipe: Recipe, ledger: Ledger, store: Store, emit: Emit) -> SystemClock:
    """Billed time of the run, never before the newest entry of its ledger or the newest grant of its nodes."""
    scale = run.options.time_scale(recipe)
    clock = SystemClock(
        origin_ms=run.created_ms,
        scale=scale,
        floor_ms=max(ledger.newest_ms(), heard_ms(store, ledger.open_accounts())),
        last_moment_ms=ledger.last_moment_ms(),
    )
    if clock.went_back_ms > 1000:
        seconds = clock.went_back_ms / 1000
        message = (
            f"this machine's clock stands {seconds:.0f} s before the newest entry of the ledger; going on from there"
        )
        emit(Event("warning", message, datetime.now(UTC)))
    return clock


def prepare(recipe: Recipe, *, home: Home, on_event: Emit, switch: StopSwitch | None = None) -> Path:
    """The prepared data set of this recipe; a child process makes it if it is not there.

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
    """Ctrl-C and SIGTERM press the switch instead of ending us in the middle of a step."""
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

"""The parts that a supervisor is built from: run store, clock, backend, terms, candidates and the nodes' spec.

Each follows from the run's record and its recipe alone, so that the next supervisor is built from the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from orchestrator.backends.base import Backend
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.clock import SystemClock
from orchestrator.events import Emit, Event
from orchestrator.planning.replan import measured_ratio, replanned
from orchestrator.runs import journal as journals
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs
from orchestrator.settings import Home
from orchestrator.supervisor.grants import heard_ms
from orchestrator.supervisor.incidentals import Incidentals, download_usd, rates_on
from orchestrator.supervisor.lease_policy import Terms, TermsOf, needed_usd, same_terms
from orchestrator.supervisor.stages import planned_usd, share_of_training
from tasks.data.store_data import offer_data
from tasks.recipe.schema import Recipe
from tasks.run_store_keys import SPEC
from tasks.spec import Losses, RunSpec
from tasks.stages.base import Stage
from tasks.stages.manifest import inputs_of
from tasks.stages.registry import stages_of
from tasks.stores.opening import SUPERVISORS, open_for_training
from trainer.run_store.base import Store


def run_store(run: Run, runs: Runs, home: Home) -> Store:
    """The run's store. It is created before the first lease only: one that vanished later held checkpoints."""
    return open_for_training(
        journals.store_uri(run, home),
        create=not Ledger(runs.db, run.run_id, fencing_token=run.fencing_token).accounts(),
        single_supervisor=run.options.single_supervisor,
        patience=SUPERVISORS,
    )


def billed_clock(run: Run, recipe: Recipe, ledger: Ledger, store: Store, emit: Emit) -> SystemClock:
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
            f"this machine's clock is {seconds:.0f} s behind the newest entry of the ledger; continuing from that entry"
        )
        emit(Event("warning", message, datetime.now(UTC)))
    return clock


def rental_backend(recipe: Recipe, run: Run, *, store: Store, home: Home, emit: Emit) -> Backend:
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


def lease_terms(recipe: Recipe, options: RunOptions) -> TermsOf:
    """How leases are paid, by offer."""
    if options.is_local:
        return same_terms(Terms(term_seconds=recipe.local.lease_seconds))
    from orchestrator.supervisor.cloud_leases import terms_on_clouds

    return terms_on_clouds(recipe)


def planned_candidates(
    recipe: Recipe, options: RunOptions, terms: TermsOf, *, stage: Stage | None = None
) -> list[Candidate]:
    """Offers in plan order with all nodes, then with the fewest, each with what its smallest useful lease reserves.

    What a whole run was planned to cost is the cost of its training; a stage that computes anything else has a share.
    """
    scale = options.time_scale(recipe)
    share = Decimal(1) if stage is None else share_of_training(stage.needs(recipe), recipe)
    expected = {offer_id: usd * share for offer_id, usd in options.expected_usd.items()} if share else {}
    return [
        Candidate(
            offer,
            count,
            needed_usd(offer, terms(offer), num_nodes=count, scale=scale),
            expected.get(offer.offer_id),
        )
        for count in dict.fromkeys((recipe.nodes.max, recipe.nodes.min))
        for offer in options.offers
    ]


def planned_cost(
    stage: Stage, recipe: Recipe, options: RunOptions, terms: TermsOf, incidentals: Incidentals | None = None
) -> Decimal:
    """What is reserved for a stage while earlier ones run."""
    candidates = planned_candidates(recipe, options, terms)
    scale = options.time_scale(recipe)
    return planned_usd(stage, recipe, candidates, terms=terms, scale=scale, incidentals=incidentals)


def reserved_for_later_stages(recipe: Recipe, options: RunOptions, terms: TermsOf) -> Decimal:
    """What is reserved while the first stage that rents anything runs."""
    renting = [stage for stage in stages_of(recipe) if stage.needs(recipe).devices]
    return sum((planned_cost(stage, recipe, options, terms) for stage in renting[1:]), Decimal(0))


def candidates_now(options: RunOptions, store: Store, ledger: Ledger, candidates: list[Candidate]) -> list[Candidate]:
    """The plan's candidates in the order that the run's own speed suggests; the local market has no GPUs."""
    if options.is_local:
        return candidates
    ratio = measured_ratio(store, ledger.accounts(), options.planned_speed)
    return candidates if ratio is None else replanned(candidates, [ratio])


def incidental_costs(options: RunOptions, recipe: Recipe, ledger: Ledger) -> Incidentals:
    """Storage and transfers of this run; its checkpoints are at most as far apart as planned."""
    interval = options.checkpoint_interval_seconds or recipe.checkpoint_interval_seconds()
    scale = options.time_scale(recipe)
    num_params = recipe.num_params()
    return Incidentals(
        ledger,
        lambda offer: rates_on(offer, num_params=num_params, interval_seconds=interval * scale),
        lambda offer: download_usd(offer, num_params=num_params),
    )


def write_spec(
    lease: Lease,
    run: Run,
    recipe: Recipe,
    store: Store,
    data_dir: str,
    losses: Losses | None = None,
    *,
    stage: Stage,
) -> None:
    """Tell the nodes of this lease what to do; `data_dir`: a folder, or where the data lie in the run store."""
    workers_per_node = 1 if run.options.is_local else max(1, lease.offer.gpus_per_node)
    spec = RunSpec(
        run_id=run.run_id,
        lease_id=lease.lease_id,
        attempt=lease.attempt,
        recipe=recipe.without_stages(),
        stage=stage.options,
        inputs=inputs_of(store, recipe.stage_list(), stage.options.name),
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


@dataclass(slots=True)
class DataPlace:
    """Where the nodes of this supervisor find the prepared data: a folder, or where they lie in the run store."""

    place: str


def store_data(store: Store, data_dir: Path, emit: Emit) -> str:
    """Copy the prepared data to the run store; where nodes find them there."""
    emit(Event("prepare", "copying the prepared data to the run store", datetime.now(UTC)))
    return offer_data(store, data_dir)

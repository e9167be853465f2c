"""A third stage on the local cloud, with real processes: it breaks, is preempted, resumes and is charged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.database import connect
from cost.ledger.leases import Lease, usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.clock import SystemClock
from orchestrator.events import Event
from orchestrator.runs.journal import enter
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs, RunState
from orchestrator.supervisor.assembly import write_spec
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.lease_policy import Terms, same_terms
from orchestrator.supervisor.stages import StageJob, StageSequence
from orchestrator.supervisor.supervise import Supervisor
from tasks import run_store_keys as keys
from tasks.guard.processes import kill_family
from tasks.recipe import stages as recipe_stages
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tasks.stages import registry
from tasks.stages.base import Stage
from tasks.stages.manifest import Manifest, Outcome, inputs_of, read_manifest, write_manifest
from tasks.stages.registry import stages_of, store_of_stage
from tests.support import counting_stage
from tests.support.builders import make_offer
from trainer.run_store.base import DirectoryStore

ROOT = Path(__file__).resolve().parents[3]
PARTS = 6
CHECKPOINT = b"twelve bytes"
OPTIONS = RunOptions("local")


@pytest.fixture(autouse=True)
def _counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    monkeypatch.setattr(recipe_stages, "KINDS", dict(recipe_stages.KINDS))
    counting_stage.make_known()
    yield


def trained(store: DirectoryStore, recipe: Recipe) -> None:
    """What the stages before have left behind: manifests, and one checkpoint."""
    for options in recipe.stage_list()[:2]:
        inputs = inputs_of(store, recipe.stage_list(), options.name)
        write_manifest(store, Manifest(options.name, options.kind, Outcome.FINISHED, inputs))
    folder = keys.checkpoint_folder(1, 10)
    store.write(f"{folder}{keys.checkpoint_part(0)}", CHECKPOINT)
    store.write(f"{folder}{keys.MANIFEST}", b"{}")


def test_a_stage_on_real_nodes_breaks_is_preempted_resumes_and_is_charged(tmp_path: Path) -> None:
    recipe = load_recipe("demo", [f"stages=[prepare, pretrain, {{kind: count, parts: {PARTS}, breaks_at: 2}}]"])
    store = DirectoryStore(tmp_path / "store")
    trained(store, recipe)
    runs = Runs(connect(tmp_path / "slm.db"))
    created = runs.create(recipe_name="tiny", recipe_digest="d", recipe_json="{}", options=OPTIONS, cap_usd=Decimal(20))
    run, journal = enter(runs, created.run_id, store, owner="abc123")
    ledger = Ledger(runs.db, run.run_id, fencing_token=run.fencing_token, journal=journal)
    offer = make_offer(usd_per_hour="0.60", gpus_per_node=1)
    backend = LocalBackend(
        tmp_path / "market",
        run.run_id,
        store_uri=store.uri,
        market="calm",
        time_scale=1.0,
        seed=0,
        offers=[offer],
        env={"PYTHONPATH": str(ROOT)},  # nodes run a module of the tests
    )
    events: list[Event] = []
    preempted: list[str] = []

    def heard(event: Event) -> None:
        """Takes the node of the stage away once, when it has counted four parts."""
        events.append(event)
        if event.kind == "progress" and event.data["progress"]["step"] >= 4 and not preempted:
            (node,) = backend.list_alive()
            preempted.append(node.lease_id)
            while kill_family(node.instance_id):
                pass

    def tell_nodes(lease: Lease) -> None:
        write_spec(lease, run, recipe, store, "", stage=stages_of(recipe)[-1])

    clock = SystemClock(origin_ms=run.created_ms, scale=1.0, floor_ms=0, last_moment_ms=0)

    def job(stage: Stage) -> StageJob:
        supervisor = Supervisor(
            run_record=run,
            runs=runs,
            ledger=ledger,
            backend=backend,
            store=store,
            clock=clock,
            terms=same_terms(Terms(term_seconds=120.0, boot_allowance_seconds=60.0, poll_seconds=0.1)),
            candidates=lambda _: [Candidate(offer, 1, Decimal("0.10"))],
            command=[sys.executable, *counting_stage.NODE],
            owner="abc123",
            write_spec=tell_nodes,
            emit=heard,
            switch=StopSwitch(),
            stage=stage.options.name,
            stage_store=store_of_stage(store, stage),
        )
        return StageJob(stage, supervisor, planned_usd=Decimal(1))

    jobs = [job(stage) for stage in stages_of(recipe)[1:]]
    sequence = StageSequence(
        recipe.stage_list(),
        jobs,
        ledger,
        store,
        clock,
        jobs[-1].runner,  # type: ignore[arg-type]
        lambda kind, message, **data: None,
    )
    state = sequence.run()
    told = [f"{event.kind}: {event.message}" for event in events]
    logs = [store.read(key).decode(errors="replace") for key in store.list(keys.LOGS)]
    assert state is RunState.SUCCEEDED, "\n".join([*told, *logs])
    record = runs.get(run.run_id)
    assert (record.failures, record.preemptions) == (1, 1), told
    leases = ledger.accounts()
    assert [account.lease.stage for account in leases] == ["count"] * 3
    assert [account.outcome for account in leases] == ["broken", "preempted", "finished"]
    assert all(account.spent_micro_usd > 0 for account in leases)
    counted = store_of_stage(store, jobs[-1].stage).list(counting_stage.COUNTED)
    assert len(counted) == PARTS
    manifest = read_manifest(store, "count")
    assert manifest is not None and manifest.facts == {"num_bytes": len(CHECKPOINT) + len(b"{}")}
    spent = sum(entry.spent_micro_usd for entry in ledger.entries() if entry.stage == "count")
    assert usd(spent) == ledger.balance().spent_usd
    assert ledger.balance().held_usd == 0 and backend.list_alive() == []

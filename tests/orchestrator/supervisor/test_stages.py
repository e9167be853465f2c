"""Stages one after the other under one cap, against a fake cloud: order, money, recovery."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.leases import Lease, usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate, Stop, StopReason
from orchestrator.backends.fake import FakeBackend
from orchestrator.events import Event
from orchestrator.runs.journal import StoreJournal, enter
from orchestrator.runs.records import RunState
from orchestrator.supervisor.lease_policy import Terms, needed_usd, same_terms
from orchestrator.supervisor.stages import StageJob, StageSequence, planned_usd
from tasks import run_store_keys as keys
from tasks.recipe import stages as recipe_stages
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tasks.stages import registry
from tasks.stages.base import Stage
from tasks.stages.manifest import Manifest, Outcome, inputs_of, read_manifest, write_manifest
from tasks.stages.registry import stages_of, store_of_stage
from tests.support import counting_stage
from tests.support.supervised_run import SCALE, Killed, World

PLANNED = Decimal("2.00")


@pytest.fixture(autouse=True)
def _counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    monkeypatch.setattr(recipe_stages, "KINDS", dict(recipe_stages.KINDS))
    counting_stage.make_known()
    yield


def recipe_with_count() -> Recipe:
    return load_recipe("demo", ["stages=[prepare, pretrain, {kind: count, parts: 40}]"])


@dataclass(slots=True)
class Prepared:
    """Prepares nothing, and says how often it was asked."""

    world: StagedWorld

    def until_stop(self) -> Stop:
        self.world.prepared += 1
        return Stop(StopReason.FINISHED, "prepared")


@dataclass
class StagedWorld(World):
    """A run of three stages: nothing to prepare, the trainer of `World`, and a count of 40 parts of a second each."""

    counted: int = 0
    counted_by: list[str] = field(default_factory=list)
    prepared: int = 0
    num_parts: int = 40
    broken_parts: set[int] = field(default_factory=set)
    planned: Decimal = PLANNED
    saves: bool = True

    def sequence(self) -> StageSequence:
        """As a supervisor makes it that takes the run over."""
        run, journal = enter(self.runs, self.run.run_id, self.store, owner="abc123")
        assert isinstance(journal, StoreJournal)
        self.ledger = Ledger(self.db, run.run_id, fencing_token=run.fencing_token, journal=journal)
        recipe = recipe_with_count()
        jobs = [self.job(stage, recipe) for stage in stages_of(recipe)]
        concluder = jobs[-1].runner
        return StageSequence(
            recipe.stage_list(),
            jobs,
            self.ledger,
            self.store,
            self.clock,
            concluder,
            self.tell,  # type: ignore[arg-type]
        )

    def job(self, stage: Stage, recipe: Recipe) -> StageJob:
        if not stage.needs(recipe).devices:
            return StageJob(stage, Prepared(self), rents=False)
        supervisor = self.supervisor()
        supervisor.ledger = self.ledger
        supervisor.stage = stage.options.name
        supervisor.stage_store = store_of_stage(self.store, stage)
        return StageJob(stage, supervisor, planned_usd=self.planned)

    def supervisor(self, offers: int = 2, nodes: int = 1, terms: Terms | None = None):  # type: ignore[no-untyped-def]
        """Of the run as it was entered, and not taken over once more."""
        ledger, taken = getattr(self, "ledger", None), self.runs.take_over
        if ledger is None:
            return super().supervisor(offers, nodes, terms)
        self.runs.take_over = self.runs.get  # type: ignore[method-assign]
        try:
            made = super().supervisor(offers, nodes, terms)
        finally:
            self.runs.take_over = taken  # type: ignore[method-assign]
        self.ledger = ledger
        return made

    def tell(self, kind: str, message: str, **data: object) -> None:
        self.events.append(Event(kind, message, None, dict(data)))  # type: ignore[arg-type]

    def trainer_starts(self, backend: FakeBackend, lease: Lease) -> None:
        if lease.stage == "count":
            self.clock.after(15.0, lambda: self.count(lease))
        else:
            super().trainer_starts(backend, lease)

    def train(self, lease: Lease, incarnation: int) -> None:
        if self.saves:
            self.store.write(f"{keys.checkpoint_folder(1, self.step)}{keys.MANIFEST}", b"{}")
        super().train(lease, incarnation)

    def count(self, lease: Lease) -> None:
        if not any(node.lease_id == lease.lease_id for node in self.backend.list_alive()):
            return
        if keys.control(lease.lease_id) in self.store.list("control/"):
            self.backend.end_command(lease.lease_id, keys.EXIT_STOPPED)
            return
        if self.counted in self.broken_parts:
            self.broken_parts.discard(self.counted)
            self.backend.end_command(lease.lease_id, keys.EXIT_BROKEN)
            return
        self.counted += 1
        self.counted_by.append(lease.lease_id)
        progress = {"step": self.counted, "num_steps": self.num_parts, "incarnation": lease.attempt}
        self.store.write(f"{keys.stage_folder('count')}/{keys.PROGRESS}", json.dumps(progress).encode())
        request = {"number": self.counted, "boottime": 0.0, "state": "running", "noticed": False}
        self.store.write(keys.guard_request(lease.lease_id, 0), json.dumps(request).encode())
        if self.counted >= self.num_parts:
            self.backend.end_command(lease.lease_id, keys.EXIT_FINISHED)
        else:
            self.clock.after(1.0, lambda: self.count(lease))

    def spent_on(self, stage: str) -> Decimal:
        return usd(sum(entry.spent_micro_usd for entry in self.ledger.entries() if entry.stage == stage))

    def leases_of(self, stage: str) -> list[str]:
        return [account.lease.lease_id for account in self.ledger.accounts() if account.lease.stage == stage]

    def check(self) -> None:
        """The ledger is never under the cloud's own bill, never over the cap, and nothing lives or is held."""
        balance = self.ledger.balance()
        assert self.backend.true_bill_usd() <= balance.spent_usd <= self.cap
        assert balance.held_usd == 0
        assert self.backend.list_alive() == []


def killed_at(world: StagedWorld, seconds: float) -> None:
    """Supervise until then."""

    def kill() -> None:
        raise Killed

    world.clock.after(seconds, kill)
    with pytest.raises(Killed):
        world.sequence().run()


@pytest.fixture
def world(tmp_path: Path) -> StagedWorld:
    return StagedWorld(tmp_path, cap=Decimal(20))


def test_stages_run_in_order_each_on_a_lease_of_its_own_and_each_is_charged(world: StagedWorld) -> None:
    assert world.sequence().run() is RunState.SUCCEEDED
    assert [account.lease.stage for account in world.ledger.accounts()] == ["pretrain", "count"]
    # One node at a cent per second: 15 s to start and 60 or 40 steps of 1 s, and a turn of the loop or two.
    assert Decimal("0.74") <= world.spent_on("pretrain") <= Decimal("0.80")
    assert Decimal("0.54") <= world.spent_on("count") <= Decimal("0.60")
    assert world.spent_on("pretrain") + world.spent_on("count") == world.ledger.balance().spent_usd
    world.check()


def test_while_a_stage_runs_the_planned_cost_of_the_next_is_held(world: StagedWorld) -> None:
    held: list[Decimal] = []
    world.clock.after(20.0, lambda: held.append(world.ledger.held_for_stage("count")))
    world.clock.after(100.0, lambda: held.append(world.ledger.held_for_stage("count")))
    world.sequence().run()
    assert held == [PLANNED, 0]


def test_the_cap_reached_in_pre_training_leaves_the_next_stage_paid(tmp_path: Path) -> None:
    world = StagedWorld(tmp_path, cap=Decimal("4.00"), num_steps=10_000)
    assert world.sequence().run() is RunState.OUT_OF_BUDGET
    assert world.counted == world.num_parts
    assert world.spent_on("pretrain") <= world.cap - PLANNED
    assert world.spent_on("count") <= PLANNED
    assert world.runs.get(world.run.run_id).reason.startswith("pretrain used up its share of the cap: ")
    pretrain, count = (read_manifest(world.store, name) for name in ("pretrain", "count"))
    assert pretrain is not None and pretrain.outcome is Outcome.CAP
    assert count is not None and count.outcome is Outcome.FINISHED
    world.check()


def test_without_a_checkpoint_at_the_cap_the_next_stage_is_left_out_and_that_is_told(tmp_path: Path) -> None:
    world = StagedWorld(tmp_path, cap=Decimal("4.00"), num_steps=10_000, saves=False)
    assert world.sequence().run() is RunState.OUT_OF_BUDGET
    assert world.leases_of("count") == []
    assert any(message.startswith("count cannot begin") for message in world.told("warning"))
    world.check()


def test_a_higher_cap_goes_on_with_training_and_counts_anew(tmp_path: Path) -> None:
    world = StagedWorld(tmp_path, cap=Decimal("4.00"), num_steps=400)
    world.sequence().run()
    reached, world.counted = world.step, 0
    world.cap = Decimal(40)
    sequence = world.sequence()
    world.ledger.set_cap(world.cap)
    assert sequence.run() is RunState.SUCCEEDED
    assert 0 < reached < world.step == 400
    assert world.counted == world.num_parts
    world.check()


def test_a_stage_that_is_complete_is_not_run_again_by_the_next_supervisor(world: StagedWorld) -> None:
    killed_at(world, 100.0)
    assert 0 < world.counted < world.num_parts
    trained = world.step
    assert world.sequence().run() is RunState.SUCCEEDED
    assert world.step == trained and len(world.leases_of("pretrain")) == 1
    assert len(world.counted_by) == world.num_parts
    world.check()


def test_a_preempted_stage_is_continued_on_another_node_and_both_are_charged(world: StagedWorld) -> None:
    world.clock.after(100.0, lambda: world.backend.take(world.backend.starts[-1].lease_id))
    assert world.sequence().run() is RunState.SUCCEEDED
    first, second = world.leases_of("count")
    assert set(world.counted_by) == {first, second} and len(world.counted_by) == world.num_parts
    assert world.runs.get(world.run.run_id).preemptions == 1
    assert all(world.ledger.account(lease_id).spent_micro_usd > 0 for lease_id in (first, second))
    world.check()


def test_a_stage_whose_node_breaks_is_tried_again(world: StagedWorld) -> None:
    world.broken_parts = {3}
    assert world.sequence().run() is RunState.SUCCEEDED
    assert len(world.leases_of("count")) == 2
    assert world.runs.get(world.run.run_id).failures == 1
    world.check()


def test_a_bug_in_one_stage_ends_the_run_and_frees_what_was_reserved(tmp_path: Path) -> None:
    world = StagedWorld(tmp_path, cap=Decimal(20), bug_at=7)
    assert world.sequence().run() is RunState.FAILED
    assert world.leases_of("count") == []
    world.check()


def test_a_stop_in_one_stage_is_resumed_there(world: StagedWorld) -> None:
    world.clock.after(100.0, lambda: world.switch.press())
    assert world.sequence().run() is RunState.STOPPED
    counted = world.counted
    assert 0 < counted < world.num_parts
    world.switch.level = 0
    assert world.sequence().run() is RunState.SUCCEEDED
    assert len(world.leases_of("pretrain")) == 1
    assert len(world.counted_by) == world.num_parts
    world.check()


def test_what_each_supervisor_repeats_is_done_before_a_stage_that_follows(world: StagedWorld) -> None:
    world.clock.after(100.0, lambda: world.switch.press())
    world.sequence().run()
    world.switch.level = 0
    world.sequence().run()
    assert world.prepared == 2


def test_the_lease_of_a_complete_stage_is_settled_where_nothing_is_left_to_do(world: StagedWorld) -> None:
    killed_at(world, 100.0)
    stages = recipe_with_count().stage_list()
    inputs = inputs_of(world.store, stages, "count")
    write_manifest(world.store, Manifest("count", "count", Outcome.FINISHED, inputs))  # as its node did meanwhile
    assert len(world.ledger.open_accounts()) == 1
    assert world.sequence().run() is RunState.SUCCEEDED
    assert len(world.leases_of("count")) == 1
    world.check()


def test_a_cap_below_the_plan_of_later_stages_is_shared_as_far_as_it_goes(tmp_path: Path) -> None:
    world = StagedWorld(tmp_path, cap=Decimal("1.50"))
    world.store.write(f"{keys.checkpoint_folder(1, 1)}{keys.MANIFEST}", b"{}")
    assert world.sequence().run() is RunState.OUT_OF_BUDGET
    assert any("only $1.50 of the cap is left for it" in message for message in world.told("warning"))
    assert world.leases_of("pretrain") == []
    assert world.counted == world.num_parts
    world.check()


def test_a_stage_is_planned_at_its_smallest_lease_and_the_time_that_it_needs(world: StagedWorld) -> None:
    recipe = recipe_with_count()
    count = stages_of(recipe)[-1]
    terms = Terms()
    offer = world.supervisor().candidates(Decimal(0))[0].offer
    needed = needed_usd(offer, terms, num_nodes=1, scale=SCALE)
    candidates = [Candidate(offer, 1, needed, Decimal(30))]
    planned = planned_usd(count, recipe, candidates, terms=same_terms(terms), scale=SCALE)
    # $0.54, and 40 parts of half a second at a cent per second; a tenth more of both.
    assert needed == Decimal("0.54")
    assert planned == pytest.approx(Decimal("0.814"))
    fixed = recipe.stage_list()[-1].model_copy(update={"reserve_usd": Decimal(7)})
    said = planned_usd(counting_stage.Count(fixed), recipe, candidates, terms=same_terms(terms), scale=SCALE)
    assert said == 7

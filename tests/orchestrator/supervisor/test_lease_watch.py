"""One lease from its start to its end: what ends it, what is asked of the training loop, and when it is left."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.leases import Lease
from cost.market.providers import PriceBound, Ttl
from orchestrator.backends.fake import FakeBackend
from orchestrator.runs.records import RunState
from orchestrator.supervisor.lease_policy import Terms
from tests.support.supervised_run import PRICE, World, check_ledger, offer_in
from trainer.run_store.base import DirectoryStore, StoreError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_losing_the_first_node_ends_the_whole_lease(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id, 0))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 2
    check_ledger(world)


def test_a_first_node_that_ends_as_announced_is_a_preemption(world: World) -> None:
    def leave() -> None:
        lease_id = world.backend.starts[0].lease_id
        world.noticed = True
        world.clock.after(5.0, lambda: world.backend.end_command(lease_id, 40))

    world.clock.after(30.0, leave)
    assert world.supervisor().run() is RunState.SUCCEEDED
    run = world.runs.get(world.run.run_id)
    assert (run.preemptions, run.failures) == (1, 0)
    assert world.told("notice")[0] == "the cloud will take node 0 of slm-abc123-tiny-1-1"
    check_ledger(world)


def test_a_damaged_checkpoint_that_the_workers_skipped_is_reported(world: World) -> None:
    record = {"incarnation": 1, "skipped": ["step 40 of incarnation 0: part a.distcp has another checksum"]}
    world.store.write("incarnations/1.json", json.dumps(record).encode())
    world.supervisor().run()
    told = [message for message in world.told("warning") if "passed over" in message]
    assert told == [
        "a damaged checkpoint was passed over for the one before: "
        "step 40 of incarnation 0: part a.distcp has another checksum"
    ]


def test_at_the_cap_it_asks_for_a_checkpoint_and_stops_under_it(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"), num_steps=10_000)
    assert world.supervisor().run() is RunState.OUT_OF_BUDGET
    check_ledger(world)
    assert world.ledger.balance().spent_usd > Decimal("0.80")
    assert any("drain threshold" in message for message in world.told("warning"))


def test_a_trainer_that_ignores_the_drain_is_ended_within_the_cap(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"), num_steps=10_000, deaf=True)
    assert world.supervisor().run() is RunState.OUT_OF_BUDGET
    check_ledger(world)


def test_a_bug_stops_the_run_and_names_the_failure(tmp_path: Path) -> None:
    world = World(tmp_path, bug_at=7)
    assert world.supervisor().run() is RunState.FAILED
    assert "step 7: ValueError: shapes" in world.runs.get(world.run.run_id).reason
    assert len(world.backend.starts) == 1
    check_ledger(world)


def test_a_broken_cluster_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    world = World(tmp_path, breaks_at_start=True)
    world.clock.after(1.0, lambda: world.store.write("logs/slm-abc123-tiny-1-1-0.log", b"ok\nno port is free\n\n"))
    world.supervisor().run()
    assert any("exit code 30 after: no port is free" in message for message in world.told("relaunch"))


def test_a_stop_checkpoints_and_ends(world: World) -> None:
    world.clock.after(30.0, lambda: world.runs.request_stop(world.run.run_id))
    assert world.supervisor().run() is RunState.STOPPED
    check_ledger(world)


def test_ctrl_c_twice_ends_at_once(world: World) -> None:
    world.deaf = True
    world.clock.after(30.0, world.switch.press)
    world.clock.after(31.0, world.switch.press)
    assert world.supervisor().run() is RunState.STOPPED
    assert world.clock.real_seconds() < 40
    check_ledger(world)


def test_a_provider_that_does_not_answer_for_a_while_is_waited_for(world: World) -> None:
    world.clock.after(30.0, lambda: setattr(world.backend, "fail_next", 5))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert any("cannot see" in message for message in world.told("warning"))
    check_ledger(world)


def test_orphans_are_looked_for_during_a_run(world: World) -> None:
    stray = Lease("slm-abc123-other-1", "other", 1, offer_in("zone-9"), 1, PRICE, 600.0, 5.0, 1)
    world.clock.after(22.0, lambda: (setattr(world.backend, "on_start", None), world.backend.start(stray, ["x"]))[0])
    assert world.supervisor(terms=Terms(reconcile_seconds=10.0)).run() is RunState.SUCCEEDED
    assert any("slm-abc123-other-1" in message for message in world.told("warning"))


def test_a_price_above_the_bound_ends_the_node_before_its_first_grant(world: World) -> None:
    def prices(backend: FakeBackend, lease: Lease) -> None:
        backend.usd_per_hour = PRICE * 3 if lease.attempt == 1 else None
        if lease.attempt > 1:
            world.trainer_starts(backend, lease)

    world.backend.on_start = prices
    assert world.supervisor().run() is RunState.SUCCEEDED
    first, second = world.ledger.accounts()[:2]
    assert (first.outcome, second.lease.offer.region) == ("too_dear", "zone-1")
    assert not world.store.list(f"grants/{first.lease.lease_id}/")
    assert any(
        "a node costs $1.80/h now, above its worst-case price of $0.60/h" in message
        for message in world.told("relaunch")
    )


def test_prices_above_their_bound_everywhere_end_the_run(world: World) -> None:
    world.backend.usd_per_hour = PRICE * 3
    assert world.supervisor().run() is RunState.FAILED
    assert "every offer costs more than its worst-case price" in world.runs.get(world.run.run_id).reason
    assert len(world.backend.starts) == 2 and world.backend.list_alive() == []


def test_a_price_that_rose_moves_the_run_where_the_rest_costs_less(world: World) -> None:
    supervisor = world.supervisor(terms=Terms(price_bound=PriceBound.ON_DEMAND))
    here, there = supervisor.candidates(Decimal(0))
    both = [replace(here, expected_usd=Decimal("10.00")), replace(there, expected_usd=Decimal("10.50"))]
    supervisor.candidates = lambda _: both
    world.clock.after(20.0, lambda: setattr(world.backend, "usd_per_hour", Decimal("1.10")))
    world.backend.on_start = lambda backend, lease: (
        setattr(backend, "usd_per_hour", None) if lease.attempt > 1 else None,
        world.trainer_starts(backend, lease),
    )[0]
    assert supervisor.run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]
    assert [account.outcome for account in world.ledger.accounts()] == ["dearer", "finished"]


def test_a_limit_that_cannot_be_moved_is_rolled_over_and_is_no_preemption(world: World) -> None:
    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=40.0)
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    outcomes = [account.outcome for account in world.ledger.accounts()]
    assert outcomes[-1] == "finished" and set(outcomes[:-1]) == {"ttl"} and len(outcomes) > 1
    assert {lease.offer.region for lease in world.backend.starts} == {"zone-0"}
    assert world.runs.get(world.run.run_id).preemptions == 0
    assert world.ledger.balance().spent_usd >= world.backend.true_bill_usd()


class AwayStore(DirectoryStore):
    """Cannot be written to while `away`."""

    away = False

    def write(self, key: str, data: bytes) -> None:
        if self.away:
            raise StoreError("the store does not answer; run the command again.")
        super().write(key, data)


def test_a_store_that_is_away_for_less_than_a_grant_ends_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    store = AwayStore(tmp_path / "store")
    supervisor = world.supervisor()
    supervisor.store = store
    world.clock.after(15.0, lambda: setattr(store, "away", True))
    world.clock.after(25.0, lambda: setattr(store, "away", False))
    assert supervisor.run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 1
    assert any("nothing is granted while the run store is away" in event.message for event in world.events)

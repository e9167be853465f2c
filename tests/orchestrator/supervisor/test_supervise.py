"""The loop against a fake cloud and a clock that moves only when somebody sleeps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import SlmError
from cost.ledger.database import DatabaseError
from cost.ledger.leases import Lease
from cost.ledger.ledger import EntryKind, Fenced
from orchestrator.runs.records import RunState
from tests.support.supervised_run import PRICE, Killed, World, check_ledger, offer_in
from trainer.run_store.base import StoreError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_calm_run_finishes_and_pays_for_what_it_used(world: World) -> None:
    assert world.supervisor().run() is RunState.SUCCEEDED
    check_ledger(world)
    # 15 s to start and 60 steps of 1 s on two nodes at a cent per node-second, and a turn of the loop or two.
    assert Decimal("1.48") <= world.ledger.balance().spent_usd <= Decimal("1.56")
    assert world.runs.get(world.run.run_id).state is RunState.SUCCEEDED


def test_the_reservation_is_in_the_ledger_before_the_rent(world: World) -> None:
    held_at_start: list[Decimal] = []
    world.backend.on_start = lambda backend, lease: (
        held_at_start.append(world.ledger.balance().held_usd),
        world.trainer_starts(backend, lease),
    )[0]
    world.supervisor().run()
    # 2 s to ask, 10 s to boot, 37 s first grant and 5 s to kill, two nodes, one cent each per second.
    assert held_at_start == [Decimal("1.08")]


def test_a_preempted_lease_is_settled_and_the_next_offer_is_rented(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]
    assert world.runs.get(world.run.run_id).preemptions == 1
    check_ledger(world)


def test_after_a_preemption_the_whole_zone_is_avoided_even_if_it_is_next_in_the_plan(world: World) -> None:
    supervisor = world.supervisor()
    zone_0, zone_1 = supervisor.candidates(Decimal(0))
    larger = replace(zone_0, offer=replace(zone_0.offer, instance_type="larger"))
    supervisor.candidates = lambda _: [zone_0, larger, zone_1]
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id))
    assert supervisor.run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]


def test_no_capacity_anywhere_waits_at_no_cost(world: World) -> None:
    world.backend.capacity = 0
    world.clock.after(40.0, lambda: setattr(world.backend, "capacity", 10))
    assert world.supervisor().run() is RunState.SUCCEEDED
    spent = [entry.spent_micro_usd for entry in world.ledger.entries() if entry.kind is EntryKind.ACCRUE]
    assert sum(spent) < 1_600_000
    assert any("at $0" in message for message in world.told("relaunch"))
    check_ledger(world)


def test_a_higher_cap_continues_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"))
    world.supervisor().run()
    reached = world.step
    world.cap = Decimal("50")
    supervisor = world.supervisor()
    world.ledger.set_cap(world.cap)
    assert supervisor.run() is RunState.SUCCEEDED
    assert 0 < reached < world.step == world.num_steps
    check_ledger(world)


def test_a_cluster_that_breaks_again_and_again_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, breaks_at_start=True)
    assert world.supervisor().run() is RunState.FAILED
    assert "failures in a row" in world.runs.get(world.run.run_id).reason
    assert world.runs.get(world.run.run_id).failures == 6
    check_ledger(world)


def test_a_run_store_that_vanishes_ends_the_nodes_and_is_named(world: World) -> None:
    world.clock.after(30.0, lambda: shutil.rmtree(world.path / "store"))
    with pytest.raises(StoreError, match="store"):
        world.supervisor().run()
    run = world.runs.get(world.run.run_id)
    assert run.state is RunState.FAILED and "store" in run.reason
    check_ledger(world)


def test_a_ledger_that_cannot_be_written_ends_the_nodes(tmp_path: Path) -> None:
    """A full disk: no entry can be made, so nothing can be paid for any longer."""
    world = World(tmp_path, num_steps=600)
    supervisor = world.supervisor()
    world.clock.after(30.0, lambda: world.db.execute("PRAGMA max_page_count = 1") and None)
    with pytest.raises(DatabaseError, match=r"the ledger cannot be written: .*full; free disk space"):
        supervisor.run()
    assert world.backend.list_alive() == []
    world.db.execute("PRAGMA max_page_count = 1000000")
    assert world.supervisor().run() is RunState.SUCCEEDED
    check_ledger(world)


@pytest.mark.parametrize("moment", [0.5, 8.0, 16.0, 33.0, 60.0])
def test_a_killed_supervisor_is_replaced_and_adopts_the_lease(world: World, moment: float) -> None:
    def kill() -> None:
        raise Killed

    world.clock.after(moment, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 1
    check_ledger(world)


def test_a_supervisor_that_comes_back_late_finds_nothing_alive_and_starts_again(world: World) -> None:
    def kill() -> None:
        raise Killed

    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    world.clock.sleep(3600)  # the provider's own limit ended the nodes long ago
    assert world.backend.list_alive() == []
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 2
    check_ledger(world)


def test_the_old_supervisor_is_powerless_after_a_take_over(world: World) -> None:
    old = world.supervisor()
    world.clock.after(30.0, lambda: world.runs.take_over(world.run.run_id))
    with pytest.raises((Fenced, SlmError), match="taken over"):
        old.run()
    world.supervisor().run()
    check_ledger(world)


def test_an_instance_that_the_ledger_does_not_know_is_ended(world: World) -> None:
    supervisor = world.supervisor()
    stray = Lease("slm-abc123-other-1", "other", 1, offer_in("zone-9"), 1, PRICE, 600.0, 5.0, 1)
    world.backend.on_start = None
    world.backend.start(stray, ["x"])
    world.backend.on_start = world.trainer_starts
    supervisor.run()
    assert any("slm-abc123-other-1" in message for message in world.told("warning"))
    assert world.backend.list_alive() == []

"""A node counts as lost only after no list has shown it for long; the list alone proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.clock import ManualClock
from orchestrator.runs.records import RunState
from orchestrator.supervisor.lease.census import Census
from orchestrator.supervisor.lease_policy import Terms
from tests.support.supervised_run import World, check_ledger


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_list_that_is_wrong_once_releases_nothing(world: World) -> None:
    """A node that is missing from a list for less than `confirm_seconds` may live, and stays paid for."""
    world.clock.after(30.0, lambda: world.backend.hidden.add(1))
    world.clock.after(34.0, world.backend.hidden.clear)
    assert world.supervisor(terms=Terms(confirm_seconds=6.0)).run() is RunState.SUCCEEDED
    assert "lost" not in world.kinds()
    check_ledger(world)


def test_a_node_that_comes_back_after_it_was_given_up_is_paid_for(world: World) -> None:
    world.clock.after(30.0, lambda: (world.backend.hidden.add(1), setattr(world.backend, "capacity", 0))[0])
    world.clock.after(50.0, world.backend.hidden.clear)
    assert world.supervisor(terms=Terms(confirm_seconds=3.0, grow_delay_seconds=60.0)).run() is RunState.SUCCEEDED
    sizes = [entry.note for entry in world.ledger.entries() if "nodes" in entry.note]
    assert sizes == ["2 -> 1 nodes", "1 -> 2 nodes"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def census(clock: ManualClock) -> Census:
    """Of two nodes, which may take 20 s to appear and are lost after 5 s without a sign."""
    return Census(2, clock, Terms(boot_allowance_seconds=15.0, confirm_seconds=5.0))


def test_a_node_is_lost_once_no_list_has_shown_it_for_long(census: Census, clock: ManualClock) -> None:
    census.see({0, 1})
    assert census.drop_lost({0}, num_paid=2) == []
    clock.sleep(5.0)
    assert census.drop_lost({0}, num_paid=2) == [1]
    assert census.alive == {0} and not census.is_whole


def test_a_node_that_a_list_shows_again_begins_anew(census: Census, clock: ManualClock) -> None:
    census.see({0, 1})
    for shown in ({0}, {0, 1}, {0}):
        assert census.drop_lost(shown, num_paid=2) == []
        clock.sleep(4.0)
    assert census.is_whole


def test_a_node_that_never_appears_is_lost_when_it_can_no_longer_come(census: Census, clock: ManualClock) -> None:
    census.await_nodes()
    census.see({0})
    clock.sleep(20.0)
    assert census.may_still_come and census.drop_lost({0}, num_paid=2) == []
    clock.sleep(0.1)
    assert census.drop_lost({0}, num_paid=2) == [1]

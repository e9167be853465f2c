"""A lease is settled only when its nodes are surely gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cost.market.providers import Ttl
from orchestrator.runs.records import RunState
from orchestrator.supervisor.lease_policy import Terms
from tests.support.supervised_run import Killed, World, check_ledger
from trainer.run_store.base import StoreError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_lease_that_a_wrong_list_does_not_show_is_waited_for_before_it_is_settled(world: World) -> None:
    """The interface hides both nodes and does not end them: only after the silence is the lease settled."""
    world.clock.after(30.0, lambda: (world.backend.hidden.update({0, 1}), setattr(world.backend, "deaf_to_stop", True)))
    world.clock.after(33.0, lambda: (world.backend.hidden.clear(), setattr(world.backend, "deaf_to_stop", False)))
    assert world.supervisor(terms=Terms(confirm_seconds=6.0)).run() is RunState.SUCCEEDED
    check_ledger(world)


@pytest.mark.parametrize("spoke", [True, False])
def test_a_lease_whose_nodes_all_appeared_is_settled_without_waiting_for_more(world: World, spoke: bool) -> None:
    def kill() -> None:
        raise Killed

    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0, create_seconds=600.0)
    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor(terms=terms).run()
    (lease,) = world.backend.starts
    world.backend.stop(lease)  # its guards ended it, long before the provider's limit
    if not spoke:
        world.store.delete(f"guard/{lease.lease_id}/1/request.json")
    back = world.clock.real_seconds()
    restarted: list[float] = []
    world.backend.on_start = lambda backend, lease: (
        restarted.append(world.clock.real_seconds() - back),
        world.trainer_starts(backend, lease),
    )[0]
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    assert (restarted[0] < 10) is spoke
    check_ledger(world)


def test_a_create_without_a_reply_is_ended_and_charged(world: World) -> None:
    world.backend.fail_next = 1
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 2
    check_ledger(world)


def test_a_wall_clock_that_is_ahead_does_not_settle_what_is_alive(world: World) -> None:
    """The next supervisor's clock says that the last terminator has fired; only its own waiting proves that."""

    def kill() -> None:
        raise Killed

    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    lease_id = world.backend.starts[0].lease_id
    world.clock._now_ms += 7_200_000
    world.backend.fail_next = 4
    open_while_alive: list[bool] = []
    world.clock.after(3.0, lambda: open_while_alive.append(world.ledger.account(lease_id).is_open))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert open_while_alive == [True]
    assert world.backend.list_alive() == []


def test_a_lease_is_settled_by_its_newest_expiry_when_the_store_fails(world: World) -> None:
    """The interface does not end the nodes, so they cost money until the provider's limit: so long it stays open."""
    world.num_steps = 10_000

    def fail() -> None:
        world.backend.deaf_to_stop = True
        shutil.rmtree(world.path / "store")

    world.clock.after(120.0, fail)
    with pytest.raises(StoreError):
        world.supervisor().run()
    check_ledger(world)

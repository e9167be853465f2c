"""Lost nodes are rented again under a reservation of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.runs.records import RunState
from tests.support.supervised_run import World, check_ledger


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_losing_another_node_keeps_the_lease_and_rents_that_node_again(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id, 1))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 1 and len(world.backend.starts) == 2
    assert "lost" in world.kinds() and "grown" in world.kinds()
    check_ledger(world)


def test_without_capacity_to_regrow_the_run_continues_smaller_and_owes_nothing_for_the_try(world: World) -> None:
    def take() -> None:
        world.backend.take(world.backend.starts[0].lease_id, 1)
        world.backend.capacity = 1

    world.clock.after(30.0, take)
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert any("no node to grow back" in message for message in world.told("warning"))
    check_ledger(world)

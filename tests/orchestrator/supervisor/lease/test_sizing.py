"""What a new lease reserves, and how long it may last."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from cost.market.providers import Ttl
from orchestrator.runs.records import RunState
from orchestrator.supervisor.lease_policy import Terms
from tests.support.supervised_run import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fixed_limit_is_reserved_as_a_whole_and_granted_in_parts(world: World) -> None:
    held: list[Decimal] = []
    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0)
    world.clock.after(30.0, lambda: held.append(world.ledger.balance().held_usd))
    world.supervisor(terms=terms).run()
    assert held[0] > Decimal("3.50")  # some 190 s more of two nodes, one cent each per second
    grants = json.loads(world.store.read(f"grants/{world.backend.starts[0].lease_id}/0.json"))
    assert grants["duration_seconds"] <= terms.term_seconds


def test_a_prepaid_account_is_reserved_as_a_whole_and_no_more_is_rented_than_it_holds(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("3.00"))
    terms = Terms(balance_usd=Decimal("5.00"))
    assert world.supervisor(terms=terms).run() is RunState.OUT_OF_BUDGET
    assert world.backend.starts == []  # $5 on the account could all be used up, and the cap is $3
    world = World(tmp_path / "more", cap=Decimal("9.00"))
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    assert world.backend.starts[0].ttl_seconds == pytest.approx(250.0)  # $5 at two cents a second

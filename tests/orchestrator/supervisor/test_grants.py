"""Grants answer the nodes' requests and never last longer than what is paid."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.leases import Lease
from cost.ledger.ledger import Fenced
from cost.market.providers import Ttl
from orchestrator.backends.fake import FakeBackend
from orchestrator.runs.records import RunState
from orchestrator.supervisor.grants import heard_ms
from orchestrator.supervisor.lease_policy import Terms
from tests.support.supervised_run import SCALE, World, check_ledger


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_grants_answer_each_request_and_end_before_what_is_paid(world: World) -> None:
    supervisor = world.supervisor()
    seen: list[tuple[int, float, float]] = []

    def look() -> None:
        for account in world.ledger.open_accounts():
            key = f"grants/{account.lease.lease_id}/0.json"
            if key in world.store.list("grants/"):
                grant = json.loads(world.store.read(key))
                paid = (account.expires_ms - world.clock.now_ms()) / 1000 / SCALE
                seen.append((grant["number"], grant["duration_seconds"], paid))
                assert grant["fencing_token"] == world.ledger.fencing_token
        world.clock.after(5.0, look)

    world.clock.after(20.0, look)
    world.clock.after(110.0, lambda: None)  # the agenda may outlive the run
    supervisor.run()
    assert len({number for number, _, _ in seen}) >= 8
    assert all(0 < duration <= paid + 5.0 for _, duration, paid in seen)


def test_grants_give_the_time_to_a_ledger_that_holds_no_accruals(world: World) -> None:
    """A clock set back by hours shows only against the newest moment that anything tells of."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((heard_ms(world.store, world.ledger.open_accounts()), world.clock.now_ms()))

    world.clock.after(45.0, look)
    world.supervisor(terms=Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0)).run()
    ((heard, now),) = seen
    assert now - 30_000 * SCALE <= heard <= now
    assert heard_ms(world.store, []) == 0


def test_a_rent_that_comes_late_after_its_reservation_is_paid_again(world: World) -> None:
    supervisor = world.supervisor()
    supervisor.write_spec = lambda lease: world.clock.sleep(100.0)
    left: list[float] = []

    def look(backend: FakeBackend, lease: Lease) -> None:
        left.append((world.ledger.account(lease.lease_id).expires_ms - world.clock.now_ms()) / 1000 / SCALE)
        world.trainer_starts(backend, lease)

    world.backend.on_start = look
    assert supervisor.run() is RunState.SUCCEEDED
    assert left == [49.0]  # 2 s to ask, 10 s to boot and 37 s first grant, from the rent and not from the reservation
    check_ledger(world)


def test_a_late_rent_that_the_cap_can_no_longer_pay_is_not_made(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.06"))
    supervisor = world.supervisor()
    supervisor.write_spec = lambda lease: world.clock.sleep(100.0)
    assert supervisor.run() is RunState.OUT_OF_BUDGET
    assert world.backend.starts == [] and world.ledger.balance().spent_usd == 0


def test_a_supervisor_suspended_before_the_rent_learns_there_that_it_was_replaced(world: World) -> None:
    """Its successor finds nothing alive and settles; nodes rented now would be paid for by nobody."""
    old = world.supervisor()

    def taken_over(lease: Lease) -> None:
        new = world.supervisor()
        new.ledger.settle(lease.lease_id, ended_ms=world.clock.now_ms(), at_ms=world.clock.now_ms(), outcome="expired")

    old.write_spec = taken_over
    with pytest.raises(Fenced, match="taken over"):
        old.run()
    assert world.backend.starts == []

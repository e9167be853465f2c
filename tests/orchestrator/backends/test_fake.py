"""The fake cloud is held to the same text as the real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pytest

from cost.ledger.leases import Lease
from orchestrator.backends.base import Backend, BackendError
from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from tests.support.backend_contract import OFFER, PRICE, BackendContract, lease_of


class FakeRig:
    """The fake cloud's provider side."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.fake = FakeBackend(self.clock, quotes=[OFFER])

    @property
    def backend(self) -> Backend:
        return self.fake

    @property
    def command(self) -> Sequence[str]:
        return ["train"]

    def until(self, fact: Callable[[], Any]) -> Any:
        for _ in range(1000):
            if value := fact():
                return value
            self.clock.sleep(0.1)
        return fact()

    def take(self, lease: Lease, rank: int) -> None:
        self.fake.take(lease.lease_id, rank)

    def end_command(self, lease: Lease, exit_code: int) -> None:
        self.fake.end_command(lease.lease_id, exit_code)

    def limit(self, num_nodes: int) -> None:
        self.fake.capacity = num_nodes

    def keep(self, lease: Lease, seconds: float) -> None:
        """Only the provider's own limit ends a node of this cloud."""

    def pass_seconds(self, seconds: float) -> None:
        self.clock.sleep(seconds)


@pytest.fixture
def rig() -> FakeRig:
    return FakeRig()


class TestFakeBackend(BackendContract):
    pass


def test_it_bills_real_node_time_at_the_price(rig: FakeRig) -> None:
    lease = lease_of(num_nodes=2, first_grant_seconds=1e6)
    rig.fake.start(lease, ["train"])
    rig.clock.sleep(1800)
    rig.fake.take(lease.lease_id, 1)
    rig.clock.sleep(1800)
    assert rig.fake.true_bill_usd() == PRICE * Decimal("1.5")


def test_a_call_without_a_reply_has_done_what_it_was_asked(rig: FakeRig) -> None:
    rig.fake.fail_next = 1
    with pytest.raises(BackendError, match="did not answer"):
        rig.fake.start(lease_of(), ["train"])
    assert len(rig.fake.list_alive()) == 2

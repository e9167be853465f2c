"""What every backend must do, as `orchestrator/backends/base.py` says it.

A test module makes its backend's rig in a fixture called `rig` and inherits:

    class TestMyBackend(BackendContract): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Protocol

import pytest

from cost.ledger.leases import Lease
from orchestrator.backends.base import Backend, LeasePhase, NoCapacity
from tests.support.builders import make_lease, make_offer

PRICE = Decimal("1.25")
OFFER = make_offer(
    cloud="example", accelerator="H100", usd_per_hour=PRICE, on_demand_usd_per_hour="2.50", as_of="2026-11-01"
)


def lease_of(
    name: str = "slm-test-1", *, num_nodes: int = 2, first_grant_seconds: float = 30.0, run_id: str = "test"
) -> Lease:
    return make_lease(
        OFFER,
        lease_id=name,
        run_id=run_id,
        num_nodes=num_nodes,
        worst_usd_per_hour=PRICE,
        first_grant_seconds=first_grant_seconds,
        kill_latency_seconds=2.0,
    )


class Rig(Protocol):
    """A backend whose only quote is OFFER, and the provider's side of it."""

    @property
    def backend(self) -> Backend: ...

    @property
    def command(self) -> Sequence[str]:
        """Runs until `end_command`."""
        ...

    def until(self, fact: Callable[[], Any]) -> Any:
        """The value of `fact` once it is true, within bounds."""
        ...

    def take(self, lease: Lease, rank: int) -> None:
        """The provider preempts one node."""
        ...

    def end_command(self, lease: Lease, exit_code: int) -> None:
        """The command of node 0 ends."""
        ...

    def limit(self, num_nodes: int) -> None:
        """From now on the provider has no more than so many nodes; called before the first start."""
        ...

    def keep(self, lease: Lease, seconds: float) -> None:
        """Let the guards live for so long too, so that only the provider's limit can end the nodes."""
        ...

    def pass_seconds(self, seconds: float) -> None: ...


class BackendContract:
    """Every backend passes these."""

    def started(self, rig: Rig, lease: Lease) -> None:
        rig.backend.start(lease, rig.command)
        rig.until(lambda: rig.backend.poll(lease).phase is LeasePhase.RUNNING)

    def gone(self, rig: Rig, lease: Lease) -> bool:
        return rig.backend.poll(lease).phase is LeasePhase.GONE

    def names(self, rig: Rig) -> dict[tuple[str, int], str]:
        return {(node.lease_id, node.rank): node.instance_id for node in rig.backend.list_alive()}

    def test_it_quotes_what_it_rents(self, rig: Rig) -> None:
        assert list(rig.backend.offers()) == [OFFER]

    def test_a_lease_that_was_never_started_is_gone_and_can_be_stopped(self, rig: Rig) -> None:
        rig.backend.stop(lease_of())
        rig.backend.extend(lease_of(), 10.0)
        assert self.gone(rig, lease_of())
        assert list(rig.backend.list_alive()) == []

    def test_a_started_lease_runs_and_is_listed_with_its_price(self, rig: Rig) -> None:
        lease = lease_of()
        self.started(rig, lease)
        state = rig.backend.poll(lease)
        assert (state.alive_ranks, state.exit_code, state.usd_per_hour) == ((0, 1), None, PRICE)
        nodes = sorted(rig.backend.list_alive(), key=lambda node: node.rank)
        assert [(node.lease_id, node.run_id, node.rank, node.usd_per_hour) for node in nodes] == [
            ("slm-test-1", "test", 0, PRICE),
            ("slm-test-1", "test", 1, PRICE),
        ]
        assert all(node.started_at.tzinfo is not None for node in nodes)

    def test_starting_again_rents_nothing_more(self, rig: Rig) -> None:
        lease = lease_of()
        self.started(rig, lease)
        before = self.names(rig)
        rig.backend.start(lease, rig.command)
        assert self.names(rig) == before

    def test_a_taken_node_is_missed_and_only_it_is_rented_again(self, rig: Rig) -> None:
        lease = lease_of()
        self.started(rig, lease)
        before = self.names(rig)
        rig.take(lease, 1)
        rig.until(lambda: rig.backend.poll(lease).alive_ranks == (0,))
        assert self.names(rig) == {("slm-test-1", 0): before["slm-test-1", 0]}
        self.started(rig, lease)
        assert rig.backend.poll(lease).alive_ranks == (0, 1)
        assert self.names(rig)["slm-test-1", 0] == before["slm-test-1", 0]

    def test_a_lease_without_nodes_is_gone(self, rig: Rig) -> None:
        lease = lease_of()
        self.started(rig, lease)
        rig.take(lease, 1)
        rig.take(lease, 0)
        rig.until(lambda: self.gone(rig, lease))
        assert rig.backend.poll(lease).alive_ranks == ()

    def test_a_command_that_ends_is_told_while_the_nodes_still_cost_money(self, rig: Rig) -> None:
        lease = lease_of()
        self.started(rig, lease)
        rig.end_command(lease, 10)
        rig.until(lambda: rig.backend.poll(lease).phase is LeasePhase.ENDED)
        assert rig.backend.poll(lease).exit_code == 10
        assert len(rig.backend.list_alive()) == 2

    def test_stop_ends_one_lease_and_may_be_repeated(self, rig: Rig) -> None:
        lease, other = lease_of(), lease_of("slm-test-2", num_nodes=1)
        self.started(rig, lease)
        self.started(rig, other)
        rig.backend.stop(lease)
        assert self.gone(rig, lease)
        assert set(self.names(rig)) == {("slm-test-2", 0)}
        rig.backend.stop(lease)
        assert rig.backend.poll(other).phase is LeasePhase.RUNNING

    def test_without_capacity_nothing_is_rented(self, rig: Rig) -> None:
        rig.limit(1)
        with pytest.raises(NoCapacity, match="2 requested"):
            rig.backend.start(lease_of(), rig.command)
        assert list(rig.backend.list_alive()) == []
        self.started(rig, lease_of(num_nodes=1))

    def test_the_provider_ends_a_lease_whose_limit_was_not_moved(self, rig: Rig) -> None:
        lease = lease_of(num_nodes=1, first_grant_seconds=3.0)
        self.started(rig, lease)
        rig.keep(lease, 60.0)
        rig.backend.extend(lease, 1.0)
        rig.pass_seconds(1.0)
        rig.until(lambda: self.gone(rig, lease))

    def test_a_limit_that_was_moved_lets_a_lease_live(self, rig: Rig) -> None:
        lease = lease_of(num_nodes=1, first_grant_seconds=3.0)
        self.started(rig, lease)
        rig.keep(lease, 60.0)
        rig.backend.extend(lease, 60.0)
        rig.pass_seconds(4.5)  # the limit was at 3 s, and kills within 1 s
        assert rig.backend.poll(lease).phase is LeasePhase.RUNNING

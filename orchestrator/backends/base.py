"""The contract of everything that can be rented from. Each method may be repeated safely.

A backend knows nothing of money: the ledger has paid before `start` is called. Logs, progress, checkpoints and grants
go through the run store. `tests/support/backend_contract.py` holds every backend to this text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Protocol

from cost.errors import SlmError
from cost.ledger.leases import Lease
from cost.market.offers import Offer


class BackendError(SlmError):
    """A call to the provider failed; the instance may or may not exist."""


class NoCapacity(BackendError):
    """The provider has none of these nodes now; nothing was rented by this call."""

    for_good = False
    """Whether waiting cannot help: a quota, credentials, a setting."""


class LeasePhase(StrEnum):
    """STARTING: requested, not all nodes seen yet. GONE: no node of the lease is left at the provider."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class LeaseState:
    """One lease at the provider now.

    ENDED means that node 0's command has ended with `exit_code` while nodes still exist and cost money.
    """

    phase: LeasePhase
    alive_ranks: tuple[int, ...] = ()
    exit_code: int | None = None
    usd_per_hour: Decimal | None = None
    """Price of one node as the provider bills it now; None where it does not tell."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """One node that exists at the provider and is ours."""

    instance_id: str
    lease_id: str
    run_id: str
    rank: int
    usd_per_hour: Decimal
    started_at: datetime


class Backend(Protocol):
    """A place that rents out nodes."""

    name: str

    def offers(self) -> Sequence[Offer]:
        """Quotes: what could be rented at which price."""
        ...

    def start(self, lease: Lease, command: Sequence[str]) -> None:
        """Rent what is missing of the lease's nodes and run `command` on each; nothing if all are there.

        Called again after a node was lost, it rents only that rank ("growing back").

        Raises:
            NoCapacity: None to be had; nothing new was rented.
            BackendError: Unknown outcome; the caller must count the nodes as maybe alive.
        """
        ...

    def poll(self, lease: Lease) -> LeaseState:
        """What exists of the lease now."""
        ...

    def extend(self, lease: Lease, seconds: float) -> None:
        """Move the provider's own time limit to `seconds` (real) from now; nothing where it is fixed or absent."""
        ...

    def stop(self, lease: Lease) -> None:
        """Terminate every node of the lease and wait, bounded, for the provider to confirm; quiet if already gone."""
        ...

    def list_alive(self) -> Sequence[Instance]:
        """Everything at the provider that carries our name."""
        ...

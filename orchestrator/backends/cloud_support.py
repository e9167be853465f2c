"""What a cloud's own interface does for a lease beside SkyPilot, as one protocol that each such cloud implements."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Protocol

from cost.ledger.leases import Lease


class CloudSupport(Protocol):
    """One cloud's time limit, prices, quotas and reasons. `record` is the lease's record in the run store.

    Each method may be called again safely.
    """

    terminators: frozenset[str]
    """Names of the `cost.market.providers` terminators that `limit` arms."""
    reads_prices: bool
    """Whether the provider tells what a spot node costs now; where not, the price when it was rented counts."""

    def refusal(self, lease: Lease) -> str | None:
        """Why the provider will not rent this lease, however long one waits: a quota; None where it may."""
        ...

    def limit(self, record: Mapping[str, Any], lease: Lease, seconds: float) -> None:
        """Terminate the lease's nodes `seconds` from now unless called again. Raises BackendError."""
        ...

    def usd_per_hour(self, record: Mapping[str, Any], lease: Lease) -> Decimal | None:
        """What one node costs now; None where it cannot be read."""
        ...

    def why_gone(self, record: Mapping[str, Any], lease: Lease) -> str:
        """Why the nodes ended, in the provider's words; empty where it does not say."""
        ...

    def release(self, record: Mapping[str, Any], lease: Lease) -> None:
        """Remove the limits of a lease that is gone; never raises."""
        ...

"""Charging one lease for the time that has passed, at the price that was read.

Invariant: between two looks at a price no further apart than `price_gap_seconds` the price was at most the higher of
both. Time that is not covered in this way is charged at the worst-case price.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from cost.ledger.accounts import LeaseAccount
from cost.ledger.leases import micro_usd
from cost.ledger.ledger import Ledger
from orchestrator.clock import Clock
from orchestrator.supervisor.grants import Grants
from orchestrator.supervisor.lease_policy import Terms


@dataclass(frozen=True, slots=True)
class PriceReading:
    """A price as the provider gave it."""

    at_ms: int
    """Billed milliseconds."""
    usd_per_hour: Decimal
    """Of one node."""


@dataclass(slots=True)
class Accrual:
    """One lease's charges; changes `newest`, and nobody else does."""

    lease_id: str
    ledger: Ledger
    clock: Clock
    terms: Terms
    grants: Grants
    newest: PriceReading | None = None

    def charge(self, usd_per_hour: Decimal | None) -> LeaseAccount:
        """Charge the elapsed time from time to time; at once when the price changed, or was not read for long.

        Without a price nothing is charged; the time stays reserved at the worst-case price.
        """
        now_ms = self.clock.now_ms()
        account = self.ledger.account(self.lease_id)
        if usd_per_hour is None:
            return account
        last_ms = account.started_ms if self.newest is None else self.newest.at_ms
        if now_ms - last_ms > self.grants.billed_ms(self.terms.price_gap_seconds):
            self.charge_to_newest_price()
            account = self.ledger.accrue(self.lease_id, at_ms=now_ms)
        self.newest = PriceReading(now_ms, usd_per_hour)
        changed = micro_usd(usd_per_hour) != account.price_micro_usd
        if not changed and now_ms - account.accrued_until_ms < self.grants.billed_ms(self.terms.accrue_seconds):
            return account
        return self.ledger.accrue(self.lease_id, at_ms=now_ms, usd_per_hour=usd_per_hour)

    def charge_to_newest_price(self) -> None:
        """Charge what is certain at its price, so that only the rest counts at the worst-case price."""
        if self.newest is not None:
            self.ledger.accrue(self.lease_id, at_ms=self.newest.at_ms, usd_per_hour=self.newest.usd_per_hour)

    def resize(self, num_nodes: int) -> LeaseAccount:
        """From now on the lease has so many nodes.

        Raises:
            BudgetExceeded: They are more, and the cap does not cover them.
        """
        self.charge_to_newest_price()
        return self.ledger.resize(self.lease_id, num_nodes=num_nodes, at_ms=self.clock.now_ms())

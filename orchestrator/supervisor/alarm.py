"""Saying once how much of the cap is spent, when it passes half, four fifths and nearly all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost.ledger.ledger import Balance, Ledger

WARN_AT = (50, 80, 95)
"""Percent of the cap."""


@dataclass(slots=True)
class CapAlarm:
    """One supervisor's; a new one says again where the run stands, so that a warning is never lost with a process."""

    ledger: Ledger
    tell: Callable[..., None]
    _told: int = 0

    def look(self, balance: Balance | None = None) -> None:
        """Tell the highest threshold that was passed since the last look."""
        balance = balance or self.ledger.balance()
        percent = int(100 * balance.spent_usd / balance.cap_usd) if balance.cap_usd else 0
        passed = [threshold for threshold in WARN_AT if percent >= threshold > self._told]
        if passed:
            self._told = passed[-1]
            message = f"{passed[-1]} % of the cap is spent: ${balance.spent_usd:.2f} of ${balance.cap_usd:.2f}"
            self.tell("warning", message, percent=passed[-1], spent_usd=balance.spent_usd, cap_usd=balance.cap_usd)

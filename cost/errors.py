"""Errors that a person can act on: each names the fact, the numbers and the way out.

Only `orchestrator.cli` turns an `SlmError` into an exit code; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from decimal import Decimal


class SlmError(Exception):
    """Something went wrong that is not a bug of ours."""

    exit_code = 1


class UserError(SlmError):
    """The request itself cannot be met; a changed command can."""

    exit_code = 2


class BudgetExceeded(UserError):
    """Raised before anything is rented, when a reservation would pass the cap."""

    def __init__(self, *, needed_usd: Decimal, remaining_usd: Decimal) -> None:
        self.needed_usd = needed_usd
        self.remaining_usd = remaining_usd
        super().__init__(
            f"this lease may cost ${needed_usd:.2f}, but ${remaining_usd:.2f} is left; "
            "train on fewer tokens, pick a cheaper offer, or raise the cap with --budget."
        )

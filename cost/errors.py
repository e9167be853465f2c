"""Errors that a user can act on: each states the problem, the numbers and the fix.

Only `orchestrator.cli` turns an `SlmError` into an exit code; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from decimal import Decimal


class SlmError(Exception):
    """Something went wrong that is not a bug in slm."""

    exit_code = 1


class UserError(SlmError):
    """The request cannot be met as given; a changed command can."""

    exit_code = 2


class BudgetExceeded(UserError):
    """Raised before anything is rented, when a reservation would pass the cap."""

    def __init__(self, *, needed_usd: Decimal, remaining_usd: Decimal) -> None:
        self.needed_usd = needed_usd
        self.remaining_usd = remaining_usd
        super().__init__(
            f"this lease may cost ${needed_usd:.2f}, but only ${remaining_usd:.2f} of the budget cap is left; "
            "train on fewer tokens, choose a cheaper offer, or raise the cap with --budget."
        )

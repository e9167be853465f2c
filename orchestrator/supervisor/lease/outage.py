"""Something that we depend on and that does not answer for a while: the provider, or the run store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Outage:
    """Whether it is out of reach; reported once each time it begins."""

    is_on: bool = False

    def begins(self) -> bool:
        """There was no answer; True at the first time since the last answer."""
        is_new, self.is_on = not self.is_on, True
        return is_new

    def ends(self) -> None:
        """There was an answer."""
        self.is_on = False

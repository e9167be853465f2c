"""What a notice leaves time for: pure. A node is told that it will be taken; should a checkpoint be begun, and when?

A save that does not end before the node is lost is worth nothing and takes the time of steps; so none is begun that is
not expected to fit. Where one fits, the last moment for it is the moment to leave: every step before it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

SAVE_SAFETY = 1.5
"""A save is expected to take so many times what the newest took: the store may be slower this time."""
MARGIN_SECONDS = 2.0
"""Between the end of the last save and the announced moment: clouds are not punctual to the second."""
LEAVE_SECONDS = 5.0
"""Where there is time, the group leaves so long before the end, so that the next one is not placed on this node."""


@dataclass(frozen=True)
class Plan:
    """What to do about one notice."""

    save_now: bool
    """A checkpoint at once, against an end that comes early; training goes on after it."""
    leave_in_seconds: float | None
    """When to save for the last time and to leave the node; None where no save fits any more."""


def plan(left_seconds: float, save_seconds: float, step_seconds: float) -> Plan:
    """Decide once, when the notice is first seen.

    Args:
        left_seconds: Until the node is taken.
        save_seconds: What the newest save took until it was durable; 0 where none was measured.
        step_seconds: What a step takes: wishes are heard between steps only.
    """
    one_save = SAVE_SAFETY * save_seconds + step_seconds
    if left_seconds < one_save + MARGIN_SECONDS:
        return Plan(save_now=False, leave_in_seconds=None)
    leave_in = left_seconds - max(one_save + MARGIN_SECONDS, LEAVE_SECONDS)
    return Plan(save_now=leave_in > one_save, leave_in_seconds=max(0.0, leave_in))

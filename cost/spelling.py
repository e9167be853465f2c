"""Suggestions for a name that does not exist: the most similar one that does."""

from __future__ import annotations

from collections.abc import Collection

CUTOFF = 0.5
"""The least similarity, of 0 to 1, at which a name is suggested (difflib)."""


def closest(word: str, known: Collection[str], cutoff: float = CUTOFF) -> str | None:
    """The most similar of the known names; None where none is similar enough."""
    from difflib import get_close_matches  # takes milliseconds, and only an error needs it

    matches = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Collection[str], cutoff: float = CUTOFF) -> str:
    """`; did you mean NAME?` to append to a message; empty where no known name is similar."""
    name = closest(word, known, cutoff)
    return f"; did you mean {name}?" if name else ""

"""`--explain`: each number with its formula, inputs and source."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from orchestrator.figures import bare
from orchestrator.views.runs import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from cost.plan.explain import Explanation

INDENT = "    "


def explanations(numbers: Sequence[Explanation], console: Console) -> None:
    """All numbers in the order in which they follow from each other."""
    say(console, "", "How each number of the best offer is computed:")
    for number in numbers:
        say(console, "", f"  {number.name} = {bare(number.value)} {number.unit}")
        inputs = ", ".join(f"{name} = {bare(value)}" for name, value in number.inputs.items())
        for label, text in (("formula", number.formula), ("inputs", inputs), ("source", number.source)):
            if text:
                say(console, wrapped(label, text, console.width))


def wrapped(label: str, text: str, width: int) -> str:
    """A labelled paragraph whose lines begin under each other."""
    head = f"{INDENT}{label + ':':<9}"
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False)

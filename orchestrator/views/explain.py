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
    say(console, "", "How each number of the best offer comes about:")
    for one in numbers:
        say(console, "", f"  {one.name} = {bare(one.value)} {one.unit}")
        inputs = ", ".join(f"{name} = {bare(value)}" for name, value in one.inputs.items())
        for label, text in (("formula", one.formula), ("inputs", inputs), ("source", one.source)):
            if text:
                say(console, wrapped(label, text, console.width))


def wrapped(label: str, text: str, width: int) -> str:
    """A labelled paragraph whose lines begin under each other."""
    head = f"{INDENT}{label + ':':<9}"
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False)

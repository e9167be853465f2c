"""The command line by which every process of ours starts another one.

The user's working folder is on no import path of such a process: a file `tasks.py`, `trainer.py` or `cost.py`, or a
folder `orchestrator/` that lies there is never imported in the place of ours.
"""

from __future__ import annotations

import sys

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The same, for processes whose command line is not ours, such as Ray's workers. Python before 3.11 ignores it."""


def own_module(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line that runs a module of ours; `python` is 3.11 or newer."""
    return [python, *own_arguments(module, *arguments)]


def own_arguments(module: str, *arguments: str) -> tuple[str, ...]:
    """The same without the interpreter."""
    return ("-P", "-m", module, *arguments)

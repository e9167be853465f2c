"""`python -m tasks NAME ...`: everything that runs on a node, and the data preparation on the laptop.

Each task is a module with `main(argv) -> exit code`, imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cost.errors import SlmError

TASKS = {
    "prepare": ("tasks.data.prepare", "main"),
    "node": ("tasks.node.ray_node", "main"),
    "rented-node": ("tasks.node.rented_node", "main"),
    "drain": ("tasks.node.ray_node", "drain_main"),
    "time-processor": ("tasks.node.time_processor", "main"),
    "pretrain": ("tasks.ray_train.driver", "main"),
    "export": ("tasks.hub.export", "export_main"),
    "import": ("tasks.hub.export", "import_main"),
    "generate": ("tasks.hub.generate", "main"),
}


def main(argv: Sequence[str]) -> int:
    """Run one task; a fact that a person can act on is one line on standard error, not a traceback."""
    if not argv or argv[0] not in TASKS:
        asked = f"no task is called {argv[0]!r}" if argv else "which task?"
        sys.stderr.write(f"{asked}; one of: {', '.join(TASKS)}.\n")
        return 2
    module, function = TASKS[argv[0]]
    try:
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    except SlmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How long nodes took from the request until they were set up, as our own runs measured it, cloud by cloud.

One line of JSON for each start in the home's `starts.jsonl`; a plan charges the middle one of the newest.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median

NEWEST = 5


def remember(path: Path, *, cloud: str, seconds: float, parts: dict[str, float]) -> None:
    """Add one start; `parts` say where its time went."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"cloud": cloud, "seconds": seconds, **parts}) + "\n")


def typical(path: Path) -> dict[str, float]:
    """By cloud; a line that was cut short by a kill is left out."""
    found: dict[str, list[float]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            item = json.loads(line)
            found[str(item["cloud"])].append(float(item["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return {cloud: median(seconds[-NEWEST:]) for cloud, seconds in sorted(found.items())}

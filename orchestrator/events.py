"""What a run tells: one line for a person, data for a program; kept in the run's folder and shown live."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `at` is real UTC."""

    kind: str
    message: str
    at: datetime
    data: dict[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


class EventLog:
    """Appends every event but progress to a file of JSON lines, then hands it on."""

    def __init__(self, path: Path, then: Emit) -> None:
        self._path = path
        self._then = then

    def __call__(self, event: Event) -> None:
        if event.kind != "progress":
            line = {"at": event.at.isoformat(), "kind": event.kind, "message": event.message, **event.data}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        self._then(event)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every kept event, oldest first; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events

"""Writes facts as one JSON document, with the version of its schema as the first key.

docs/json.md describes every key; tests/orchestrator/views/test_json_docs.py compares that page with real output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

SCHEMA_VERSION = 2
"""Raised when a key of any document changes its meaning, is renamed or is removed."""


def print_json(facts: Any, stream: TextIO | None = None) -> None:
    """Write a JSON document: dataclasses become objects, money a number of dollars, times ISO 8601."""
    document = {"version": SCHEMA_VERSION, **plain(facts)} if is_object(facts) else plain(facts)
    (stream or sys.stdout).write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(facts: Any) -> Any:
    """The same facts in JSON's own types; numbers that are not finite become null."""
    if dataclasses.is_dataclass(facts) and not isinstance(facts, type):
        return {field.name: plain(getattr(facts, field.name)) for field in dataclasses.fields(facts)}
    if isinstance(facts, dict):
        return {str(key): plain(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple | set | frozenset):
        return [plain(fact) for fact in facts]
    if isinstance(facts, Decimal):
        return float(facts)
    if isinstance(facts, datetime):
        return facts.isoformat()
    if isinstance(facts, Enum):
        return facts.value
    if isinstance(facts, Path):
        return str(facts)
    if isinstance(facts, float) and not -float("inf") < facts < float("inf"):
        return None
    return facts


def is_object(facts: Any) -> bool:
    """Whether the facts become a JSON object, which gets the schema version."""
    return isinstance(facts, dict) or dataclasses.is_dataclass(facts)

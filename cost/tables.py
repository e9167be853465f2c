"""The tables that ship with the project: cost/data/*.csv, each value with its source in the same row."""

from __future__ import annotations

import csv
from importlib.resources import files


def table_rows(name: str) -> list[dict[str, str]]:
    """The rows of cost/data/NAME by column name, in the file's order."""
    text = (files("cost") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))

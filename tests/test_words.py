"""What users see uses the words of the field: no retired word in help, messages, JSON keys, CSV headers or pages."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "tasks", "trainer", "cost")

RETIRED = {
    r"books": "ledger",
    r"killers?": "terminator",
    r"fuses?": "watchdog",
    r"strangers?": "orphan",
    r"(two|both|three|other|these|more) arms": "terminators",
    r"drain line": "drain threshold",
    r"p-hat": "worst-case price",
    r"dearer|dearest|too dear": "more expensive, or above the worst-case price",
    r"sets? aside": "reserve",
    r"what came of it": "result",
    r"left alone": "skipped",
    r"(the )?way out": "fix",
    r"go(es)? on": "continue",
    r"went on": "continued",
    r"lost sight of": "(say what happens)",
    r"not told|was told": "notified",
}
"""Retired word to the word of docs/architecture.md that replaces it."""
PATTERN = re.compile(rf"\b({'|'.join(RETIRED)})\b", re.IGNORECASE)
RETIRED_KEYS = {"held_usd", "killers", "experience", "way_out", "num_leaked", "fuse", "books", "extras", "stranger"}


def found_in(text: str) -> list[str]:
    return [match.group(0) for match in PATTERN.finditer(text)]


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """String literals with more than one word, without docstrings; expressions of an f-string read as {}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield node.lineno, text


def help_texts() -> Iterator[tuple[str, str]]:
    from orchestrator.cli import app

    group: Any = typer.main.get_command(app)
    yield "slm", group.get_help(typer.Context(group, info_name="slm"))
    for name, command in sorted(group.commands.items()):
        yield name, command.get_help(typer.Context(command, info_name=f"slm {name}"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(("name", "text"), list(help_texts()), ids=[name for name, _ in help_texts()])
def test_help_uses_the_words_of_the_field(name: str, text: str) -> None:
    assert found_in(text) == [], f"slm {name} --help"


@pytest.mark.parametrize("package", PACKAGES)
def test_messages_use_the_words_of_the_field(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == package
        for line, text in messages(path)
        if (words := found_in(text))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert [f"{number}: {words}" for number, line in lines if (words := found_in(line))] == []


def test_no_json_key_is_a_retired_word() -> None:
    keys = re.findall(r"^\| ([\w.\[\]*]+) \|", (ROOT / "docs" / "json.md").read_text(encoding="utf-8"), re.MULTILINE)
    parts = {part for key in keys for part in re.split(r"[.\[\]*]+", key)}
    assert "reserved_usd" in parts
    assert parts & RETIRED_KEYS == set()
    assert [part for part in sorted(parts) if found_in(part.replace("_", " "))] == []


@pytest.mark.parametrize("table", sorted((ROOT / "cost" / "data").glob("*.csv")), ids=lambda path: path.name)
def test_no_csv_header_is_a_retired_word(table: Path) -> None:
    with table.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    assert found_in(table.stem.replace("_", " ")) == []
    assert [name for name in header if found_in(name.replace("_", " "))] == []


def test_a_retired_word_is_noticed() -> None:
    assert found_in("Its killers fire; the Books say why.") == ["killers", "Books"]
    assert found_in("The run goes on.") == ["goes on"]
    assert found_in("the bookshelf, an alarm, the army, ongoing") == []

"""What a user is told to install is this distribution, by its name in pyproject.toml, with extras that it has."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.settings import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("orchestrator", "tasks", "trainer", "cost", "bench", "docs", "tests")
HINT = re.compile(r"pip install (?:-[cr] \S+\s?|-\S+ )*+'?(?P<name>[A-Za-z][\w.-]*)(?:\[(?P<extras>[\w,]+)\])?")
OURS = re.compile(r"(?<![\w.-])(?P<name>slm[\w-]*)\[(?P<extras>[a-z]+(?:,[a-z]+)*)\]")


def texts() -> Iterator[tuple[str, str]]:
    """What users read, or run: sources, docs, README and Makefile."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile"]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".txt", ".yaml")]
    for path in files:
        if path != Path(__file__):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def required_by_the_project() -> set[str]:
    requirements = [
        *PROJECT["dependencies"],
        *(one for many in PROJECT["optional-dependencies"].values() for one in many),
    ]
    return {re.split(r"[\s\[<>=!~;]", requirement)[0] for requirement in requirements}


def test_the_code_knows_its_distribution_by_the_name_in_pyproject() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "slm-spot"
    assert PROJECT["scripts"] == {"slm": "orchestrator.cli:main"}


def test_every_extra_of_ours_is_asked_for_by_our_name_and_exists() -> None:
    hints = [(place, hint) for place, text in texts() for hint in OURS.finditer(text)]
    assert len(hints) >= 10
    for place, hint in hints:
        assert hint["name"] == DISTRIBUTION, f"{place}: {hint[0]}"
        assert set(hint["extras"].split(",")) <= {*PROJECT["optional-dependencies"]}, f"{place}: {hint[0]}"


def test_nothing_is_installed_by_a_name_that_is_not_ours_or_a_dependency() -> None:
    names = {"pip", DISTRIBUTION, *required_by_the_project()}
    for place, text in texts():
        for hint in HINT.finditer(text):
            assert hint["name"] in names, f"{place}: {hint[0]}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pip install 'slm[train]'", "slm"),
        ("needs boto3: pip install slm[cloud]", "slm"),
        ("pip install -q 'slm-spot[train,cloud]'", "slm-spot"),
    ],
)
def test_a_hint_is_found_however_it_is_written(text: str, name: str) -> None:
    found = HINT.search(text), OURS.search(text)
    assert [match and match["name"] for match in found] == [name, name]

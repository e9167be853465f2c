"""docs/dependencies.md has one line for each direct dependency, under the heading of its extra."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^\| (?P<name>[A-Za-z0-9._-]+) \| (?P<what>[^|]+) \| (?P<why>[^|]+) \|$")
HEADINGS = {"distribution"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """Extra, "Base" for none, to the distributions that pyproject asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"Base": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {canonical(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in requirements}
        for extra, requirements in groups.items()
    }


def documented() -> dict[str, list[str]]:
    """Heading to the distributions named in its table."""
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif (entry := ENTRY.match(line)) and entry["name"] not in HEADINGS:
            sections.setdefault(heading, []).append(canonical(entry["name"]))
    return sections


@pytest.mark.parametrize("extra", declared())
def test_every_dependency_has_its_line(extra: str) -> None:
    lines = [name for heading, names in documented().items() if extra in heading for name in names]
    assert declared()[extra] - set(lines) == set()


def test_nothing_is_documented_that_is_not_a_dependency() -> None:
    names = {name for names in documented().values() for name in names}
    assert names - set().union(*declared().values()) == set()


def test_what_is_only_compared_with_is_pinned_in_bench_and_no_dependency() -> None:
    folder = ROOT / "bench" / "peers"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    torch = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert torch is not None and f"pip install {torch[0]}" in readme
    files = sorted(folder.glob("*.txt"))
    assert {path.stem for path in files} == {"lm-eval", "trl", "datatrove", "datasketch"}
    for path in files:
        assert f"| `{path.name}` |" in readme
        for requirement in path.read_text(encoding="utf-8").split():
            assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", requirement), f"{path}: {requirement}"
        assert path.stem not in set().union(*declared().values())


def test_a_distribution_is_documented_once() -> None:
    names = [name for names in documented().values() for name in names]
    assert sorted(names) == sorted(set(names))

"""The commands that the docs and the Makefile name exist, with their options; those that only look are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READ_ONLY = {"plan", "recipes", "gpus", "offers", "estimate"}


def shown_commands() -> list[tuple[str, str]]:
    """Every `$ slm ...` line of a console block, with the page that shows it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            found += [(page.name, line[2:]) for line in block.splitlines() if line.startswith("$ slm ")]
    return sorted(set(found))


def test_the_docs_show_commands() -> None:
    assert len(shown_commands()) >= 10


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_a_command_shown_in_the_docs_parses(page: str, line: str) -> None:
    from orchestrator.cli import app

    commands: Any = typer.main.get_command(app)
    name, *rest = shlex.split(line)[1:]
    assert name in commands.commands, f"{page} shows {line}"
    commands.commands[name].make_context(name, rest)


@pytest.mark.parametrize(
    "line",
    sorted({line for _, line in shown_commands() if shlex.split(line)[1] in READ_ONLY and "--refresh" not in line}),
)
def test_a_command_that_only_looks_runs_as_shown(line: str, tmp_path: Path) -> None:
    slm = Path(sys.executable).with_name("slm")
    done = subprocess.run(
        [str(slm), *shlex.split(line)[1:]],
        env={**os.environ, "SLM_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


NAMING = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "peers" / "README.md",
    ROOT / "Makefile",
    ROOT / ".ci" / "run",
]
MODULE = r"(?:bench|orchestrator|tasks|trainer|cost)\b[\w.]*"
PROGRAM = re.compile(rf"python (?:(?P<file>bench/\S+\.py)|-m (?P<module>{MODULE}))(?=(?P<rest>[^\n`|]*))")
TARGET = re.compile(r"(?:`|\$ )make (?P<target>[a-z0-9-]+)")


def named_programs() -> list[tuple[str, str, str]]:
    """Every program of ours that is named with `python`: where, its file, and what follows it."""
    found = []
    for page in NAMING:
        for match in PROGRAM.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            file = match["file"] or match["module"].replace(".", "/")
            found.append((page.name, file, match["rest"].partition(" -- ")[0]))
    return sorted(set(found))


def source_of(file: str) -> str:
    """The text of a program, by path or by module name as a path."""
    candidates = [ROOT / file, ROOT / f"{file}.py", ROOT / file / "__main__.py"]
    return next(path for path in candidates if path.is_file()).read_text(encoding="utf-8")


def test_the_docs_and_the_makefile_name_programs() -> None:
    assert len(named_programs()) >= 40


@pytest.mark.parametrize(("page", "file", "rest"), named_programs())
def test_a_program_that_is_named_exists_with_its_options(page: str, file: str, rest: str) -> None:
    source = source_of(file)
    for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
        assert f'"{option}"' in source, f"{page} names {file} {rest}"


def test_a_make_target_that_is_named_exists() -> None:
    targets = set(
        re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    named = {match["target"] for page in NAMING for match in TARGET.finditer(page.read_text(encoding="utf-8"))}
    assert len(named) >= 5
    assert named <= targets

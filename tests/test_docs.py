"""The commands that the docs show are commands that exist; those that only look are run."""

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

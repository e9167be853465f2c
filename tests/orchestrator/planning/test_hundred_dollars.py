"""docs/hundred-dollars.md is made by a script, from what the commands print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page for another budget, from the prices that ship with slm."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "page.md"
    command = [sys.executable, "-m", "bench.hundred_dollars", "--budget", "40", "--out", str(out)]
    environment = {**os.environ, "SLM_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ .*$", page, flags=re.MULTILINE)


def test_the_page_answers_architecture_data_compute_hardware_and_doubt(made: str) -> None:
    assert headings(made)[0] == "# What 40 dollars buy"
    committed = (ROOT / "docs" / "hundred-dollars.md").read_text(encoding="utf-8")
    assert headings(made)[1:] == headings(committed)[1:]
    assert "**The best model** is a dense one of " in made
    assert "**How likely:** " in made.partition("## ")[0]
    assert "simulated runs of the best model train all its tokens under the cap of $40" in made
    for scenario in ("spot, no deadline", "spot, 48h", "on-demand, no deadline", "on-demand, 48h"):
        assert made.count(f"| {scenario} |") == 3


def test_the_page_shows_what_clouds_without_a_limit_would_add(made: str) -> None:
    assert made.count("| unguarded spot, no deadline |") == 3
    assert "With `--allow-unguarded` the same money trains " in made.partition("## ")[0]


def test_no_expected_bill_of_a_largest_model_is_over_the_budget(made: str) -> None:
    table = made.partition("## The largest model")[2].partition("##")[0]
    bills = [float(row.split("|")[6]) for row in table.splitlines() if row.startswith(("| spot", "| on-demand"))]
    assert len(bills) == 4
    assert 30 < min(bills) <= max(bills) <= 40


def test_the_commands_of_the_page_are_commands(made: str) -> None:
    from orchestrator import cli

    commands = made.partition("## Commands")[2].strip().strip("`").strip().splitlines()
    assert len(commands) == 13
    known = {command.callback.__name__ for command in cli.app.registered_commands if command.callback is not None}
    assert {shlex.split(line)[1] for line in commands} <= known

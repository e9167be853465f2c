"""All extras resolve together against the lock, and none moves what is installed."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

from orchestrator.settings import DISTRIBUTION

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_extras_resolve_together_and_leave_what_is_installed(tmp_path: Path) -> None:
    """One run of the resolver: extras that fit together fit alone. `flash` is empty but for Linux on x86_64."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
    command += ["--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[{','.join(EXTRAS)}]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    planned = {
        canonical(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    installed = {canonical(found.name): found.version for found in distributions()}
    moved = {
        name: (installed[name], version)
        for name, version in planned.items()
        if name != DISTRIBUTION and installed.get(name, version) != version
    }
    assert moved == {}
    assert "torch" not in planned
    assert (platform.system(), platform.machine()) != ("Linux", "x86_64") or "flash-attn-4" in {*planned, *installed}

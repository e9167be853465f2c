"""`slm` from a folder that holds files with the names of our packages: every command and process of a run is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hostile_folder import SAID, write_hostile_modules

pytestmark = pytest.mark.e2e

SLM = Path(sys.executable).with_name("slm")
TINY = ("--backend", "local", "--market", "calm", "--nodes", "2", "--set", "training.num_steps=20", "--yes")


class User:
    """Types commands in a hostile folder."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.work = write_hostile_modules(folder / "work")

    def slm(self, *arguments: str) -> str:
        """What the command prints.

        Raises:
            AssertionError: It failed, or imported a file of the folder.
        """
        environ = {**os.environ, "SLM_HOME": str(self.home), "SLM_REFRESH": "never"}
        done = subprocess.run(
            [str(SLM), *arguments],
            cwd=self.work,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert SAID not in done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_a_run_from_a_hostile_folder_is_planned_trained_watched_and_used(tmp_path: Path) -> None:
    user = User(tmp_path)
    user.slm("plan", "demo")
    user.slm("prepare", "demo")
    user.slm("launch", "demo", *TINY, "--detach")
    user.slm("logs", "demo-1", "--follow")
    assert "succeeded" in user.slm("status", "demo-1")
    assert user.slm("generate", "demo-1", "the", "--tokens", "4")
    logs = [path.read_text(errors="replace") for path in user.home.rglob("*.log")]
    assert logs and not [log for log in logs if SAID in log]

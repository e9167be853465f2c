"""What spot markets do, done to real runs: real SkyPilot, Slurm, Ray and training, driven by the slm command alone."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cloudlab.cloud import RECIPE, Lab, User

pytestmark = pytest.mark.e2e


def test_a_run_finishes_and_the_books_cover_what_the_scheduler_counted(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    planned = user.slm("plan", str(RECIPE), "--backend", "sky", "--json")
    assert planned.returncode == 0, planned.stderr
    best = json.loads(planned.stdout)["best"]["offer"]
    assert (best["cloud"], best["region"], best["zone"], best["spot"]) == ("slurm", "slmcloud", "spot", True)
    assert user.finish(user.launch()) == 0, user.said()
    assert lab.jobs() == []
    status = user.status()
    assert (status["state"], status["preemptions"], status["failures"]) == ("SUCCEEDED", 0, 0)
    assert user.step() == 1000
    assert user.checkpoints()[-1] == 1000
    (job,) = lab.ended_jobs()[before:]
    assert job.usd <= user.spent_usd() <= 5

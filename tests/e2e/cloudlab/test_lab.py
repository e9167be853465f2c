"""The lab itself: nodes that can be taken, and nothing left when it is down."""

from __future__ import annotations

import pytest

from tests.e2e.cloudlab.cluster import Lab, until
from tests.e2e.cloudlab.people import User

pytestmark = pytest.mark.e2e


def test_a_killed_node_takes_its_processes_with_it_and_comes_back_empty(lab: Lab, user: User) -> None:
    lab.slurm("sbatch", "-p", "spot", "-w", "n2", "-o", "/dev/null", "--wrap", "touch /tmp/mark; sleep 3333")
    until("the job's process", lambda: lab.node_processes("n2", "sleep", "3333"))
    assert lab.node_processes("n1", "sleep", "3333") == []
    lab("node_kill", "n2")
    assert lab.node_processes("n2", "sleep", "3333") == []
    lab("node_up", "n2")
    until("the node", lambda: "idle" in lab.slurm("sinfo", "-h", "-n", "n2", "-p", "spot", "-o", "%t"))
    assert not (lab.base / "cluster" / "tmp-n2" / "mark").exists()

"""One lab, one bucket and one SkyPilot home for all scenarios; each scenario has a home of its own for slm."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cloudlab.cloud import MARK, Bucket, Lab, User, bucket_on_the_bridge, end_all, new_user, until

LOCK = Path("/var/tmp/slm-cloudlab.lock")
NODES = ("n1", "n2")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster, after whatever an earlier run left behind is gone; one at a time on a machine."""
    one = Lab(Path(os.environ.get("LAB_DIR", "/var/tmp/slm-cloudlab")))
    refusal = one.refusal()
    if refusal is not None:
        pytest.skip(f"no lab on this machine: {refusal}")
    with LOCK.open("w") as lock:
        until("the lab to be free", lambda: taken(lock.fileno()), seconds=600)
        end_all(MARK, "1")
        one("down")
        one("up", seconds=600)
        try:
            yield one
        finally:
            end_all(MARK, "1")
            one("down")


def taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def bucket(lab: Lab) -> Iterator[Bucket]:
    with bucket_on_the_bridge() as one:
        yield one


@pytest.fixture(scope="session")
def sky_user(lab: Lab, bucket: Bucket) -> Iterator[User]:
    """The home whose SkyPilot API server all scenarios share: to start one takes ten seconds."""
    folder = Path(tempfile.mkdtemp(prefix="slm-lab-"))
    one = new_user(folder, lab, bucket)
    try:
        until("prices of the lab", lambda: one.slm("offers", "--refresh").returncode == 0)
        yield one
    finally:
        one.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def user(sky_user: User, lab: Lab, request: pytest.FixtureRequest) -> Iterator[User]:
    """A user who has launched nothing yet, on a cloud where everything is free."""
    name = request.node.name.removeprefix("test_")[:24].strip("_").replace("_", "-")
    one = User(sky_user.folder, lab, sky_user.bucket, sky_user.port, prefix=name)
    one.slm_home.mkdir(parents=True)
    shutil.copy(sky_user.slm_home / "offers.json", one.slm_home / "offers.json")
    yield one
    for supervisor in one.supervisors:
        if supervisor.poll() is None:
            supervisor.kill()
            supervisor.wait(10)
    set_free(lab)


def set_free(lab: Lab) -> None:
    """Every node up, every partition open, no job left: also after a scenario that failed."""
    for name in ("spot", "ondemand", "reclaim"):
        lab.slurm("scancel", f"--partition={name}")
        lab.slurm("scontrol", "update", f"PartitionName={name}", "State=UP")
    for node in NODES:
        lab("node_up", node)
    until("free nodes", lambda: set(lab.slurm("sinfo", "-h", "-p", "spot", "-N", "-o", "%t").split()) == {"idle"})

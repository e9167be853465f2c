"""What spot markets do, done to real runs: real SkyPilot, Slurm, Ray and training, driven by the slm command alone."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from tests.e2e.cloudlab.cloud import RECIPE, Job, Lab, User, kill_all, new_user, until

pytestmark = pytest.mark.e2e


def settled(lab: Lab, user: User, before: int, *, state: str = "SUCCEEDED") -> list[Job]:
    """The clusters of one run after its end: none is left, and the books cover what the scheduler counted."""
    assert lab.jobs() == []
    assert user.status()["state"] == state, user.said()
    jobs = lab.ended_jobs()[before:]
    assert sum((job.usd for job in jobs), Decimal(0)) <= user.spent_usd()
    return jobs


def resumed_from(user: User) -> list[int]:
    """The saved steps at which workers began anew."""
    return [int(one["parent"]["step"]) for one in user.epochs() if one["parent"] is not None]


def test_two_nodes_train_as_one_group_and_the_books_cover_the_bill(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    planned = user.slm("plan", str(RECIPE), "--backend", "sky", "--json")
    assert planned.returncode == 0, planned.stderr
    best = json.loads(planned.stdout)["best"]["offer"]
    assert (best["cloud"], best["region"], best["zone"], best["spot"]) == ("slurm", "slmcloud", "spot", True)
    supervisor = user.launch("nodes.min=2", "nodes.max=2", "training.num_steps=300")
    until("two nodes of one cluster", lambda: (lab.running() or {}).get("nodes") == "n[1-2]")
    assert user.finish(supervisor) == 0, user.said()
    (job,) = settled(lab, user, before)
    assert (job.num_nodes, job.partition) == (2, "spot")
    assert (user.step(), user.checkpoints()[-1], user.progress()["world_size"]) == (300, 300, 2)
    assert len({user.bucket.json(key)["node_ip"] for key in user.bucket.keys(f"{user.store_prefix()}/setup/")}) == 2


def test_a_vanished_node_is_noticed_and_the_run_goes_on_elsewhere(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=2500")
    until("a checkpoint", user.trains)
    node = (lab.running() or {})["nodes"]
    lab("node_kill", node)
    until("the loss in the run's events", lambda: user.events("settled"))
    assert user.finish(supervisor) == 0, user.said()
    first, second = settled(lab, user, before)
    assert first.nodes == node != second.nodes
    assert (user.step(), user.status()["preemptions"]) == (2500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 2500


def test_a_preempted_run_goes_on_from_before_what_its_zombie_still_writes(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=2500")
    until("a checkpoint", user.trains)
    node = (lab.running() or {})["nodes"]
    lab.reclaim(node, seconds=60)
    until("the loss in the run's events", lambda: user.events("settled"))
    assert user.finish(supervisor) == 0, user.said()
    first, second = settled(lab, user, before)
    assert (first.state, first.nodes, second.nodes != node) == ("PREEMPTED", node, True)
    assert (user.step(), user.status()["preemptions"]) == (2500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 2500


def test_at_the_cap_a_run_saves_ends_its_nodes_and_has_spent_no_more(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    assert user.finish(user.launch("training.num_steps=100000", budget="0.36")) == 0, user.said()
    settled(lab, user, before, state="OUT_OF_BUDGET")
    assert user.spent_usd() <= Decimal("0.36")
    assert 0 < user.checkpoints()[-1] == user.step()


def test_without_a_supervisor_nodes_end_by_the_guard_and_without_both_by_the_provider(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=8000", "cloud.lease_seconds=30", "cloud.ttl_seconds=180")
    until("a checkpoint", user.trains)
    supervisor.kill()
    until("the guard's end of the cluster", lambda: not lab.jobs())
    (first,) = lab.ended_jobs()[before:]
    assert first.state in ("CANCELLED", "COMPLETED", "FAILED")
    saved = user.checkpoints()[-1]
    second = user.start("resume")
    until("a newer checkpoint", lambda: user.checkpoints()[-1] > saved)
    second.kill()
    node = (lab.running() or {})["nodes"]
    assert kill_all(lambda: lab.node_processes(node, "tasks/guard.py"))
    for process in lab.node_processes(node, "-m tasks"):
        process.suspend()  # the guest hangs
    until("the provider's end of the cluster", lambda: not lab.jobs())
    assert [job.state for job in lab.ended_jobs()[before:]][1:] == ["TIMEOUT"]
    assert user.finish(user.start("resume")) == 0, user.said()
    settled(lab, user, before)
    assert user.step() == 8000


def test_a_full_offer_is_passed_over_and_where_all_are_full_the_run_waits_at_no_cost(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    lab.slurm("sbatch", "-p", "ondemand", "-w", "n1,n2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 900")
    until("a full cloud", lambda: set(lab.slurm("sinfo", "-h", "-N", "-o", "%t").split()) == {"alloc"})
    supervisor = user.launch("offers.spot=null", "training.num_steps=300", "cloud.capacity_seconds=10")
    waits = until("a wait", lambda: [one for one in user.events("relaunch") if "at $0" in one["message"]])
    assert "waiting" in waits[0]["message"]
    tried = " ".join(one["message"] for one in user.events("start"))
    assert "slmcloud/spot" in tried
    assert "slmcloud/ondemand" in tried
    assert user.spent_usd() == 0
    lab.slurm("scontrol", "update", "PartitionName=spot", "State=DOWN")
    lab.slurm("scancel", "--partition=ondemand", "--name=wrap")
    assert user.finish(supervisor) == 0, user.said()
    (job,) = settled(lab, user, before)
    assert job.partition == "ondemand"
    assert (user.step(), user.status()["preemptions"]) == (300, 0)


def test_a_fixed_limit_is_rolled_over_though_the_api_server_was_killed(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=5000", "cloud.ttl_seconds=120")
    until("a checkpoint", user.trains)
    assert kill_all(user.api_server)
    step = user.step()
    until("training that goes on", lambda: user.step() > step)
    until("a new API server", user.api_server)
    assert user.finish(supervisor) == 0, user.said()
    jobs = settled(lab, user, before)
    assert len(jobs) >= 2
    status = user.status()
    assert (user.step(), status["preemptions"], status["failures"]) == (5000, 0, 0)
    assert [one["cause"] for one in user.events("settled")][:-1] == ["ttl"] * (len(jobs) - 1)


def test_a_second_home_takes_the_run_over_and_the_first_is_powerless(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    first = user.launch("training.num_steps=4000")
    until("a checkpoint", user.trains)
    other = new_user(user.folder / "other", lab, user.bucket)
    try:
        uri = f"s3://slm-lab/{user.store_prefix().removeprefix('slm-lab/')}"
        recovered = other.slm("recover", uri)
        assert recovered.returncode == 0, recovered.stdout + recovered.stderr
        second = other.start("resume")
        assert user.finish(first) != 0, user.said()
        assert other.finish(second) == 0, other.said()
        assert lab.jobs() == []
        assert other.status()["state"] == "SUCCEEDED"
        assert user.step() == 4000
        assert sum((job.usd for job in lab.ended_jobs()[before:]), Decimal(0)) <= other.spent_usd()
    finally:
        other.end()

"""What spot markets do, done to real runs: real SkyPilot, Slurm, Ray and training, driven by the slm command alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal

import pytest

from tests.e2e.cloudlab.cluster import Job, Lab, crawl, kill_all, let_go, until
from tests.e2e.cloudlab.people import BUCKET, RECIPE, User, new_user

pytestmark = pytest.mark.e2e


def settled(lab: Lab, user: User, before: int, *, state: str = "SUCCEEDED") -> list[Job]:
    """The clusters of one run after its end: none is left, and the ledger covers what the scheduler counted."""
    assert lab.jobs() == []
    assert user.status()["state"] == state, user.said()
    jobs = lab.ended_jobs()[before:]
    assert sum((job.usd for job in jobs), Decimal(0)) <= user.spent_usd()
    return jobs


def resumed_from(user: User) -> list[int]:
    """The saved steps at which workers began anew."""
    return [
        int(incarnation["parent"]["step"]) for incarnation in user.incarnations() if incarnation["parent"] is not None
    ]


def node_that_trains(lab: Lab, user: User) -> str:
    """Of the run's cluster, once a checkpoint is whole."""
    until("a checkpoint", user.trains)
    return (lab.running() or {})["nodes"]


def test_two_nodes_train_as_one_group_and_the_ledger_covers_the_bill(lab: Lab, user: User) -> None:
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
    keys = user.bucket.keys(f"{user.store_prefix()}/setup/")
    assert len({user.bucket.json(key)["node_ip"] for key in keys}) == 2


@pytest.mark.short
def test_a_vanished_node_is_noticed_and_the_run_goes_on_elsewhere(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=1500")
    node = node_that_trains(lab, user)
    lab("node_kill", node)
    until("training again", lambda: user.events("recovered"))
    assert user.finish(supervisor) == 0, user.said()
    first, second = settled(lab, user, before)
    assert first.nodes == node != second.nodes
    assert (user.step(), user.status()["num_preemptions"]) == (1500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 1500


@pytest.mark.short
def test_a_preempted_run_goes_on_and_its_zombie_is_met_by_nobody(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=1500", "cloud.lease_seconds=240")
    node = node_that_trains(lab, user)
    zombies = lab.hold_training(node)
    lab.reclaim(node, seconds=60)
    until("training again", lambda: user.events("recovered"))
    assert let_go(zombies) == 1  # it goes on where it stood, beside the one that took its place
    assert user.finish(supervisor) == 0, user.said()
    first, second = settled(lab, user, before)
    assert (first.state, first.nodes, second.nodes != node) == ("PREEMPTED", node, True)
    assert (user.step(), user.status()["num_preemptions"]) == (1500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 1500
    assert user.checkpoints_of(1)[-1] == 1500


@pytest.mark.short
def test_at_the_cap_a_run_saves_ends_its_nodes_and_has_spent_no_more(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    length = ("training.num_steps=1000000", "cloud.ttl_seconds=150")
    refused = user.launch(*length, budget="0.01")
    assert user.finish(refused) != 0
    smallest = re.search(r"--budget (\d+\.\d+)", user.said())
    assert smallest is not None, user.said()
    assert user.finish(user.launch(*length, budget=smallest[1])) == 0, user.said()
    settled(lab, user, before, state="OUT_OF_BUDGET")
    assert user.spent_usd() <= Decimal(smallest[1])
    assert 0 < user.checkpoints()[-1] == user.step()


@pytest.mark.short
def test_without_a_supervisor_nodes_end_by_the_guard_and_without_both_by_the_provider(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=2500", "cloud.lease_seconds=30", "cloud.ttl_seconds=180")
    lab.hold_training(node_that_trains(lab, user))
    supervisor.kill()
    until("the guard's end of the cluster", lambda: not lab.jobs())
    (first,) = lab.ended_jobs()[before:]
    assert first.state != "TIMEOUT"
    saved = user.checkpoints()[-1]
    second = user.start("resume")
    until("a newer checkpoint", lambda: user.checkpoints()[-1] > saved)
    node = (lab.running() or {})["nodes"]
    lab.hold_training(node)
    second.kill()
    assert kill_all(lambda: lab.node_processes(node, "guard.pyz"))
    until("the provider's end of the cluster", lambda: not lab.jobs())
    assert [job.state for job in lab.ended_jobs()[before:]][1:] == ["TIMEOUT"]
    assert user.finish(user.start("resume")) == 0, user.said()
    settled(lab, user, before)
    assert user.step() == 2500


def test_a_full_offer_is_passed_over_and_where_all_are_full_the_run_waits_at_no_cost(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    lab.slurm("sbatch", "-p", "ondemand", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 900")
    until("a full cloud", lambda: set(lab.slurm("sinfo", "-h", "-N", "-o", "%t").split()) == {"alloc"})
    supervisor = user.launch("offers.spot=null", "training.num_steps=300", "cloud.capacity_seconds=10")
    until("a wait", lambda: [event for event in user.events("relaunch") if "waiting" in event["message"]])
    until("both offers tried", lambda: len({*places_tried(user)}) == 2)
    assert user.spent_usd() == 0
    lab.slurm("scontrol", "update", "PartitionName=spot", "State=DOWN")
    lab.slurm("scancel", "--partition=ondemand", "--name=wrap")
    assert user.finish(supervisor) == 0, user.said()
    (job,) = settled(lab, user, before)
    assert job.partition == "ondemand"
    assert (user.step(), user.status()["num_preemptions"]) == (300, 0)


def places_tried(user: User) -> Iterator[str]:
    for event in user.events("start"):
        yield event["message"].split("slmcloud/")[1].split("/")[0]


def test_a_fixed_limit_is_rolled_over_though_the_api_server_was_killed(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=2000", "cloud.ttl_seconds=150")
    node = node_that_trains(lab, user)
    assert kill_all(user.api_server)
    step = user.step()
    until("training that goes on", lambda: user.step() > step)
    held = lab.hold_training(node)
    until("a new API server", user.api_server)

    def asked_to_end() -> bool:
        crawl(held)
        return any("the provider's time limit is near" in event["message"] for event in user.events("warning"))

    until("the end of the limit", asked_to_end)
    assert let_go(held) == 1, user.said()
    assert user.finish(supervisor) == 0, user.said()
    jobs = settled(lab, user, before)
    assert len(jobs) >= 2
    status = user.status()
    assert (user.step(), status["num_preemptions"], status["num_failures"]) == (2000, 0, 0)
    causes = [event["cause"] for event in user.events("settled")]
    assert causes == ["ttl"] * (len(jobs) - 1) + ["finished"]


def test_a_second_home_takes_the_run_over_and_the_first_is_powerless(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    first = user.launch("training.num_steps=2000")
    held = lab.hold_training(node_that_trains(lab, user))
    other = new_user(user.folder / "other", lab, user.bucket)
    try:
        recovered = other.slm("recover", "--store", f"s3://{BUCKET}/{user.store_prefix()}")
        assert recovered.returncode == 0, recovered.stdout + recovered.stderr
        second = other.start("resume")
        assert user.finish(first) != 0, user.said()
        let_go(held)
        assert other.finish(second) == 0, other.said()
        assert lab.jobs() == []
        assert other.status()["state"] == "SUCCEEDED"
        assert user.step() == 2000
        assert sum((job.usd for job in lab.ended_jobs()[before:]), Decimal(0)) <= other.spent_usd()
    finally:
        other.end()

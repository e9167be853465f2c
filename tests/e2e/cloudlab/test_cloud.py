"""What spot markets do, done to real runs: real SkyPilot, Slurm, Ray and training, driven by the slm command alone."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import pytest

from tests.e2e.cloudlab.cluster import Job, Lab, let_go, until
from tests.e2e.cloudlab.people import RECIPE, User

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


def node_that_trains(lab: Lab, user: User) -> str:
    """Of the run's cluster, once a checkpoint is whole."""
    until("a checkpoint", user.trains)
    return (lab.running() or {})["nodes"]


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
    keys = user.bucket.keys(f"{user.store_prefix()}/setup/")
    assert len({user.bucket.json(key)["node_ip"] for key in keys}) == 2


def test_a_vanished_node_is_noticed_and_the_run_goes_on_elsewhere(lab: Lab, user: User) -> None:
    before = len(lab.ended_jobs())
    supervisor = user.launch("training.num_steps=1500")
    node = node_that_trains(lab, user)
    lab("node_kill", node)
    until("training again", lambda: user.events("recovered"))
    assert user.finish(supervisor) == 0, user.said()
    first, second = settled(lab, user, before)
    assert first.nodes == node != second.nodes
    assert (user.step(), user.status()["preemptions"]) == (1500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 1500


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
    assert (user.step(), user.status()["preemptions"]) == (1500, 1)
    (saved,) = resumed_from(user)
    assert 0 < saved < 1500
    assert user.checkpoints_of(1)[-1] == 1500


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

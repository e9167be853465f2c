"""Names, terminators, tasks and errors of the SkyPilot backend: all of it pure."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from cost.market.providers import TerminatorKind, provider, providers, refusal
from orchestrator.backends.aws.support import AwsSupport
from orchestrator.backends.sky.client import SkyRefusal, backend_error
from orchestrator.backends.sky.errors import Trouble, classify
from orchestrator.backends.sky.names import LONGEST, cluster_name, lease_names, name_without_user
from orchestrator.backends.sky.task import NodeTerms, head_port, infra, lease_task, node_facts, sky_accelerator
from orchestrator.backends.sky.terminators import (
    NO_AUTOSTOP,
    armed_provider,
    autodown_minutes,
    node_terminators,
    slurm_time,
    task_config,
)
from orchestrator.prices.sources import slurm as catalog_slurm
from tasks.guard.command_line import parse
from tasks.guard.terminators import named_terminators
from tests.support.backend_contract import OFFER, lease_of

TERMS = NodeTerms(store_uri="s3://b/run?endpoint_url=http://h", limit_seconds=600.0, capacity_seconds=30.0)
H100 = replace(OFFER, cloud="slurm", region="lab", zone="spot", instance_type="8CPU--64GB--H100:1")

# -- names


def test_a_short_lease_names_its_cluster() -> None:
    assert cluster_name("slm-1f2e3d-demo-1-2") == "slm-1f2e3d-demo-1-2"


@pytest.mark.parametrize("run", ["tinyllama-1.1b-12", "My_Recipe-1", "a-recipe-with-a-long-name-3"])
def test_a_long_or_odd_name_becomes_a_short_one_that_tells_owner_and_attempt(run: str) -> None:
    name = cluster_name(f"slm-1f2e3d-{run}-17")
    assert len(name) <= LONGEST
    assert name.startswith("slm-1f2e3d-")
    assert name.endswith("-17")
    assert name == name.lower()


def test_a_cluster_s_name_is_its_own_so_that_what_is_listed_can_be_ended() -> None:
    name = cluster_name("slm-1f2e3d-tinyllama-1.1b-12-3")
    assert cluster_name(name) == name


def test_two_runs_or_attempts_never_share_a_cluster() -> None:
    leases = [f"slm-1f2e3d-tinyllama-1.1b-{run}-{attempt}" for run in range(1, 30) for attempt in range(1, 30)]
    assert len(lease_names(leases)) == len(leases)


def test_skypilot_s_own_suffix_is_taken_off() -> None:
    assert name_without_user("slm-1f2e3d-demo-1-2-0123abcd") == "slm-1f2e3d-demo-1-2"
    assert name_without_user("slm-1f2e3d-demo-1-2") == "slm-1f2e3d-demo-1-2"


# -- terminators


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "00:01:00"), (60, "00:01:00"), (61, "00:02:00"), (3599, "01:00:00"), (90000, "1-01:00:00")],
)
def test_slurm_is_told_whole_minutes_never_less_than_paid(seconds: float, said: str) -> None:
    assert slurm_time(seconds) == said


def test_limits_that_are_set_at_the_create_stand_in_the_task() -> None:
    assert task_config("slurm", 180) == {"slurm": {"sbatch_options": {"time": "00:03:00"}}}
    assert task_config("kubernetes", 180.2, capacity_seconds=30) == {
        "kubernetes": {"pod_config": {"spec": {"activeDeadlineSeconds": 181}}, "provision_timeout": 30}
    }
    assert task_config("aws", 180) == {}


def test_the_guard_knows_every_terminator_of_every_cloud() -> None:
    for cloud in providers():
        found = node_terminators(cloud)
        words = [word for name in found.names for word in ("--terminator", name.format(SLURM_JOB_ID="7"))]
        words += [word for source in found.notice for word in ("--notice", source)]
        options = ["--node-dir", "d", "--mark", "m", "--lease", "l", "--rank", "0", "--first-grant", "9", *words]
        terminators = named_terminators(parse([*options, "--", "true"]))
        assert terminators[0].name == "family"
        assert len({terminator.kind for terminator in terminators}) >= 2, cloud


def test_a_terminator_that_nothing_here_arms_does_not_count() -> None:
    aws, slurm, gcp = (armed_provider(provider(name), {}) for name in ("aws", "slurm", "gcp"))
    assert "eventbridge-terminate" not in [terminator.name for terminator in aws.terminators]
    assert refusal(aws, allow_unguarded=False) is not None
    assert refusal(gcp, allow_unguarded=False) is not None
    assert refusal(slurm, allow_unguarded=False) is None


def test_an_arm_beside_skypilot_makes_a_cloud_rentable() -> None:
    aws = armed_provider(provider("aws"), {"aws": AwsSupport()})
    assert refusal(aws, allow_unguarded=False) is None
    assert any(terminator.kind is TerminatorKind.PROVIDER for terminator in aws.terminators)


def test_skypilot_s_own_timer_stands_behind_what_is_paid() -> None:
    assert autodown_minutes("aws", 900) == 20
    assert all(autodown_minutes(name, 900) is None for name in NO_AUTOSTOP)


# -- tasks


def test_a_slurm_partition_is_the_zone_and_is_not_asked_for_as_spot() -> None:
    task = lease_task(replace(lease_of(), offer=H100), TERMS, workdir="/w", environment={})
    assert task["resources"] == {"infra": "slurm/lab/spot", "instance_type": "8CPU--64GB--H100:1"}
    assert task["num_nodes"] == 2
    assert task["config"]["slurm"]["sbatch_options"]["time"] == "00:10:00"


def test_a_cloud_s_spot_node_is_labelled_and_has_skypilot_s_timer() -> None:
    offer = replace(OFFER, cloud="gcp", region="us-east5", zone="us-east5-a", instance_type="a3-highgpu-1g")
    resources = lease_task(replace(lease_of(), offer=offer), TERMS, workdir="/w", environment={})["resources"]
    assert resources["infra"] == "gcp/us-east5/us-east5-a"
    assert resources["use_spot"] is True
    assert resources["labels"] == {"slm-lease": "slm-test-1", "slm-run": "test"}
    assert resources["autostop"] == {"idle_minutes": 15, "down": True, "wait_for": "none"}


def test_a_place_that_is_not_known_is_left_to_skypilot() -> None:
    assert infra(replace(OFFER, cloud="vast", region="any", zone=None)) == "vast"
    assert infra(replace(OFFER, cloud="lambda", region="us-west-1", zone=None)) == "lambda/us-west-1"


def test_accelerators_without_an_instance_type_have_skypilot_s_names() -> None:
    assert [sky_accelerator(item) for item in ("H100-SXM", "A100-80GB-PCIe", "A100-40GB", "L4")] == [
        "H100",
        "A100-80GB",
        "A100",
        "L4",
    ]


def test_nodes_are_told_the_first_grant_and_one_port_for_all() -> None:
    facts = node_facts(lease_of(first_grant_seconds=61.5), TERMS)
    assert facts["first_grant_seconds"] == 61.5
    assert facts["store_uri"] == TERMS.store_uri
    assert facts["head_port"] == head_port("slm-test-1")
    assert 1024 < head_port("slm-test-1") < 32768


# -- errors


@pytest.mark.parametrize(
    ("name", "message", "history", "trouble"),
    [
        ("ResourcesUnavailableError", "failed", ["ClientError: InsufficientInstanceCapacity"], Trouble.CAPACITY),
        ("ResourcesUnavailableError", "failed", ["TimeoutError: Job 7 did not get nodes allocated"], Trouble.CAPACITY),
        ("ResourcesUnavailableError", "failed", ["ProvisionerError: ZONE_RESOURCE_POOL_EXHAUSTED"], Trouble.CAPACITY),
        ("ResourcesUnavailableError", "failed", ["ClientError: MaxSpotInstanceCountExceeded"], Trouble.QUOTA),
        (
            "ResourcesUnavailableError",
            "failed",
            ["Error: Quota 'GPUS_ALL_REGIONS' exceeded. Limit: 0.0"],
            Trouble.QUOTA,
        ),
        (
            "ResourcesUnavailableError",
            "failed",
            ["ClientError: ExpiredToken: The token has expired"],
            Trouble.CREDENTIALS,
        ),
        ("ResourcesUnavailableError", "failed", ["ClientError: AuthFailure"], Trouble.CREDENTIALS),
        ("NoCloudAccessError", "no cloud", [], Trouble.CREDENTIALS),
        ("ResourcesUnavailableError", "failed", ["ClientError: InvalidSubnet.Range"], Trouble.SETTING),
        ("ResourcesUnavailableError", "nothing left", [], Trouble.CAPACITY),
        ("ApiServerConnectionError", "no server", [], Trouble.SERVER),
        ("KeyError", "'x'", [], Trouble.UNKNOWN),
    ],
)
def test_what_passes_is_told_from_what_does_not(name: str, message: str, history: list[str], trouble: Trouble) -> None:
    assert classify(name, message, history).trouble is trouble


def test_messages_lose_their_colours_and_keep_the_cloud_s_words() -> None:
    found = classify("ResourcesUnavailableError", "x", ["\x1b[33mProvisionerError\x1b[0m:\n sold   out"])
    assert found.message == "ProvisionerError: sold out"


def test_a_server_that_fails_leaves_the_outcome_open() -> None:
    error = backend_error(Trouble.SERVER, "connection refused")
    assert not isinstance(error, SkyRefusal)
    assert "sky api status" in str(error)


# -- prices of Slurm

NODE = {"partition": "spot*,ondemand", "gpu_type": "H100", "total_gpus": 2, "vcpu_count": 16, "memory_gb": 128.0}


def test_a_partition_is_a_place_with_a_price_of_its_own() -> None:
    assert [place for _, place in catalog_slurm.places([NODE, {**NODE, "total_gpus": 0}])] == ["spot", "ondemand"]
    offer = catalog_slurm.node_offer(NODE, "lab", "spot", {"accelerators": {"H100": 1.1}}, spot=True, day="2026-11-25")
    assert not isinstance(offer, catalog_slurm.Skipped)
    assert (offer.usd_per_hour, offer.instance_type) == (Decimal("2.2"), "16CPU--115GB--H100:2")
    assert (offer.region, offer.zone, offer.spot) == ("lab", "spot", True)


def test_a_partition_without_a_price_is_no_offer() -> None:
    skipped = catalog_slurm.node_offer(NODE, "lab", "spot", {}, spot=True, day="2026-11-25")
    assert isinstance(skipped, catalog_slurm.Skipped)
    assert "no price; set slurm.cluster_configs.lab.pricing" in skipped.reason


def test_partitions_that_may_be_preempted_are_spot_markets() -> None:
    listing = "PartitionName=a PreemptMode=CANCEL State=UP\nPartitionName=b PreemptMode=OFF State=UP\n"
    assert catalog_slurm.preempted(listing) == {"a": True, "b": False}


def test_spot_knows_the_price_of_the_same_node_that_is_not_preempted() -> None:
    price = {"accelerators": {"H100": 1.1}}
    firm = {"accelerators": {"H100": 2.99}}
    spot = catalog_slurm.node_offer(NODE, "lab", "spot", price, spot=True, day="")
    other = catalog_slurm.node_offer(NODE, "lab", "ondemand", firm, spot=False, day="")
    assert not isinstance(spot, catalog_slurm.Skipped)
    assert not isinstance(other, catalog_slurm.Skipped)
    found = list(catalog_slurm.with_on_demand([spot, other]))
    assert [entry.on_demand_usd_per_hour for entry in found] == [Decimal("5.98"), Decimal("5.98")]

"""AWS through moto's server: a spot request by SkyPilot, prices, terminators, interruptions, the end of what leaks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import pytest

from cost.ledger.leases import Lease
from orchestrator import cli
from orchestrator.backends.aws.account import AwsAccount, refusal_reason
from orchestrator.backends.aws.spot_market import Ec2Market, quota_code
from orchestrator.backends.aws.support import AwsInstances, AwsSupport, was_preempted
from orchestrator.backends.aws.time_limit import ROLE_NAME, Ec2Limit
from orchestrator.backends.base import BackendError
from orchestrator.backends.provider_account import ProviderRefused, RefusalReason
from orchestrator.backends.registry import every_backend
from orchestrator.backends.sky.task import label
from orchestrator.settings import Home
from orchestrator.upkeep.inventory import Outcome, Verdict, reconcile
from tests.orchestrator.upkeep.test_inventory import a_run, in_the_ledger
from tests.support.aws_cloud import ACCOUNT, LEASE, MACHINE, ZONE, AwsCloud, aws_cloud
from tests.support.backend_contract import OFFER, lease_of
from tests.support.moto_cloud import REGION

VCPUS = 96
P4_SPOT = "L-7212CCBC"
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def account() -> Iterator[AwsCloud]:
    with aws_cloud() as made:
        yield made


@pytest.fixture
def aws(account: AwsCloud) -> AwsCloud:
    account.clear()
    return account


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def a_lease(lease_id: str = LEASE, *, num_nodes: int = 1, spot: bool = True) -> Lease:
    offer = replace(OFFER, cloud="aws", region=REGION, zone=ZONE, instance_type=MACHINE, spot=spot)
    return replace(lease_of(lease_id, num_nodes=num_nodes), offer=offer)


def an_account(**options: Any) -> AwsAccount:
    return AwsAccount(sleep=lambda _: None, verify_tries=3, **options)


def record_of(*instance_ids: str) -> dict[str, Any]:
    """As the backend keeps it in the run store."""
    return {
        "region": REGION,
        "zone": ZONE,
        "instance_type": MACHINE,
        "instances": [[item, ""] for item in instance_ids],
    }


# -- a spot request by SkyPilot, found and ended ---------------------------------------------------------


def test_what_skypilot_requests_as_spot_is_found_priced_armed_and_ended(aws: AwsCloud, tmp_path: Path) -> None:
    ids = aws.rent(num_nodes=2, home=tmp_path)
    aws.prices[MACHINE, ZONE] = [(NOW - timedelta(days=2), "9.5"), (NOW - timedelta(hours=1), "11.25")]
    lease, support = a_lease(num_nodes=2), AwsSupport(an_account())
    found = support.instances({"region": REGION}, lease)
    assert {(entry.instance_id, entry.is_spot, entry.zone, entry.lease) for entry in found} == {
        (item, True, ZONE, LEASE) for item in ids
    }
    assert support.usd_per_hour({"region": REGION}, lease) == Decimal("11.25")
    support.limit(record_of(*ids), lease, 900.0)
    assert [support.limits.shutdown_behaviour(REGION, item) for item in ids] == ["terminate", "terminate"]
    ends = [support.limits.ends_at(REGION, item) for item in ids]
    assert all(end and abs((end - datetime.now(UTC)).total_seconds() - 900) < 30 for end in ends)
    AwsInstances(an_account()).stop(lease)
    assert aws.states(*ids) == ["terminated", "terminated"]
    assert [support.limits.ends_at(REGION, item) for item in ids] == [None, None]


# -- prices -------------------------------------------------------------------------------------------


def test_a_price_is_that_of_its_type_and_zone_now(aws: AwsCloud) -> None:
    aws.prices = {
        (MACHINE, ZONE): [(NOW - timedelta(days=9), "7.0"), (NOW - timedelta(days=1), "8.0")],
        (MACHINE, f"{REGION}b"): [(NOW, "1.0")],
        ("g5.xlarge", ZONE): [(NOW, "0.4")],
    }
    market = Ec2Market(an_account())
    assert market.spot_usd_per_hour(REGION, ZONE, MACHINE) == Decimal("8.0")
    assert market.spot_usd_per_hour(REGION, f"{REGION}c", MACHINE) is None


def test_a_price_that_cannot_be_read_confirms_nothing(aws: AwsCloud) -> None:
    seconds = [0.0]
    support = AwsSupport(an_account(), clock=lambda: seconds[0])
    assert support.usd_per_hour(record_of("i-1"), a_lease()) is None  # no history
    seconds[0] = 61.0
    aws.prices[MACHINE, ZONE] = [(NOW - timedelta(days=1), "8.0")]
    assert support.usd_per_hour(record_of("i-1"), a_lease()) == Decimal("8.0")
    aws.prices[MACHINE, ZONE] = [(NOW - timedelta(days=1), "9.0")]
    seconds[0] = 120.0
    assert support.usd_per_hour(record_of("i-1"), a_lease()) == Decimal("8.0")  # read less than a minute before
    seconds[0] = 122.0
    assert support.usd_per_hour(record_of("i-1"), a_lease()) == Decimal("9.0")
    assert support.usd_per_hour(record_of("i-1"), a_lease(spot=False)) is None


# -- terminators ------------------------------------------------------------------------------------------


def test_the_time_limit_is_one_schedule_that_is_moved_and_deletes_itself(aws: AwsCloud) -> None:
    (node,) = aws.start(tags={"slm-lease": LEASE})
    support = AwsSupport(an_account())
    scheduler = boto3.client("scheduler")
    for seconds in (600.0, 1800.0):
        support.limit(record_of(node), a_lease(), seconds)
        end = support.limits.ends_at(REGION, node)
        assert end is not None
        assert abs((end - datetime.now(UTC)).total_seconds() - seconds) < 30
    (only,) = scheduler.list_schedules()["Schedules"]
    made = scheduler.get_schedule(Name=only["Name"])
    assert made["Target"]["Arn"] == "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances"
    assert json.loads(made["Target"]["Input"]) == {"InstanceIds": [node]}
    assert made["Target"]["RoleArn"] == f"arn:aws:iam::{ACCOUNT}:role/{ROLE_NAME}"
    assert (made["FlexibleTimeWindow"], made["ScheduleExpressionTimezone"]) == ({"Mode": "OFF"}, "UTC")
    assert made["ActionAfterCompletion"] == "DELETE"
    support.release(record_of(node), a_lease())
    support.release(record_of(node), a_lease())  # quiet where there is none
    assert scheduler.list_schedules()["Schedules"] == []


def test_the_schedules_role_may_end_our_machines_and_nothing_else(aws: AwsCloud) -> None:
    assert Ec2Limit(an_account()).role_arn() == Ec2Limit(an_account()).role_arn()  # made once, found again
    iam = boto3.client("iam")
    trust = iam.get_role(RoleName=ROLE_NAME)["Role"]["AssumeRolePolicyDocument"]
    assert [item["Principal"] for item in trust["Statement"]] == [{"Service": "scheduler.amazonaws.com"}]
    (statement,) = iam.get_role_policy(RoleName=ROLE_NAME, PolicyName="end")["PolicyDocument"]["Statement"]
    assert statement["Action"] == "ec2:TerminateInstances"
    assert statement["Condition"] == {"StringLike": {"aws:ResourceTag/slm-lease": "slm-*"}}


def test_a_wrong_clock_of_this_machine_moves_no_time_limit(aws: AwsCloud) -> None:
    (node,) = aws.start(tags={"slm-lease": LEASE})
    account = an_account(clock=lambda: datetime.now(UTC) - timedelta(hours=3))
    support = AwsSupport(account)
    support.limit(record_of(node), a_lease(), 600.0)
    end = support.limits.ends_at(REGION, node)
    assert end is not None
    assert abs((end - datetime.now(UTC)).total_seconds() - 600.0) < 30


def test_an_instance_that_would_only_stop_is_told_until_it_would_end(aws: AwsCloud) -> None:
    (node,) = aws.start(tags={"slm-lease": LEASE})
    ec2 = boto3.client("ec2")
    limit = Ec2Limit(an_account())
    assert limit.shutdown_behaviour(REGION, node) == "stop"  # what SkyPilot's template leaves it at
    (found,) = an_account().describe(REGION, [node]).values()
    limit.terminate_on_shutdown(REGION, found)
    asked = ec2.describe_instance_attribute(InstanceId=node, Attribute="instanceInitiatedShutdownBehavior")
    assert asked["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"


def test_what_cannot_be_armed_is_refused_aloud(aws: AwsCloud) -> None:
    (node,) = aws.start(tags={"slm-lease": LEASE})
    with aws.cloud.verifying(), pytest.raises(BackendError, match="slm doctor --iam"):  # its key may only end
        AwsSupport(an_account()).limit(record_of(node), a_lease(), 600.0)


# -- how instances end ------------------------------------------------------------------------------------


def test_an_interruption_is_told_from_an_end_that_somebody_asked_for(aws: AwsCloud) -> None:
    taken, ended, lives = aws.start(tags={"slm-lease": LEASE}, num_nodes=3)
    aws.interrupt(taken)
    boto3.client("ec2").terminate_instances(InstanceIds=[ended])
    support, record = AwsSupport(an_account()), record_of(taken, ended, lives)
    told = support.why_gone(record, a_lease(num_nodes=3))
    assert f"{taken} was preempted by AWS (Server.SpotInstanceTermination)" in told
    assert f"{ended} was terminated (Client.UserInitiatedShutdown)" in told
    assert lives not in told
    assert {instance.instance_id for instance in support.instances(record, a_lease()) if was_preempted(instance)} == {
        taken
    }


def test_ending_waits_for_aws_to_say_so_and_is_quiet_where_nothing_is(aws: AwsCloud) -> None:
    ids = aws.start(tags={"slm-lease": LEASE}, num_nodes=2)
    account = an_account()
    assert account.terminate(REGION, [*ids, "i-0123456789abcdef0"]) == []
    assert aws.states(*ids) == ["terminated", "terminated"]
    assert account.terminate(REGION, ids) == []
    assert account.terminate(REGION, []) == []


def test_an_instance_that_does_not_end_is_told(aws: AwsCloud) -> None:
    (node,) = aws.start(tags={"slm-lease": LEASE})
    boto3.client("ec2").modify_instance_attribute(InstanceId=node, DisableApiTermination={"Value": True})
    with pytest.raises(BackendError, match=node):
        AwsInstances(an_account()).stop(a_lease())
    assert aws.states(node) == ["running"]


# -- quota, which is not capacity -------------------------------------------------------------------------


def test_a_quota_of_zero_is_said_with_its_numbers_before_anything_is_asked_for(aws: AwsCloud) -> None:
    aws.quotas[P4_SPOT] = 0.0
    said = AwsSupport(an_account()).refusal(a_lease(num_nodes=2))
    assert said is not None
    assert f"2 x {MACHINE} need {2 * VCPUS} spot vCPUs, and this account's quota {P4_SPOT} is 0;" in said
    assert "Service Quotas" in said


def test_what_runs_already_counts_against_the_quota(aws: AwsCloud, tmp_path: Path) -> None:
    aws.quotas[P4_SPOT] = 2.0 * VCPUS
    support = AwsSupport(an_account())
    assert support.refusal(a_lease(num_nodes=2)) is None
    aws.rent("slm-abcdef-other-1-1", home=tmp_path)  # spot
    aws.start(tags={"Name": "web"})  # on-demand: another quota
    said = support.refusal(a_lease(num_nodes=2))
    assert said is not None
    assert f"is {2 * VCPUS}, of which {VCPUS} are in use" in said
    assert support.refusal(a_lease(num_nodes=1)) is None


def test_a_quota_that_is_not_to_be_known_refuses_nothing(aws: AwsCloud) -> None:
    assert AwsSupport(an_account()).refusal(a_lease()) is None
    with aws.cloud.verifying():
        assert AwsSupport(an_account()).refusal(a_lease()) is None


@pytest.mark.parametrize(
    ("machine", "spot", "code"),
    [
        ("p4d.24xlarge", True, "L-7212CCBC"),
        ("p5.48xlarge", True, "L-C4BD4855"),
        ("p5.48xlarge", False, "L-417A185B"),
        ("g6e.12xlarge", True, "L-3819A6DF"),
        ("m6i.large", False, "L-1216C47A"),
        ("p9.large", True, None),
        ("trn1.2xlarge", True, None),
    ],
)
def test_each_machine_counts_against_its_own_quota(machine: str, spot: bool, code: str | None) -> None:
    assert quota_code(machine, spot=spot) == code


def test_capacity_quota_credentials_and_an_old_token_are_told_apart() -> None:
    from botocore.exceptions import ClientError

    told = {
        "InsufficientInstanceCapacity": RefusalReason.CAPACITY,
        "MaxSpotInstanceCountExceeded": RefusalReason.QUOTA,
        "VcpuLimitExceeded": RefusalReason.QUOTA,
        "AuthFailure": RefusalReason.CREDENTIALS,
        "RequestExpired": RefusalReason.EXPIRED,
        "UnauthorizedOperation": RefusalReason.DENIED,
    }
    for code, reason in told.items():
        assert refusal_reason(ClientError({"Error": {"Code": code}}, "RunInstances")) == (reason, code)


# -- everything that is ours, anywhere --------------------------------------------------------------------


def test_reconcile_ends_a_leaked_machine_in_any_region_and_leaves_a_foreign_one(
    aws: AwsCloud, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = f"slm-{home.owner_id()}-lost-1-1"
    leaked = aws.start(tags={"slm-lease": mine}, region="us-west-2", num_nodes=2)
    web = aws.start(tags={"Name": "web-server"}, region="us-west-2")
    theirs = aws.start(tags={"slm-lease": "slm-ffffff-demo-1-1"})
    monkeypatch.setenv("SLM_HOME", str(home.root))
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    leak = next(load for load in json.loads(capsys.readouterr().out)["findings"] if mine in load["detail"])
    assert (leak["level"], leak["fix"]) == ("fail", "slm reconcile")
    cli_ends_with(0, "reconcile", "--json")
    printed = json.loads(capsys.readouterr().out)
    outcomes = {item["name"]: (item["verdict"], item["result"], item["num_nodes"]) for item in printed["clusters"]}
    assert outcomes == {mine: ("unknown", "ended", 2), "slm-ffffff-demo-1-1": ("foreign", "kept", 1)}
    assert aws.states(*leaked, *web, region="us-west-2") == ["terminated", "terminated", "running"]
    assert aws.states(*theirs) == ["running"]


def test_stop_all_ends_a_leaked_machine(aws: AwsCloud, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked = aws.start(tags={"slm-lease": f"slm-{home.owner_id()}-lost-1-1"})
    monkeypatch.setenv("SLM_HOME", str(home.root))
    cli_ends_with(0, "stop", "--all")
    assert aws.states(*leaked) == ["terminated"]


def cli_ends_with(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert (ended.value.code or 0) == code


def test_a_lease_is_known_by_its_label_which_is_not_its_whole_name(aws: AwsCloud, home: Home) -> None:
    run_id = a_run(home)
    lease_id = f"slm-{home.owner_id()}-{run_id}.5B-1"
    in_the_ledger(home, run_id, lease_id)
    living = aws.start(tags={"slm-lease": label(lease_id)})
    account = AwsInstances(an_account(), known_leases=lambda: [lease_id])
    found = reconcile(home, [account], now_ms=lambda *_: 0)
    assert [(cluster.name, cluster.verdict, cluster.outcome) for cluster in found.clusters] == [
        (lease_id, Verdict.PAID, Outcome.KEPT)
    ]
    assert aws.states(*living) == ["running"]


def test_a_machine_that_two_lists_show_is_counted_once(aws: AwsCloud, home: Home) -> None:
    aws.start(tags={"slm-lease": f"slm-{home.owner_id()}-lost-1-1"})
    found = reconcile(home, [AwsInstances(an_account()), AwsInstances(an_account())], dry_run=True)
    assert [cluster.num_nodes for cluster in found.clusters] == [1]


def test_without_credentials_nobody_asks_aws(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert [item.name for item in every_backend(home)] == []


def test_a_key_for_another_service_is_no_problem_until_something_was_rented(aws: AwsCloud, home: Home) -> None:
    with aws.cloud.verifying():
        assert AwsInstances(an_account(), is_expected=lambda: False).list_alive() == []
        with pytest.raises(ProviderRefused, match="slm doctor --iam"):
            AwsInstances(an_account()).list_alive()


def test_boto3_is_imported_only_to_ask() -> None:
    import subprocess

    code = "import sys, orchestrator.backends.registry; sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

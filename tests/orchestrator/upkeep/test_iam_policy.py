"""`slm doctor --iam`: every call of ours, and every call of SkyPilot's, is made under the policy that it prints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from orchestrator import cli
from orchestrator.backends.aws.account import AwsAccount
from orchestrator.backends.aws.support import AwsInstances, AwsSupport
from orchestrator.upkeep.iam_policy import policy
from tasks.stores.opening import open_store, probe
from tasks.stores.s3 import S3Store
from tests.orchestrator.backends.aws.test_support import a_lease, record_of
from tests.support.aws_cloud import MACHINE, ZONE, AwsCloud, allow, aws_cloud
from tests.support.moto_cloud import BUCKET, REGION

URI = f"s3://{BUCKET}/runs"
S3_ACTIONS = {
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}
"""Calls whose permission has another name (docs.aws.amazon.com AmazonS3 using-with-s3-policy-actions)."""
PREFIXES = {"service-quotas": "servicequotas"}


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsCloud]:
    with aws_cloud() as made:
        yield made


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--iam", *arguments])
    assert not ended.value.code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def actions_of(document: dict[str, Any]) -> set[str]:
    return {action for item in document["Statement"] for action in item["Action"]}


def is_allowed(action: str, document: dict[str, Any]) -> bool:
    return any(re.fullmatch(item.replace("*", ".*"), action) for item in actions_of(document))


def recorded(session: Any) -> set[str]:
    """Permissions of every call that clients of this session make from now on."""
    made: set[str] = set()

    def note(event_name: str, **_: Any) -> None:
        _, service, operation = event_name.split(".")
        made.add(S3_ACTIONS.get(operation, f"{PREFIXES.get(service, service)}:{operation}"))

    session.events.register("before-call.*.*", note)
    return made


def everything_that_we_ask(account: AwsAccount) -> None:
    """Look, price, quota, arm, move, read back, tell, release, end."""
    (node,) = (instance.instance_id for instance in account.instances())
    support, lease, record = AwsSupport(account), a_lease(), record_of(node)
    assert support.usd_per_hour(record, lease) is not None
    assert support.refusal(lease) is None
    support.limit(record, lease, 600.0)
    support.limit(record, lease, 900.0)
    assert support.why_gone(record, lease) == ""
    assert len(AwsInstances(account).list_alive()) == 1
    AwsInstances(account).stop(lease)
    support.release(record, lease)


def test_each_call_of_ours_has_its_permission(aws: AwsCloud, capsys: pytest.CaptureFixture[str]) -> None:
    aws.start(tags={"slm-lease": a_lease().lease_id})
    aws.prices[MACHINE, ZONE] = [(datetime(2026, 1, 1, tzinfo=UTC), "9.5")]
    aws.quotas["L-7212CCBC"] = 960.0
    session = boto3.session.Session()
    calls = recorded(session)
    account = AwsAccount(session)
    everything_that_we_ask(account)
    # Not below, where signatures are recomputed: the server does not for this call.
    assert AwsSupport(account).limits.ends_at(REGION, "i-none") is None
    assert {"ec2:TerminateInstances", "scheduler:UpdateSchedule", "servicequotas:GetServiceQuota"} <= calls
    document = printed(capsys, "--store", URI)
    assert not [call for call in calls if not is_allowed(call, document)]


def test_the_run_store_and_both_ways_to_rent_work_under_it(
    aws: AwsCloud, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.clear()
    aws.prices[MACHINE, ZONE] = [(datetime(2026, 1, 1, tzinfo=UTC), "9.5")]
    aws.quotas["L-7212CCBC"] = 960.0
    key = allow(aws.cloud, printed(capsys, "--store", URI))
    for name, value in key.items():
        monkeypatch.setenv(name, value)
    with aws.cloud.verifying():
        aws.rent(a_lease().lease_id, home=tmp_path)  # SkyPilot itself: security groups, tags, a spot request
        everything_that_we_ask(AwsAccount())
        store = open_store(URI)
        assert isinstance(store, S3Store)
        assert [item.detail for item in probe(store) if not item.ok] == []
        store.write("large", os.urandom(20 * 2**20))  # in parts


def test_objects_are_limited_to_the_prefix_and_machines_to_our_label() -> None:
    by_name = {item["Sid"]: item for item in policy("s3://my-bucket/some/prefix/")["Statement"]}
    assert by_name["RunStore"]["Resource"] == "arn:aws:s3:::my-bucket/some/prefix/*"
    assert policy("s3://my-bucket")["Statement"][0]["Resource"] == "arn:aws:s3:::my-bucket/*"
    ours = {"StringLike": {"aws:ResourceTag/slm-lease": "slm-*"}}
    for item in policy(None)["Statement"]:
        if "ec2:TerminateInstances" in item["Action"]:
            assert item["Condition"] == ours
        if "ec2:RunInstances" in item["Action"] and "instance/*" in item["Resource"]:
            assert item["Condition"] == {"StringLike": {"aws:RequestTag/slm-lease": "slm-*"}}
        if "iam:PassRole" in item["Action"]:
            assert item["Resource"] != "*"
            assert "iam:PassedToService" in item["Condition"]["StringEquals"]
    assert by_name["TimeLimit"]["Resource"].endswith(":schedule/default/slm-end-*")


def test_without_a_store_it_is_about_machines_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [item for item in actions_of(printed(capsys)) if item.startswith("s3:")]


def test_a_folder_has_no_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--iam", "--store", "/mnt/runs"])
    assert ended.value.code == 2
    assert "--store s3://bucket/runs" in capsys.readouterr().err

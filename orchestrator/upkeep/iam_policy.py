"""The least that an AWS user needs for us: its run store under one prefix, and machines that carry our label.

Made of statements that name what they are for. What SkyPilot itself calls is from its own list of minimal permissions
(docs.skypilot.co cloud-setup/cloud-permissions/aws); a test rents with both under this policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from cost.errors import UserError
from orchestrator.backends.aws.time_limit import ROLE_NAME, SCHEDULE_PREFIX

AS_OURS = {"StringLike": {"aws:RequestTag/slm-lease": "slm-*"}}
OURS = {"StringLike": {"aws:ResourceTag/slm-lease": "slm-*"}}
LOOK = (
    "ec2:DescribeInstanceAttribute",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeInstances",
    "ec2:DescribeRegions",
    "ec2:DescribeSpotPriceHistory",
    "servicequotas:GetServiceQuota",
)
END = ("ec2:ModifyInstanceAttribute", "ec2:TerminateInstances")
SCHEDULE = (
    "scheduler:CreateSchedule",
    "scheduler:DeleteSchedule",
    "scheduler:GetSchedule",
    "scheduler:UpdateSchedule",
)
CREATED_WITH = (
    "image",
    "key-pair",
    "network-interface",
    "security-group",
    "spot-instances-request",
    "subnet",
    "volume",
)
"""What a machine is made of, beside itself."""
SKY_NETWORK = ("ec2:AuthorizeSecurityGroupIngress", "ec2:CreateSecurityGroup", "ec2:DeleteSecurityGroup")
SKY_ROLE = "skypilot-v1"


def policy(store_uri: str | None) -> dict[str, Any]:
    """For one user, and one run store where it is on S3.

    Raises:
        UserError: The store is no S3 URI.
    """
    statements = [*(store_statements(store_uri) if store_uri is not None else ()), *machine_statements()]
    return {"Version": "2012-10-17", "Statement": statements}


def store_statements(uri: str) -> list[dict[str, Any]]:
    """What `tasks.stores.s3` does, below the prefix alone.

    ListBucket is not limited to the prefix: without it S3 answers 403 instead of 404 for a key that is not there, and a
    limit by prefix takes that away too. It shows names, not contents.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(
            f"--iam prints a policy for a store on S3, not for {uri}; for example: --store s3://bucket/runs"
        )
    bucket = f"arn:aws:s3:::{parts.netloc}"
    prefix = parts.path.strip("/")
    return [
        allow(
            "RunStore",
            ("s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"),
            f"{bucket}/{prefix}/*" if prefix else f"{bucket}/*",
        ),
        allow("RunStoreNames", ("s3:ListBucket", "s3:ListBucketMultipartUploads"), bucket),
    ]


def machine_statements() -> list[dict[str, Any]]:
    """What is ours to look at, to limit and to end; then what SkyPilot needs to create it."""
    role = f"arn:aws:iam::*:role/{ROLE_NAME}"
    instances = "arn:aws:ec2:*:*:instance/*"
    at_create = {"StringEquals": {"ec2:CreateAction": ["CreateSecurityGroup", "RunInstances"]}}
    sky_role = f"arn:aws:iam::*:role/{SKY_ROLE}"
    to_scheduler = {"StringEquals": {"iam:PassedToService": "scheduler.amazonaws.com"}}
    to_ec2 = {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    to_spot = {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}
    return [
        allow("Look", LOOK, "*"),
        allow("EndOurs", END, instances, OURS),
        allow("TimeLimit", SCHEDULE, f"arn:aws:scheduler:*:*:schedule/default/{SCHEDULE_PREFIX}*"),
        allow("TimeLimitRole", ("iam:CreateRole", "iam:GetRole", "iam:PutRolePolicy"), role),
        allow("TimeLimitPass", ("iam:PassRole",), role, to_scheduler),
        allow("SkyPilotLook", ("ec2:Describe*",), "*"),
        allow("SkyPilotCreate", ("ec2:RunInstances",), instances, AS_OURS),
        allow(
            "SkyPilotCreateWith", ("ec2:RunInstances",), [f"arn:aws:ec2:*:*:{resource}/*" for resource in CREATED_WITH]
        ),
        allow("SkyPilotTagNew", ("ec2:CreateTags",), "arn:aws:ec2:*:*:*", at_create),
        allow("SkyPilotTagOurs", ("ec2:CreateTags",), instances, OURS),
        allow("SkyPilotNetwork", SKY_NETWORK, "arn:aws:ec2:*:*:*"),
        allow("SkyPilotGroups", ("ec2:ModifyInstanceAttribute",), "arn:aws:ec2:*:*:security-group/*"),
        allow("SkyPilotRole", ("iam:AttachRolePolicy", "iam:CreateRole", "iam:GetRole"), sky_role),
        allow("SkyPilotPass", ("iam:PassRole",), sky_role, to_ec2),
        allow(
            "SkyPilotProfile",
            ("iam:AddRoleToInstanceProfile", "iam:CreateInstanceProfile", "iam:GetInstanceProfile"),
            f"arn:aws:iam::*:instance-profile/{SKY_ROLE}",
        ),
        allow("SpotItself", ("iam:CreateServiceLinkedRole",), "*", to_spot),
    ]


def allow(
    sid: str, actions: Sequence[str], resource: str | list[str], condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One statement; the Sid says what for."""
    statement: dict[str, Any] = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}
    return {**statement, "Condition": condition} if condition is not None else statement

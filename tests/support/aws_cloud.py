"""An AWS account on this machine for our own calls and SkyPilot's: moto's server, and what its provider side is told.

boto3 and SkyPilot are as they come. Prices, quotas and interruptions are set at the server, which knows none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import moto.server  # noqa: F401 - loads the server's parts before they are told anything
from moto.ec2.models import ec2_backends
from moto.ec2.responses.spot_instances import SpotInstances
from moto.scheduler.models import scheduler_backends
from moto.servicequotas.models import ServiceQuotasBackend

from tests.support.moto_cloud import REGION, Cloud, moto_cloud

ACCOUNT = "123456789012"
ZONE = f"{REGION}a"
MACHINE = "p4d.24xlarge"
LEASE = "slm-abcdef-demo-1-1"
RENT = """
import sys
from sky.provision import common
from sky.provision.aws import config, instance

region, zone, machine, name, count, lease, image, profile, spot = sys.argv[1:]
node = {"InstanceType": machine, "ImageId": image, "IamInstanceProfile": {"Arn": profile}}
node["TagSpecifications"] = [{"ResourceType": "instance", "Tags": [{"Key": "slm-lease", "Value": lease}]}]
if spot == "spot":
    node["InstanceMarketOptions"] = {"MarketType": "spot"}
place = {"region": region, "availability_zone": zone, "use_internal_ips": False, "security_group": {"GroupName": "sg"}}
asked = common.ProvisionConfig(provider_config=place, authentication_config={}, docker_config={}, node_config=node,
    count=int(count), tags={}, resume_stopped_nodes=False, ports_to_open_on_launch=None)
print(*instance.run_instances(region, name, name, config.bootstrap_instances(region, name, asked)).created_instance_ids)
"""
"""SkyPilot's own way from a node's settings (as templates/aws-ray.yml.j2 makes them) to instances."""


@dataclass
class AwsCloud:
    """`prices`: (type, zone) to changes of the spot price, oldest first; `quotas`: code to vCPUs."""

    cloud: Cloud
    image: str
    profile_arn: str
    prices: dict[tuple[str, str], list[tuple[datetime, str]]] = field(default_factory=dict)
    quotas: dict[str, float] = field(default_factory=dict)

    def session(self) -> Any:
        """Of boto3, as the environment makes it."""
        return boto3.session.Session()

    def rent(self, lease: str = LEASE, *, num_nodes: int = 1, spot: bool = True, home: Path) -> list[str]:
        """Instances of one cluster, created by SkyPilot."""
        name = f"{lease}-fcd1e5cf"
        words = (REGION, ZONE, MACHINE, name, num_nodes, lease, self.image, self.profile_arn)
        done = subprocess.run(
            [sys.executable, "-c", RENT, *map(str, words), "spot" if spot else "on-demand"],
            env={**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[-1].split()

    def start(self, *, tags: dict[str, str], region: str = REGION, num_nodes: int = 1, machine: str = MACHINE) -> Any:
        """Instances that somebody started by hand."""
        ec2 = boto3.client("ec2", region_name=region)
        image = ec2.describe_images()["Images"][0]["ImageId"]
        kinds = [{"ResourceType": "instance", "Tags": [{"Key": tag, "Value": tags[tag]} for tag in tags]}]
        made = ec2.run_instances(
            ImageId=image, InstanceType=machine, MinCount=num_nodes, MaxCount=num_nodes, TagSpecifications=kinds
        )
        return [item["InstanceId"] for item in made["Instances"]]

    def states(self, *instance_ids: str, region: str = REGION) -> list[str]:
        seen = boto3.client("ec2", region_name=region).describe_instances(InstanceIds=list(instance_ids))
        found = {
            item["InstanceId"]: item["State"]["Name"] for each in seen["Reservations"] for item in each["Instances"]
        }
        return [found[item] for item in instance_ids]

    def clear(self) -> None:
        """As before anything was started."""
        self.prices.clear()
        self.quotas.clear()
        for backend in ec2_backends[ACCOUNT].values():
            backend.reservations.clear()
        for scheduler in scheduler_backends[ACCOUNT].values():
            scheduler.schedule_groups["default"].schedules.clear()

    def interrupt(self, instance_id: str) -> None:
        """As AWS does when it takes a spot machine back."""
        instance = ec2_backends[ACCOUNT][REGION].get_instance(instance_id)
        instance.terminate()
        instance.state_reason.code = "Server.SpotInstanceTermination"
        instance.state_reason.message = "Server.SpotInstanceTermination: Spot instance termination"


@contextmanager
def aws_cloud() -> Iterator[AwsCloud]:
    """With the default VPC reachable from outside, as AWS makes it; its address and key are in the environment."""
    with moto_cloud() as cloud:
        before = dict(os.environ)
        os.environ.update({**cloud.environment(), "AWS_DEFAULT_REGION": REGION})
        os.environ.pop("AWS_REGION", None)
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        profile = iam.create_instance_profile(InstanceProfileName="skypilot-v1")["InstanceProfile"]["Arn"]
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        table = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"][0]
        ec2.create_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
        made = AwsCloud(cloud, ec2.describe_images()["Images"][0]["ImageId"], profile)
        with told(made):
            try:
                yield made
            finally:
                os.environ.clear()
                os.environ.update(before)


@contextmanager
def told(made: AwsCloud) -> Iterator[None]:
    """The server answers with `made.prices` and `made.quotas`, as AWS does: a start that is now gives the newest."""

    def history(response: Any) -> Any:
        from moto.core.responses import ActionResult

        kinds, filters = response._get_param("InstanceTypes", []), response._get_param("AvailabilityZone")
        since = datetime.fromisoformat(str(response._get_param("StartTime")).replace("Z", "+00:00")).replace(tzinfo=UTC)
        found = []
        for (kind, zone), changes in made.prices.items():
            if kind not in kinds or (filters and zone != filters):
                continue
            before = [change for change in changes if change[0] <= since][-1:]
            for at, price in before + [change for change in changes if change[0] > since]:
                found.append(
                    {
                        "InstanceType": kind,
                        "ProductDescription": "Linux/UNIX",
                        "SpotPrice": price,
                        "AvailabilityZone": zone,
                        "Timestamp": at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
                    }
                )
        return ActionResult({"SpotPriceHistory": found})

    def quota(backend: Any, service_code: str, quota_code: str) -> dict[str, Any]:
        if quota_code not in made.quotas:
            return unknown(backend, service_code, quota_code)
        return {"ServiceCode": service_code, "QuotaCode": quota_code, "Value": made.quotas[quota_code]}

    empty, unknown = SpotInstances.describe_spot_price_history, ServiceQuotasBackend.get_service_quota
    SpotInstances.describe_spot_price_history = history  # type: ignore[method-assign]
    ServiceQuotasBackend.get_service_quota = quota  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpotInstances.describe_spot_price_history = empty  # type: ignore[method-assign]
        ServiceQuotasBackend.get_service_quota = unknown  # type: ignore[method-assign]


def allow(cloud: Cloud, document: dict[str, Any]) -> dict[str, str]:
    """A new user with the actions of a policy; its key as environment variables.

    The server knows which actions a key may use, but for most services neither on what nor under which condition.
    """
    statements = [{"Effect": "Allow", "Action": item["Action"], "Resource": "*"} for item in document["Statement"]]
    iam = cloud.client("iam")
    iam.create_user(UserName="least")
    wide = json.dumps({"Version": document["Version"], "Statement": statements})
    iam.put_user_policy(UserName="least", PolicyName="least", PolicyDocument=wide)
    key = iam.create_access_key(UserName="least")["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

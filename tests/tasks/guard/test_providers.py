"""Terminators of the providers: requests as their references document them, and what a check finds out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tasks.guard.providers import GCP_API, container_variable, ec2_terminate, gcp_delete
from tasks.guard.signing import Credentials
from tasks.guard.terminator import Terminator
from tasks.guard.terminators import unarmed
from tests.support.guarded import (
    terminator_named,
)
from tests.support.moto_cloud import REGION, Cloud, moto_cloud
from tests.support.small_server import Route, aws_metadata, azure_metadata, gcp_metadata, small_server


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with moto_cloud() as made:
        yield made


def fire(terminator: Terminator) -> str:
    assert terminator.fire is not None
    return terminator.fire()


def test_terminate_ec2_ends_its_own_instance_with_the_role_of_the_instance(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ec2 = cloud.client("ec2")
    image = ec2.describe_images()["Images"][0]["ImageId"]
    started = ec2.run_instances(ImageId=image, MinCount=2, MaxCount=2)["Instances"]
    mine, other = (instance["InstanceId"] for instance in started)
    role = {"AccessKeyId": cloud.access_key, "SecretAccessKey": cloud.secret_key, "Token": ""}
    folder = "meta-data/iam/security-credentials/"
    routes = aws_metadata(
        {
            "meta-data/instance-id": mine,
            "meta-data/placement/region": REGION,
            folder: "slm-node",
            f"{folder}slm-node": lambda _: (200, json.dumps(role)),
        }
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with small_server(routes) as server:
        ec2_terminator = terminator_named(f"terminate-ec2:{cloud.url}", "--metadata-base", server.url)
        with cloud.verifying():  # moto recomputes the signature and asks for the policy
            assert unarmed([ec2_terminator]) == {}
        assert states(cloud, mine, other) == ["running", "running"]  # the check was a dry run
        with cloud.verifying():
            assert fire(ec2_terminator) == "HTTP 200"
        assert states(cloud, mine, other) == ["terminated", "running"]
        role["SecretAccessKey"] = "wrong"
        with cloud.verifying():
            assert "AuthFailure" in unarmed([ec2_terminator])["terminate-ec2"]


def states(cloud: Cloud, *instances: str) -> list[str]:
    listed = cloud.client("ec2").describe_instances(InstanceIds=list(instances))["Reservations"]
    found = {each["InstanceId"]: each["State"]["Name"] for item in listed for each in item["Instances"]}
    return [found[name] for name in instances]


def test_the_ec2_request_is_the_one_that_boto3_sends(cloud: Cloud) -> None:
    sent: list[Any] = []
    client = cloud.client("ec2")
    client.meta.events.register("before-send.ec2.TerminateInstances", lambda request, **_: sent.append(request))
    image = client.describe_images()["Images"][0]["ImageId"]
    instance_id = client.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    client.terminate_instances(InstanceIds=[instance_id])
    ours = ec2_terminate(Credentials("A", "B"), REGION, instance_id, time.time())
    assert ours.url == f"https://ec2.{REGION}.amazonaws.com/"
    theirs = sent[0].body if isinstance(sent[0].body, str) else sent[0].body.decode()
    assert parse_qs(ours.body.decode()) == parse_qs(theirs)
    assert (ours.method, ours.headers["content-type"]) == (sent[0].method, sent[0].headers["Content-Type"].decode())


GCP_PLACE = "projects/my-project/zones/us-east1-b/instances/node-0"
GCP: dict[str, Route] = {
    "project/project-id": "my-project",
    "instance/zone": "projects/1234567890/zones/us-east1-b",
    "instance/name": "node-0",
    "instance/service-accounts/default/token": {"access_token": "ya29.t", "expires_in": 3599, "token_type": "Bearer"},
}


def test_terminate_gcp_deletes_its_own_instance_and_knows_before_whether_it_may() -> None:
    permission = f"POST /compute/v1/{GCP_PLACE}/testIamPermissions"
    routes: dict[str, Route] = {
        **gcp_metadata(GCP),
        permission: {"permissions": ["compute.instances.delete"]},
        f"DELETE /compute/v1/{GCP_PLACE}": {"kind": "compute#operation", "status": "RUNNING"},
    }
    with small_server(routes) as server:
        gcp = terminator_named(f"terminate-gcp:{server.url}/compute/v1", "--metadata-base", server.url)
        assert unarmed([gcp]) == {}
        asked = server.asked[-1]
        assert json.loads(asked.body) == {"permissions": ["compute.instances.delete"]}
        assert not server.seen("DELETE", f"/compute/v1/{GCP_PLACE}")
        assert fire(gcp) == "HTTP 200"
        assert server.asked[-1].headers["authorization"] == "Bearer ya29.t"
        routes[permission] = {}
        assert "may not delete" in unarmed([gcp])["terminate-gcp"]
        del routes[f"DELETE /compute/v1/{GCP_PLACE}"]
        with pytest.raises(OSError, match="HTTP 404"):
            fire(gcp)
    assert gcp_delete(GCP_API, GCP_PLACE, "t").url == (
        "https://compute.googleapis.com/compute/v1/projects/my-project/zones/us-east1-b/instances/node-0"
    )


def test_terminate_azure_deletes_the_machine_rather_than_stopping_it() -> None:
    resource = "/subscriptions/s-1/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/node-0"
    routes: dict[str, Route] = {
        **azure_metadata(
            {
                "instance": lambda _: (200, json.dumps({"compute": {"resourceId": resource, "name": "node-0"}})),
                "identity/oauth2/token": lambda _: (200, json.dumps({"access_token": "eyJ0", "token_type": "Bearer"})),
            }
        ),
        f"DELETE {resource}": (202, ""),
    }
    with small_server(routes) as server:
        azure = terminator_named(f"terminate-azure:{server.url}", "--metadata-base", server.url)
        assert unarmed([azure]) == {}
        assert not server.seen("DELETE", resource)
        assert fire(azure) == "HTTP 202"
        deleted, token = server.asked[-1], server.seen("GET", "/metadata/identity/oauth2/token")[0]
    assert deleted.headers["authorization"] == "Bearer eyJ0"
    assert deleted.query == {"api-version": ["2024-07-01"], "forceDeletion": ["true"]}
    assert token.query == {"api-version": ["2018-02-01"], "resource": ["https://management.azure.com/"]}


def test_runpod_terminates_its_own_pod_and_reads_errors_out_of_a_good_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "abc123")
    monkeypatch.setenv("RUNPOD_API_KEY", "rp-key")
    with small_server({"POST /graphql": {"data": {"pod": {"id": "abc123"}}}}) as server:
        runpod = terminator_named(f"runpod:{server.url}/graphql")
        assert unarmed([runpod]) == {}
        assert "podTerminate" not in json.loads(server.asked[-1].body)["query"]
        server.routes["POST /graphql"] = {"data": {"pod": None}}
        assert unarmed([runpod]) == {"runpod": "RUNPOD_API_KEY does not see this pod"}
        server.routes["POST /graphql"] = {"data": {"podTerminate": None}}
        assert fire(runpod) == 'answered {"podTerminate": null}'
        sent = server.asked[-1]
        server.routes["POST /graphql"] = {"errors": [{"message": "not allowed"}]}
        with pytest.raises(OSError, match="not allowed"):
            fire(runpod)
    query = json.loads(sent.body)
    assert query["query"].split("{", 1)[1].strip().startswith("podTerminate(input: $input)")
    assert query["variables"] == {"input": {"podId": "abc123"}}
    assert sent.headers["authorization"] == "Bearer rp-key"
    assert "rp-key" not in sent.path + str(sent.query)  # keys in URLs end up in logs


def test_vast_destroys_its_own_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_ID", "4242")
    monkeypatch.setenv("CONTAINER_API_KEY", "v-key")
    place = "/api/v0/instances/4242/"
    with small_server({f"DELETE {place}": {"success": True}, f"GET {place}": {"instances": {}}}) as server:
        vast = terminator_named(f"vast:{server.url}/api/v0")
        assert unarmed([vast]) == {}
        assert not server.seen("DELETE", place)
        assert fire(vast) == "HTTP 200"
    assert server.asked[-1].headers["authorization"] == "Bearer v-key"


@pytest.mark.parametrize(("name", "variable"), [("runpod", "RUNPOD_POD_ID"), ("vast", "CONTAINER_ID")])
def test_outside_of_its_cloud_a_terminator_is_not_armed(
    name: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert unarmed([terminator_named(name)]) == {name: f"{variable} is not in the environment of this container"}


def test_what_ssh_does_not_inherit_is_read_from_the_first_process(tmp_path: Path) -> None:
    environ = tmp_path / "environ"
    environ.write_bytes(b"PATH=/bin\0SLM_TEST_POD=a=b\0")
    assert container_variable("SLM_TEST_POD", str(environ)) == "a=b"

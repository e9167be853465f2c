"""Terminators of the providers: each asks its provider's API to end the node that it runs on.

The functions that build a request are pure and cite the provider's reference; each check asks without ending anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, Dict, Tuple
from urllib.parse import quote, urlencode

from .credentials import Aws, Metadata
from .http import Reply, Request, call
from .signing import Credentials, signed
from .terminator import PROVIDER, Terminator

GCP_API = "https://compute.googleapis.com/compute/v1"
AZURE_API = "https://management.azure.com"
RUNPOD_API = "https://api.runpod.io/graphql"
VAST_API = "https://console.vast.ai/api/v0"


def ec2_terminate(
    credentials: Credentials, region: str, instance_id: str, now: float, endpoint: str = "", dry_run: bool = False
) -> Request:
    """TerminateInstances (EC2 API Reference, 2016-11-15). A dry run always fails: with DryRunOperation if allowed."""
    fields = {"Action": "TerminateInstances", "InstanceId.1": instance_id, "Version": "2016-11-15"}
    if dry_run:
        fields["DryRun"] = "true"
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    url = (endpoint or f"https://ec2.{region}.{domain}").rstrip("/") + "/"
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
    return signed(Request("POST", url, headers, urlencode(fields).encode()), credentials, region, "ec2", now)


def ec2_terminator(aws: Aws, endpoint: str) -> Terminator:
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_EC2", "")

    def request(dry_run: bool) -> Request:
        instance_id = aws.metadata.aws_text("meta-data/instance-id")
        return ec2_terminate(aws.credentials(), aws.region(), instance_id, time.time(), endpoint, dry_run)

    def check() -> None:
        reply = call(request(dry_run=True))
        if b"DryRunOperation" not in reply.body:
            reply.checked()

    return Terminator("terminate-ec2", PROVIDER, lambda: _checked_status(call(request(dry_run=False))), check)


def gcp_delete(api: str, place: str, token: str) -> Request:
    """instances.delete (Compute Engine API v1); `place` is projects/P/zones/Z/instances/N."""
    return Request("DELETE", f"{api}/{place}", {"Authorization": f"Bearer {token}"})


def gcp_may_delete(api: str, place: str, token: str) -> Request:
    """instances.testIamPermissions: which of the named permissions the caller has."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    body = json.dumps({"permissions": ["compute.instances.delete"]}).encode()
    return Request("POST", f"{api}/{place}/testIamPermissions", headers, body)


def gcp_terminator(metadata: Metadata, api: str) -> Terminator:
    def place_and_token() -> Tuple[str, str]:
        project, zone = metadata.gcp_text("project/project-id"), metadata.gcp_text("instance/zone").rpartition("/")[2]
        token = json.loads(metadata.gcp_text("instance/service-accounts/default/token"))["access_token"]
        return f"projects/{project}/zones/{zone}/instances/{metadata.gcp_text('instance/name')}", token

    def check() -> None:
        if not call(gcp_may_delete(api, *place_and_token())).json().get("permissions"):
            raise OSError("the node's service account may not delete it (compute.instances.delete)")

    return Terminator(
        "terminate-gcp", PROVIDER, lambda: _checked_status(call(gcp_delete(api, *place_and_token()))), check
    )


def azure_delete(api: str, resource_id: str, token: str) -> Request:
    """Virtual Machines - Delete (Azure Compute REST API); a machine that is only powered off is still billed."""
    url = f"{api}{resource_id}?api-version=2024-07-01&forceDeletion=true"
    return Request("DELETE", url, {"Authorization": f"Bearer {token}"})


def azure_terminator(metadata: Metadata, api: str) -> Terminator:
    def request() -> Request:
        resource_id = metadata.azure("instance?api-version=2021-02-01").json()["compute"]["resourceId"]
        audience = quote(AZURE_API + "/", safe="")
        path = f"identity/oauth2/token?api-version=2018-02-01&resource={audience}"
        return azure_delete(api, resource_id, metadata.azure(path).json()["access_token"])

    return Terminator("terminate-azure", PROVIDER, lambda: _checked_status(call(request())), request)


def runpod_terminate(api: str, pod_id: str, key: str) -> Request:
    """podTerminate (RunPod GraphQL API)."""
    return _runpod(api, key, "mutation($input: PodTerminateInput!) { podTerminate(input: $input) }", pod_id)


def runpod_pod(api: str, pod_id: str, key: str) -> Request:
    return _runpod(api, key, "query($input: PodFilter) { pod(input: $input) { id } }", pod_id)


def _runpod(api: str, key: str, query: str, pod_id: str) -> Request:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return Request(
        "POST", api, headers, json.dumps({"query": query, "variables": {"input": {"podId": pod_id}}}).encode()
    )


def runpod_terminator(api: str) -> Terminator:
    def target() -> Tuple[str, str, str]:
        return api, container_variable("RUNPOD_POD_ID"), container_variable("RUNPOD_API_KEY")

    def ask(request: Request) -> Dict[str, Any]:
        answer = call(request).json()
        if answer.get("errors"):  # GraphQL sends errors in a reply with status 200
            raise OSError(json.dumps(answer["errors"])[:300])
        return answer.get("data") or {}

    def fire() -> str:
        return f"answered {json.dumps(ask(runpod_terminate(*target())))}"

    def check() -> None:
        if not ask(runpod_pod(*target())).get("pod"):
            raise OSError("RUNPOD_API_KEY does not see this pod")

    return Terminator("runpod", PROVIDER, fire, check)


def vast_destroy(api: str, instance_id: str, key: str) -> Request:
    """destroy instance (Vast API, DELETE /api/v0/instances/{id}/)."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return Request("DELETE", f"{api}/instances/{instance_id}/", headers, b"{}")


def vast_instance(api: str, instance_id: str, key: str) -> Request:
    return Request("GET", f"{api}/instances/{instance_id}/", {"Authorization": f"Bearer {key}"})


def vast_terminator(api: str) -> Terminator:
    def target() -> Tuple[str, str, str]:
        return api, container_variable("CONTAINER_ID"), container_variable("CONTAINER_API_KEY")

    return Terminator(
        "vast",
        PROVIDER,
        lambda: _checked_status(call(vast_destroy(*target()))),
        lambda: call(vast_instance(*target())).checked(),
    )


def container_variable(name: str, first_process: str = "/proc/1/environ") -> str:
    """A variable that the provider sets in the container's first process; an ssh session does not inherit it."""
    value = os.environ.get(name)
    if not value:
        with contextlib.suppress(OSError), open(first_process, "rb") as file:
            lines = file.read().decode(errors="replace").split("\0")
            value = dict(line.partition("=")[::2] for line in lines).get(name)
    if not value:
        raise OSError(f"{name} is not in the environment of this container")
    return value


def _checked_status(reply: Reply) -> str:
    reply.checked()
    return f"HTTP {reply.status}"

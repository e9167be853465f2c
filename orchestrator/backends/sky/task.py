"""A lease as SkyPilot's task of n nodes in one place, in the form of its YAML; and the facts that its nodes read.

Neither holds a secret. Credentials are in a file of their own beside the code, which SkyPilot copies to the nodes'
disks; the environment of the task holds no credentials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cost.ledger.leases import Lease
from cost.market.offers import ANY_REGION, Offer
from orchestrator.backends.sky.terminators import autodown_minutes, node_terminators, task_config

FACTS_FILE = "node.json"
CREDENTIALS_FILE = "credentials"
FIRST_PORT, NUM_PORTS = 21_000, 9_000
"""Below the ephemeral ports of systems, and where no well-known service listens."""
RUN = "exec python3 -I -u tasks/node/bootstrap.py start --facts node.json"
GUARD_PERIOD_SECONDS = 3.0
DISK_GB = 100


@dataclass(frozen=True, slots=True)
class NodeTerms:
    """What nodes need to know beside the lease."""

    store_uri: str
    limit_seconds: float
    """Real seconds from the create to the provider's own limit, where it is set there."""
    capacity_seconds: float
    region: str = ""
    """Of the run store, where it is AWS's."""
    has_credentials: bool = True
    guard_period_seconds: float = GUARD_PERIOD_SECONDS


def infra(offer: Offer) -> str:
    """`cloud/region/zone` as SkyPilot writes it."""
    places = [offer.cloud]
    if offer.region and offer.region != ANY_REGION:
        places.append(offer.region)
        if offer.zone:
            places.append(offer.zone)
    return "/".join(places)


def node_resources(offer: Offer, lease_id: str, run_id: str) -> dict[str, Any]:
    """One node. Without an instance type the accelerator is asked for by SkyPilot's name, which ours begin with."""
    resources: dict[str, Any] = {"infra": infra(offer)}
    if offer.instance_type:
        resources["instance_type"] = offer.instance_type
    else:
        resources["accelerators"] = f"{sky_accelerator(offer.accelerator)}:{offer.gpus_per_node}"
    if offer.spot and offer.cloud not in ("slurm", "kubernetes", "ssh"):  # where the place itself is the spot market
        resources["use_spot"] = True
    if offer.cloud in LABELLED:
        resources["labels"] = {"slm-lease": label(lease_id), "slm-run": label(run_id)}
    if offer.cloud in DISK_SIZED:
        resources["disk_size"] = DISK_GB
    return resources


LABELLED = frozenset({"aws", "gcp", "azure", "kubernetes", "mithril", "verda"})
DISK_SIZED = frozenset({"aws", "gcp", "azure"})
_SKY_NAMES = {"A100-40GB": "A100", "A100-80GB-SXM": "A100-80GB", "A100-80GB-PCIe": "A100-80GB"}


def sky_accelerator(name: str) -> str:
    """SkyPilot's spelling of a name of `cost.market.hardware`."""
    if name in _SKY_NAMES:
        return _SKY_NAMES[name]
    for suffix in ("-SXM", "-PCIe", "-NVL"):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def label(text: str) -> str:
    """A label's value in the form of the strictest cloud (GCP): small letters, digits, - and _, at most 63."""
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in text.lower())[:63]


def lease_task(lease: Lease, terms: NodeTerms, *, workdir: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The task as SkyPilot's YAML has it."""
    cloud = lease.offer.cloud
    resources = node_resources(lease.offer, lease.lease_id, lease.run_id)
    minutes = autodown_minutes(cloud, terms.limit_seconds)
    if minutes is not None:
        resources["autostop"] = {"idle_minutes": minutes, "down": True, "wait_for": "none"}
    task: dict[str, Any] = {
        "name": "slm",
        "num_nodes": lease.num_nodes,
        "workdir": workdir,
        "resources": resources,
        "envs": dict(environment),
        "run": RUN,
    }
    config = task_config(cloud, terms.limit_seconds, capacity_seconds=terms.capacity_seconds)
    return {**task, "config": config} if config else task


def node_facts(lease: Lease, terms: NodeTerms, ranks: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What `tasks.node.bootstrap` reads on every node; `ranks`: of the nodes that run already, by address."""
    terminators = node_terminators(lease.offer.cloud)
    return {
        "lease_id": lease.lease_id,
        "run_id": lease.run_id,
        "num_nodes": lease.num_nodes,
        "store_uri": terms.store_uri,
        "head_port": head_port(lease.lease_id),
        "first_grant_seconds": lease.first_grant_seconds,
        "guard_period_seconds": terms.guard_period_seconds,
        "terminators": list(terminators.names),
        "notice": list(terminators.notice),
        "timer": terminators.timer,
        "region": terms.region,
        "credentials": CREDENTIALS_FILE if terms.has_credentials else "",
        "gpus_per_node": lease.offer.gpus_per_node,
        "ranks": dict(ranks or {}),
    }


def head_port(lease_id: str) -> int:
    """Where Ray's head of a lease listens: the same on all its nodes, and rarely another lease's."""
    return FIRST_PORT + int(hashlib.sha256(lease_id.encode()).hexdigest(), 16) % NUM_PORTS

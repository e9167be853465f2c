"""Offers of Slurm clusters, priced by SkyPilot's settings: each partition is a place, and those that may be preempted
are spot markets. Read by `orchestrator.prices.sources.skypilot`, the process that imports SkyPilot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from cost.market.hardware import accelerators, canonical_name
from cost.market.offers import Offer, Quotes, Skipped

MEMORY_SHARE = 0.9
"""Of a node's memory: the system keeps some, and sizes are rounded on the way."""
_OFF = re.compile(r"PreemptMode=(\S+)")
SPOT_WORDS = ("spot", "preempt", "scaveng")


def read() -> Quotes:
    """Every GPU of every partition that has a price, whole nodes only."""
    from sky.catalog import slurm_catalog
    from sky.provision.slurm import utils as slurm_utils

    today = datetime.now(UTC).date().isoformat()
    offers: list[Offer] = []
    skipped: list[Skipped] = []
    for cluster in slurm_utils.get_all_slurm_cluster_names():
        spot = spot_partitions(cluster)
        for node, partition in places(slurm_utils.slurm_node_info(slurm_cluster_name=cluster)):
            price = slurm_catalog._get_pricing(region=cluster, zone=partition)
            offer = node_offer(
                node, cluster, partition, price, spot=spot.get(partition, is_spot_name(partition)), day=today
            )
            if isinstance(offer, Skipped):
                skipped.append(offer)
            else:
                offers.append(offer)
    by_id = {offer.offer_id: offer for offer in offers}
    return Quotes(tuple(with_on_demand(list(by_id.values()))), tuple(dict.fromkeys(skipped)))


def places(nodes: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each node with each partition that it is in."""
    for node in nodes:
        for partition in str(node["partition"]).split(","):
            if partition and node["total_gpus"]:
                yield node, partition.strip().rstrip("*")


def node_offer(
    node: Mapping[str, Any], cluster: str, partition: str, price: Mapping[str, Any], *, spot: bool, day: str
) -> Offer | Skipped:
    """A whole node as an offer, or why it is none."""
    kind, count = str(node["gpu_type"]), int(node["total_gpus"])
    place = f"slurm/{cluster}/{partition}/{kind}"
    name = canonical_name(kind)
    if name is None:
        return Skipped(place, f"no data-sheet figures for accelerator '{kind}'")
    per_gpu = (price.get("accelerators") or {}).get(kind)
    if not per_gpu:
        return Skipped(place, f"no price; set slurm.cluster_configs.{cluster}.pricing in ~/.sky/config.yaml")
    cpus = int(float(node["vcpu_count"]))
    memory = math.floor(float(node["memory_gb"]) * MEMORY_SHARE)
    usd = Decimal(str(per_gpu)) * count
    usd += Decimal(str(price.get("cpu") or 0)) * cpus + Decimal(str(price.get("memory") or 0)) * memory
    return Offer(
        cloud="slurm",
        region=cluster,
        zone=partition,
        instance_type=f"{cpus}CPU--{memory}GB--{kind}:{count}",
        accelerator=name,
        gpus_per_node=count,
        gpu_memory_gib=accelerators()[name].memory_gib,
        spot=spot,
        usd_per_hour=usd,
        on_demand_usd_per_hour=None if spot else usd,
        as_of=day,
        source=f"SkyPilot's settings for Slurm cluster {cluster}",
    )


def with_on_demand(offers: list[Offer]) -> Iterator[Offer]:
    """Spot offers with the cheapest price of the same node where it is not preempted."""
    from dataclasses import replace

    def kind(offer: Offer) -> tuple[str, str | None]:
        return offer.region, offer.instance_type

    firm = sorted((offer for offer in offers if not offer.spot), key=lambda offer: offer.usd_per_hour, reverse=True)
    prices = {kind(offer): offer.usd_per_hour for offer in firm}
    for offer in offers:
        yield replace(offer, on_demand_usd_per_hour=prices.get(kind(offer))) if offer.spot else offer


def spot_partitions(cluster: str) -> dict[str, bool]:
    """By the partitions' own PreemptMode; empty where it cannot be read."""
    from sky.provision.slurm import utils as slurm_utils

    try:
        code, output, _ = slurm_utils.run_on_login_node(cluster, "scontrol show partition --oneliner")
    except Exception:  # an older SkyPilot, or a login node that does not answer: names have to do
        return {}
    return {} if code else preempted(output)


def preempted(listing: str) -> dict[str, bool]:
    """What `scontrol show partition --oneliner` says."""
    found = {}
    for line in listing.splitlines():
        name, mode = re.search(r"PartitionName=(\S+)", line), _OFF.search(line)
        if name is not None and mode is not None:
            found[name[1]] = mode[1].upper() not in ("OFF", "GANG")
    return found


def is_spot_name(partition: str) -> bool:
    return any(word in partition.lower() for word in SPOT_WORDS)

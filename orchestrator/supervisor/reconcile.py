"""Nothing of ours may live that the ledger does not know."""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal

from cost.ledger.leases import Lease
from cost.market.offers import Offer
from orchestrator.backends.base import Backend, BackendError, Instance


def is_ours(lease_id: str, *, owner: str, run_id: str | None = None, owners: Collection[str] = ()) -> bool:
    """Whether a cluster of that name was rented by this installation, or for this run by one of its former `owners`.

    Another installation's other runs are not ours, whatever became of this one.
    """
    if lease_id.startswith(f"slm-{owner}-"):
        return True
    return run_id is not None and any(
        re.fullmatch(rf"slm-{re.escape(former)}-{re.escape(run_id)}-\d+", lease_id) for former in owners
    )


def end_unknown_instances(
    backend: Backend,
    known_leases: Collection[str],
    *,
    owner: str,
    run_id: str | None = None,
    owners: Collection[str] = (),
) -> list[str]:
    """End every instance that `is_ours` but belongs to no open lease; say what was done.

    Whatever is not ours by its name is somebody else's and is never touched.
    """
    try:
        alive = backend.list_alive()
        ours = [instance for instance in alive if is_ours(instance.lease_id, owner=owner, run_id=run_id, owners=owners)]
        strangers = [our for our in ours if our.lease_id not in known_leases]
    except BackendError as error:
        return [f"cannot list what is alive: {error}"]
    messages = []
    for lease_id in sorted({stranger.lease_id for stranger in strangers}):
        nodes = [stranger for stranger in strangers if stranger.lease_id == lease_id]
        try:
            backend.stop(lease_of(nodes[0], len(nodes)))
            messages.append(f"ended {len(nodes)} nodes of {lease_id}, which the ledger does not know as open")
        except BackendError as error:
            messages.append(f"could not end {lease_id}: {error}")
    return messages


def lease_of(instance: Instance, num_nodes: int) -> Lease:
    """As much of a lease as is needed to end it, from what the provider knows."""
    offer = Offer(
        cloud="unknown",
        region="unknown",
        zone=None,
        instance_type=None,
        accelerator="unknown",
        gpus_per_node=0,
        gpu_memory_gib=0.0,
        spot=True,
        usd_per_hour=instance.usd_per_hour,
        on_demand_usd_per_hour=None,
        as_of="",
        source="the provider's own list",
    )
    return Lease(
        lease_id=instance.lease_id,
        run_id=instance.run_id,
        attempt=1,
        offer=offer,
        num_nodes=num_nodes,
        worst_usd_per_hour=Decimal(instance.usd_per_hour),
        first_grant_seconds=0.0,
        kill_latency_seconds=0.0,
        fencing_token=0,
    )

"""Offers and leases for tests: sensible defaults, and a test states only what it is about."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from cost.ledger.leases import Lease
from cost.market.offers import Offer

OFFER: dict[str, Any] = {
    "cloud": "aws",
    "region": "here",
    "zone": None,
    "instance_type": "node",
    "accelerator": "H100-SXM",
    "gpus_per_node": 1,
    "gpu_memory_gib": 80.0,
    "spot": True,
    "usd_per_hour": Decimal(1),
    "on_demand_usd_per_hour": None,
    "as_of": "2026-07-20",
    "source": "test",
}
LEASE: dict[str, Any] = {
    "lease_id": "slm-abc123-demo-1-1",
    "run_id": "demo-1",
    "attempt": 1,
    "num_nodes": 1,
    "first_grant_seconds": 60.0,
    "kill_latency_seconds": 0.0,
    "fencing_token": 1,
}


def make_offer(**changes: Any) -> Offer:
    """One H100 on spot at a dollar an hour, unless `changes` say otherwise; prices may be text or numbers."""
    fields = {**OFFER, **changes}
    for name in ("usd_per_hour", "on_demand_usd_per_hour"):
        fields[name] = None if fields[name] is None else Decimal(fields[name])
    return Offer(**fields)


def make_lease(offer: Offer | None = None, **changes: Any) -> Lease:
    """A lease of one node of the offer at the offer's own price, unless `changes` say otherwise."""
    rented = offer or make_offer()
    fields = {"worst_usd_per_hour": rented.usd_per_hour, **LEASE, **changes}
    return Lease(offer=rented, **{**fields, "worst_usd_per_hour": Decimal(fields["worst_usd_per_hour"])})

"""Rents from the local cloud: real nodes on this machine, from a spot market that is a process of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from cost.ledger.leases import Lease
from cost.market.offers import Offer
from orchestrator.backends.base import BackendError, Instance, LeasePhase, LeaseState
from orchestrator.backends.local.client import MarketClient
from orchestrator.backends.local.schedule import load, resolve
from tasks.own_module import own_module

TTL_SHARE_OF_LATENCY = 0.5
"""The provider's limit stands this share of the kill latency behind the first grant, so that the guard acts first."""
GUARD_PERIOD_SECONDS = 1.0


class LocalBackend:
    """One run's nodes. `home` is the market's own folder; `store_uri` must name a folder.

    `ttl="fixed"`: the provider's time limit is `ttl_seconds` after each node's start and cannot be moved.
    """

    name = "local"

    def __init__(
        self,
        home: Path,
        run_id: str,
        *,
        store_uri: str,
        market: str,
        time_scale: float,
        seed: int,
        offers: Sequence[Offer],
        python: str = sys.executable,
        ttl: Literal["renewable", "fixed"] = "renewable",
        ttl_seconds: float | None = None,
        env: Mapping[str, str] | None = None,
        on_notice: Sequence[str] | None = None,
        guard_period_seconds: float = GUARD_PERIOD_SECONDS,
    ) -> None:
        """`on_notice`: run on a node whose preemption was announced; `{seconds}` in it is replaced.

        Raises:
            UserError: No such market, or its trace cannot be read.
        """
        self._market = resolve(market)
        load(self._market, seed=seed, time_scale=time_scale)
        self._run_id = run_id
        self._store_uri = store_uri
        self._time_scale = time_scale
        self._seed = seed
        self._offers = tuple(offers)
        self._ttl = ttl
        self._ttl_seconds = ttl_seconds
        self._environment = dict(env or {})
        drain = own_module("tasks", "drain", "--seconds", "{seconds}", python=python)
        self._on_notice = shlex.join(drain if on_notice is None else on_notice)
        self._period = guard_period_seconds
        self._client = MarketClient(home, python)

    def offers(self) -> Sequence[Offer]:
        return self._offers

    def start(self, lease: Lease, command: Sequence[str]) -> None:
        self._client.call("start", **self._order(lease, command))

    def _order(self, lease: Lease, command: Sequence[str]) -> dict[str, Any]:
        """The request to the market: the fields of its `Order`."""
        ttl_seconds = lease.first_grant_seconds + TTL_SHARE_OF_LATENCY * lease.kill_latency_seconds
        if lease.ttl_seconds:
            ttl_seconds = lease.ttl_seconds
        if self._ttl == "fixed" and self._ttl_seconds is not None:
            ttl_seconds = self._ttl_seconds
        return {
            "lease_id": lease.lease_id,
            "run_id": self._run_id,
            "num_nodes": lease.num_nodes,
            "command": list(command),
            "usd_per_hour": str(lease.offer.usd_per_hour),
            "first_grant_seconds": lease.first_grant_seconds,
            "ttl_seconds": ttl_seconds,
            "store_uri": self._store_uri,
            "market": self._market,
            "seed": self._seed,
            "time_scale": self._time_scale,
            "guard_period_seconds": self._period,
            "on_notice": self._on_notice,
            "environment": self._environment,
        }

    def poll(self, lease: Lease) -> LeaseState:
        written = self._client.written()
        if not written.there():  # nothing runs, so no market has to be started
            return _lease_state(written.describe(lease.lease_id))
        return _lease_state(self._client.call("poll", lease_id=lease.lease_id)["nodes"])

    def extend(self, lease: Lease, seconds: float) -> None:
        if self._ttl == "renewable" and self._client.written().there():
            self._client.call("extend", lease_id=lease.lease_id, seconds=seconds)

    def stop(self, lease: Lease) -> None:
        if not self._client.written().there():
            return
        left = self._client.call("stop", lease_id=lease.lease_id)["left"]
        if left:
            raise BackendError(f"the local cloud could not yet end {', '.join(left)}; it keeps trying.")

    def list_alive(self) -> Sequence[Instance]:
        if not self._client.written().there():
            return []
        return [
            Instance(
                instance_id=node["instance_id"],
                lease_id=node["lease_id"],
                run_id=node["run_id"],
                rank=node["rank"],
                usd_per_hour=Decimal(node["usd_per_hour"]),
                started_at=datetime.fromisoformat(node["started_at"]),
            )
            for node in self._client.call("list")["nodes"]
        ]


def _lease_state(nodes: Sequence[dict[str, Any]]) -> LeaseState:
    """A lease's state from the newest node of each rank."""
    there = {node["rank"]: node for node in nodes if node["is_there"]}
    head = next((node for node in nodes if node["rank"] == 0), None)
    exit_code = head["exit_code"] if head is not None else None
    lost = [f"node {node['rank']}: {node['reason']}" for node in nodes if not node["is_there"] and node["reason"]]
    if not there:
        return LeaseState(LeasePhase.GONE, (), exit_code, None, ", ".join(lost))
    phase = LeasePhase.RUNNING
    if exit_code is not None:
        phase = LeasePhase.ENDED
    elif not all(node["booted"] for node in there.values()):
        phase = LeasePhase.STARTING
    price = Decimal(next(iter(there.values()))["usd_per_hour"])
    return LeaseState(phase, tuple(sorted(there)), exit_code, price, ", ".join(lost))

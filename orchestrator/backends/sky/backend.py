"""Rents through SkyPilot: one of its clusters per lease, on any cloud that it serves.

SkyPilot creates instances. A record of them is written to the run store at once (`clusters/LEASE.json`), so that
another machine, whose SkyPilot does not know them, finds and terminates them. Whether a node's command has ended is
read from what its guard writes into the run store. The ledger, grants and progress belong to the supervisor.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import tasks
from cost.errors import UserError
from cost.ledger.leases import Lease, run_id_from_lease_id
from cost.market.offers import Offer
from cost.market.providers import PriceBound, provider, refusal
from orchestrator.backends.base import BackendError, Instance, LeasePhase, LeaseState, NoCapacity
from orchestrator.backends.cloud_support import CloudSupport
from orchestrator.backends.sky.client import SkyClient, SkyRefusal
from orchestrator.backends.sky.names import cluster_name, lease_names
from orchestrator.backends.sky.task import CREDENTIALS_FILE, FACTS_FILE, NodeTerms, lease_task, node_facts
from orchestrator.backends.sky.terminators import armed_provider, autodown_minutes
from tasks import run_store_keys as keys
from tasks.node.bootstrap import node_ranks
from tasks.node.guard_archive import write_guard_archive
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer, unwrap, wrap

CALL_SECONDS = 120.0
"""Longest wait for a query."""
SERVER_TRIES = 3
"""How often SkyPilot's API server is started before an offer is skipped."""
END_SECONDS = 300.0
"""Longest wait for a termination; the caller tries again."""
LAUNCH_SLACK_SECONDS = 120.0
"""Beyond a create's own limit, to cancel it."""
"""As the guard itself ends where it refuses to start."""
LIVE = ("UP", "INIT")
CODE = ("tasks", "trainer", "cost")
LOCK_FILE = "constraints.txt"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SkySettings:
    """How this run rents. Real seconds."""

    launch_seconds: float = 600.0
    """A create that takes longer is cancelled: a guard's first grant counts from its start."""
    capacity_seconds: float = 120.0
    """How long a node may wait in a provider's queue."""
    guard_seconds: float = 180.0
    """After a create, within which the first node's guard must have reached the run store."""
    server_pause_seconds: float = 10.0
    allow_unguarded: bool = False


class SkyBackend:
    """Nodes of one run; `store` is the run's. `folder`: files that only this machine needs.

    Without a store it lists and terminates every cluster with our prefix, and rents nothing.
    """

    name = "sky"

    def __init__(
        self,
        folder: Path,
        store: Store | None,
        *,
        offers: Sequence[Offer] = (),
        client: SkyClient | None = None,
        settings: SkySettings | None = None,
        supports: Mapping[str, CloudSupport] | None = None,
        known_leases: Callable[[], Sequence[str]] = lambda: (),
        credentials: Callable[[], str | None] | None = None,
        region: str = "",
        tell: Tell = lambda _: None,
        on_ready: Callable[[Lease, dict[str, float]], None] = lambda _, __: None,
    ) -> None:
        """`known_leases`: of the ledger, to name what is listed; `credentials`: of the run store, for nodes."""
        self._folder = folder
        self._store = store
        self._offers = tuple(offers)
        self._client = client or SkyClient(folder / "sky.log")
        self._settings = settings or SkySettings()
        self._supports = dict(supports or {})
        self._known_leases = known_leases
        self._credentials = credentials or (lambda: None)
        self._region = region
        self._tell = tell
        self._on_ready = on_ready
        self._ready: set[str] = set()
        self._records: dict[str, dict[str, Any]] = {}

    # -- the contract ----------------------------------------------------------------------------

    def offers(self) -> Sequence[Offer]:
        return self._offers

    def start(self, lease: Lease, command: Sequence[str]) -> None:  # noqa: ARG002
        """`command` is ignored: the node itself makes it, with the Python that it has installed."""
        if self._store is None:
            raise BackendError("a backend without a run store rents nothing.")
        self._refuse_unguarded(lease)
        support = self._supports.get(lease.offer.cloud)
        if support is not None and (reason := support.refusal(lease)) is not None:
            raise SkyRefusal(reason)
        alive = self._alive(lease)
        if len(alive) >= lease.num_nodes:
            return
        self._require_skypilot(lease)
        before = self._record(lease) if alive else {}
        ranks = {ip: rank for rank, (item, ip) in enumerate(before.get("instances") or ()) if item in alive}
        if alive and 0 not in ranks.values():
            raise NoCapacity(f"{lease.lease_id}: its first node is gone or unknown, so no node is added.")
        self._remember(lease, {**before, "cluster": cluster_name(lease.lease_id), "state": "asked"})
        terms = NodeTerms(
            store_uri=self._store.uri,
            limit_seconds=lease.ttl_seconds or self._settings.launch_seconds + lease.first_grant_seconds,
            capacity_seconds=self._settings.capacity_seconds,
            region=self._region,
            has_credentials=(keys := self._credentials()) is not None,
        )
        with staged(self._folder / lease.lease_id, node_facts(lease, terms, ranks), keys) as workdir:
            task = lease_task(lease, terms, workdir=str(workdir), environment={})
            began = time.monotonic()
            result = self._client.call(
                "launch",
                seconds=self._settings.launch_seconds + LAUNCH_SLACK_SECONDS,
                on_event=lambda event: self._on_event(lease, event),
                cluster=cluster_name(lease.lease_id),
                task=task,
                capacity_seconds=self._settings.capacity_seconds,
                limit_seconds=self._settings.launch_seconds,
            )
        self._remember(lease, {**in_order(result, ranks), "state": "started", "started_at": time.time()})
        self._tell(f"{lease.lease_id} launched in {time.monotonic() - began:.0f} s")

    def poll(self, lease: Lease) -> LeaseState:
        record = self._record(lease)
        seen = self._client.call(
            "query",
            seconds=CALL_SECONDS,
            on_event=lambda event: self._on_event(lease, event),
            cluster=cluster_name(lease.lease_id),
            record=record,
        )
        live = {name for name, what in seen["instances"].items() if what["status"] in LIVE}
        if not live:
            support = self._supports.get(lease.offer.cloud)
            why = "" if support is None else support.why_gone(record, lease)
            return LeaseState(LeasePhase.GONE, detail=why or "none of its nodes is left at the provider")
        ranks = alive_ranks(live, record.get("instances") or (), lease.num_nodes)
        price = self._price(lease, record)
        try:
            request = self._word(keys.guard_request(lease.lease_id, 0))
        except StoreError:  # the store is away, so nothing follows for the node
            return LeaseState(LeasePhase.RUNNING, ranks, None, price, "the run store is away")
        if request is None:
            silent = time.time() - float(record.get("started_at") or time.time())
            if silent > self._settings.guard_seconds:
                detail = f"its guard has not written for {silent:.0f} s"
                return LeaseState(LeasePhase.ENDED, ranks, keys.EXIT_UNGUARDED, price, detail)
            return LeaseState(LeasePhase.STARTING, ranks, None, price)
        self._tell_ready(lease, record)
        code = request.get("exit_code")
        phase = LeasePhase.RUNNING if code is None else LeasePhase.ENDED
        return LeaseState(phase, ranks, None if code is None else int(code), price)

    def extend(self, lease: Lease, seconds: float) -> None:
        record = self._record(lease)
        support = self._supports.get(lease.offer.cloud)
        if support is not None:
            support.limit(record, lease, seconds)
        minutes = autodown_minutes(lease.offer.cloud, seconds)
        if minutes is not None and record.get("state") == "started":
            with contextlib.suppress(BackendError):  # never the only one, and armed at the create
                self._client.call("autodown", seconds=CALL_SECONDS, cluster=record["cluster"], minutes=minutes)

    def stop(self, lease: Lease) -> None:
        name, record = cluster_name(lease.lease_id), self._record(lease)
        result = self._client.call("end", seconds=END_SECONDS, cluster=name, record=record)
        if result["left"]:
            trouble = f" ({result['trouble']})" if result.get("trouble") else ""
            raise BackendError(f"{lease.lease_id} still has {len(result['left'])} instances at the provider{trouble}.")
        support = self._supports.get(lease.offer.cloud)
        if support is not None and record:
            support.release(record, lease)

    def list_alive(self) -> Sequence[Instance]:
        result = self._client.call("list", seconds=CALL_SECONDS)
        if result["problems"]:
            raise BackendError("; ".join(result["problems"]))
        leases = lease_names(self._known_leases())
        found: list[Instance] = []
        for cluster in result["clusters"]:
            lease_id = leases.get(cluster["cluster"], cluster["cluster"])
            record = self._records.setdefault(lease_id, cluster)
            order = [instance_id for instance_id, _ in record.get("instances") or ()]
            started = datetime.fromtimestamp(float(cluster.get("started") or time.time()), UTC)
            price = Decimal(cluster.get("usd_per_hour") or 0)
            run_id = record.get("run_id") or run_id_from_lease_id(lease_id)
            found += [
                Instance(item, lease_id, run_id, order.index(item) if item in order else rank, price, started)
                for rank, item in enumerate(cluster["seen"])
            ]
        return found

    # -- helpers ---------------------------------------------------------------------------------

    def _refuse_unguarded(self, lease: Lease) -> None:
        """Refuse a cloud whose terminators this version cannot arm.

        Raises:
            SkyRefusal: Nothing that we can arm would end a hung node there.
        """
        profile = armed_provider(provider(lease.offer.cloud), self._supports)
        reason = refusal(profile, allow_unguarded=self._settings.allow_unguarded)
        if reason is not None:
            raise SkyRefusal(reason)

    def _require_skypilot(self, lease: Lease) -> None:
        """SkyPilot answers and may rent there: checked before the record is written, so that a refusal costs no wait.

        Raises:
            SkyRefusal: It cannot be started, or has no credentials for that cloud.
        """
        for attempt in range(SERVER_TRIES):
            if attempt:
                time.sleep(self._settings.server_pause_seconds)
            try:
                enabled = self._client.call("check", seconds=CALL_SECONDS)["enabled"]
                break
            except BackendError as error:
                failed = error
        else:
            raise SkyRefusal(f"SkyPilot could not be started, so nothing was rented: {failed}") from failed
        if enabled and lease.offer.cloud not in enabled:  # one that was never asked looks for itself at the launch
            raise SkyRefusal(
                f"SkyPilot has no credentials for {lease.offer.cloud} (it has them for {', '.join(enabled)}); find "
                f"what is missing with: sky check {lease.offer.cloud}"
            )

    def _alive(self, lease: Lease) -> list[str]:
        """Instances of a lease that was requested before; a lease that never was has none."""
        if not self._record(lease):
            return []
        seen = self._client.call(
            "query", seconds=CALL_SECONDS, cluster=cluster_name(lease.lease_id), record=self._record(lease)
        )
        return [name for name, what in seen["instances"].items() if what["status"] in LIVE]

    def _on_event(self, lease: Lease, event: Mapping[str, Any]) -> None:
        if event["event"] == "record":
            # SkyPilot's order is not that of the ranks.
            order = {"instances": self._record(lease).get("instances") or []}
            self._remember(lease, {**self._record(lease), **event["record"], **order, "state": "asked"})
        elif event["event"] == "server":
            self._tell(str(event["message"]))

    def _remember(self, lease: Lease, record: dict[str, Any]) -> None:
        """Keep the record here and in the run store; it must not be lost while the store is away."""
        record = {**record, "lease_id": lease.lease_id, "run_id": lease.run_id}
        self._records[lease.lease_id] = record
        if self._store is None:
            return
        with contextlib.suppress(StoreError):
            self._store.write(keys.cluster(lease.lease_id), wrap(record, Writer.SUPERVISOR, indent=1))

    def _record(self, lease: Lease) -> dict[str, Any]:
        if lease.lease_id not in self._records:
            record = self._read(keys.cluster(lease.lease_id))
            if record is None:
                return {}
            self._records[lease.lease_id] = record
        return self._records[lease.lease_id]

    def _read(self, key: str) -> dict[str, Any] | None:
        """A JSON object of the run store; None while there is none, or the store is away."""
        try:
            return self._word(key)
        except StoreError:
            return None

    def _word(self, key: str) -> dict[str, Any] | None:
        """The same; raises StoreError while the store is away."""
        if self._store is None:
            return None
        try:
            return unwrap(self._store.read(key), key)
        except (StoreKeyMissing, RecordError):
            return None

    def _tell_ready(self, lease: Lease, record: Mapping[str, Any]) -> None:
        """Once for each lease that was created here: the times until its first node was set up."""
        if lease.lease_id in self._ready or "seconds" not in record:
            return
        setup = self._read(keys.set_up(lease.lease_id, 0))
        if setup is None:
            return
        self._ready.add(lease.lease_id)
        parts = {name: float(setup[name]) for name in ("environment_seconds", "data_seconds")}
        parts = {"launch_seconds": float(record["seconds"]), **parts}
        total = parts["launch_seconds"] + float(setup["seconds"])
        said = ", ".join(f"{name.removesuffix('_seconds')} {seconds:.1f} s" for name, seconds in parts.items())
        self._tell(f"node 0 of {lease.lease_id} is set up {total:.0f} s after the request: {said}")
        self._on_ready(lease, {"seconds": total, **parts})

    def _price(self, lease: Lease, record: Mapping[str, Any]) -> Decimal | None:
        """As billed now, where that can be read, and None while it cannot; elsewhere the price when it was rented."""
        support = self._supports.get(lease.offer.cloud)
        if support is not None and support.reads_prices and lease.offer.spot:
            return support.usd_per_hour(record, lease)
        if provider(lease.offer.cloud).price_bound is PriceBound.FIXED or not lease.offer.spot:
            return lease.offer.usd_per_hour
        return Decimal(record["usd_per_hour"]) if record.get("usd_per_hour") else None


def alive_ranks(live: set[str], instances: Sequence[Sequence[str]], num_nodes: int) -> tuple[int, ...]:
    """Ranks of the running instances; from their number alone while SkyPilot has not told the order."""
    order = [instance for instance, _ in instances]
    if set(order) >= live and len(order) == num_nodes:
        return tuple(rank for rank, item in enumerate(order) if item in live)
    return tuple(range(min(len(live), num_nodes)))


def in_order(record: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    """The record with its instances by rank, in the order that the nodes themselves compute."""
    instances = record.get("instances") or ()
    ranks = node_ranks([ip for _, ip in instances], known)
    return {**record, "instances": sorted(instances, key=lambda instance: ranks[instance[1]])}


@contextlib.contextmanager
def staged(folder: Path, facts: Mapping[str, Any], credentials: str | None) -> Any:
    """A folder with our code, the lock file and the nodes' facts, for as long as SkyPilot copies it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        root = Path(tasks.__file__).resolve().parents[1]
        for package in CODE:
            skip = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(root / package, folder / package, ignore=skip)
        write_guard_archive(folder)
        shutil.copy(lock_file(root), folder / LOCK_FILE)
        (folder / FACTS_FILE).write_text(json.dumps(dict(facts), indent=1), encoding="utf-8")
        if credentials is not None:
            secret = folder / CREDENTIALS_FILE
            secret.touch(mode=0o600)
            secret.write_text(credentials, encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lock_file(root: Path) -> Path:
    """The versions that nodes get: beside the packages, or inside an installed distribution.

    Raises:
        UserError: It is nowhere.
    """
    for place in (root / LOCK_FILE, root / "tasks" / LOCK_FILE):
        if place.is_file():
            return place
    raise UserError(f"{LOCK_FILE} is missing beside {root / 'tasks'}; install slm again.")

"""All our instances at every backend, whether the ledger still pays for them, and the termination of orphans.

An instance is ours if its name begins with `slm-OWNER-`; nothing else is ever touched. Instances are listed before the
ledger is read: a lease is in the ledger before anything is rented for it, so whatever is listed and paid for is found.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from cost.errors import SlmError
from cost.ledger.accounts import LeaseAccount
from cost.ledger.database import DatabaseError
from cost.ledger.journal import records_from
from cost.ledger.ledger import Ledger
from orchestrator.backends.base import Backend, BackendError, Instance
from orchestrator.clock import SystemClock
from orchestrator.runs.journal import StoreJournal
from orchestrator.runs.records import Run, Runs, is_supervised
from orchestrator.runs.status import lock_path, open_runs
from orchestrator.settings import Home
from orchestrator.supervisor.assembly import run_store
from orchestrator.supervisor.reconcile import is_ours, lease_of
from tasks.recipe.schema import Recipe

TRIES = 3
PAUSE_SECONDS = 2.0
"""Between two attempts to terminate what is still listed."""


class Verdict(StrEnum):
    """Whether the ledger pays for a running cluster."""

    SUPERVISED = "supervised"
    PAID = "paid"
    """Not supervised, but its paid time is not over: the next supervisor of its run takes it over."""
    ELSEWHERE = "elsewhere"
    """Its paid time is over in this ledger, but another machine has taken over the run and pays from its own."""
    EXPIRED = "expired"
    SETTLED = "settled"
    UNKNOWN = "unknown"
    FOREIGN = "foreign"
    """It was listed, but its name is not ours."""


MUST_END = frozenset({Verdict.EXPIRED, Verdict.SETTLED, Verdict.UNKNOWN})


class Outcome(StrEnum):
    """The result for one cluster."""

    KEPT = "kept"
    WOULD_END = "would end"
    ENDED = "ended"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Cluster:
    """All nodes of one cluster name at one backend."""

    name: str
    backend: str
    run_id: str
    num_nodes: int
    usd_per_hour: Decimal
    """Of all its nodes."""
    started_at: datetime
    verdict: Verdict
    outcome: Outcome = Outcome.KEPT
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All clusters that were found. `problems` are backends that could not be listed."""

    owner: str
    dry_run: bool
    clusters: tuple[Cluster, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def orphans(self) -> tuple[Cluster, ...]:
        """Orphans that still run."""
        return tuple(cluster for cluster in self.clusters if cluster.outcome in (Outcome.WOULD_END, Outcome.LEFT))


@dataclass(frozen=True, slots=True)
class Known:
    """From the ledger: a verdict on each lease, and every owner that a run's nodes were ever named after."""

    owner: str
    verdicts: Mapping[str, Verdict]
    former_owners: Mapping[str, Sequence[str]]

    def verdict(self, name: str) -> Verdict:
        """On a running cluster."""
        ours = is_ours(name, owner=self.owner) or any(
            is_ours(name, owner=self.owner, run_id=run_id, owners=owners)
            for run_id, owners in self.former_owners.items()
        )
        return self.verdicts.get(name, Verdict.UNKNOWN) if ours else Verdict.FOREIGN


def reconcile(
    home: Home,
    backends: Sequence[Backend],
    *,
    dry_run: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    now_ms: Callable[[Run, Ledger], int] | None = None,
) -> Inventory:
    """List all our instances, terminate the orphans, and confirm that they are gone.

    `now_ms` returns a run's billed time; by default its clock's.

    Raises:
        DatabaseError: The ledger exists and cannot be read: nothing is terminated then.
    """
    listed: list[tuple[Backend, list[Instance]]] = []
    problems = []
    seen: set[tuple[str, str]] = set()
    for backend in backends:
        try:
            # A cloud and SkyPilot may both list an instance.
            alive = [found for found in backend.list_alive() if (found.lease_id, found.instance_id) not in seen]
            listed.append((backend, alive))
            seen |= {(found.lease_id, found.instance_id) for found in alive}
        except BackendError as error:
            problems.append(f"{backend.name}: cannot list what is alive: {error}")
    known = read_ledger(home, now_ms or billed_now_ms)
    found = [
        (backend, found_cluster(backend, nodes, known)) for backend, instances in listed for nodes in by_name(instances)
    ]
    clusters = [
        entry if entry.verdict not in MUST_END else _end(backend, entry, dry_run=dry_run, sleep=sleep)
        for backend, entry in found
    ]
    return Inventory(known.owner, dry_run, tuple(clusters), tuple(problems))


def by_name(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Instances of one cluster together, clusters in the order of their names."""
    names = sorted({instance.lease_id for instance in instances})
    return [[instance for instance in instances if instance.lease_id == name] for name in names]


def found_cluster(backend: Backend, nodes: Sequence[Instance], known: Known) -> Cluster:
    name = nodes[0].lease_id
    return Cluster(
        name=name,
        backend=backend.name,
        run_id=nodes[0].run_id,
        num_nodes=len(nodes),
        usd_per_hour=sum((node.usd_per_hour for node in nodes), Decimal(0)),
        started_at=min(node.started_at for node in nodes),
        verdict=known.verdict(name),
    )


def read_ledger(home: Home, now_ms: Callable[[Run, Ledger], int]) -> Known:
    """The verdict on every lease; empty where there is no ledger yet."""
    owner = home.owner_id()
    if not home.database.exists():
        return Known(owner, {}, {})
    try:
        with open_runs(home) as runs:
            verdicts = {
                account.lease.lease_id: lease_verdict(account, run, runs, home, now_ms)
                for run in runs.all()
                for account in Ledger(runs.db, run.run_id, fencing_token=run.fencing_token).accounts()
            }
            return Known(owner, verdicts, {run.run_id: run.options.owners for run in runs.all()})
    except sqlite3.Error as error:
        raise DatabaseError(
            f"the ledger at {home.database} cannot be read, so nothing is terminated: {error}; restore a copy "
            "of the file, or move it away, and then everything with our name is terminated."
        ) from error


def lease_verdict(
    account: LeaseAccount, run: Run, runs: Runs, home: Home, now_ms: Callable[[Run, Ledger], int]
) -> Verdict:
    if not account.is_open:
        return Verdict.SETTLED
    if is_supervised(lock_path(home, run.run_id)):
        return Verdict.SUPERVISED  # its supervisor terminates it in time
    now = now_ms(run, Ledger(runs.db, run.run_id, fencing_token=run.fencing_token))
    if now <= account.expires_ms + account.latency_ms:
        return Verdict.PAID
    return Verdict.ELSEWHERE if is_elsewhere(run, runs, home) else Verdict.EXPIRED


def is_elsewhere(run: Run, runs: Runs, home: Home) -> bool:
    """Whether the run store holds a record of a supervisor that this ledger does not know.

    A store that cannot be read is no reason to keep an orphan: without the store nobody can grant either.
    """
    try:
        journal = StoreJournal(run_store(run, runs, home))
        return any(found.fencing_token > run.fencing_token for found in records_from(journal, next_record(run, runs)))
    except SlmError:
        return False


def next_record(run: Run, runs: Runs) -> int:
    """The number of the first record of the run store that this ledger has not seen."""
    row = runs.db.execute("SELECT journal_next FROM runs WHERE run_id = ?", (run.run_id,)).fetchone()
    return int(row["journal_next"])


def billed_now_ms(run: Run, ledger: Ledger) -> int:
    """A run's billed time, as a supervisor that started now would see it."""
    scale = 1.0
    if run.options.is_local:
        scale = Recipe.model_validate_json(run.recipe_json).local.time_scale
    return SystemClock(
        origin_ms=run.created_ms, scale=scale, floor_ms=ledger.newest_ms(), last_moment_ms=ledger.last_moment_ms()
    ).now_ms()


def _end(backend: Backend, cluster: Cluster, *, dry_run: bool, sleep: Callable[[float], None]) -> Cluster:
    """Terminate it and list again; a few times, since a provider may refuse or answer wrongly for a moment."""
    if dry_run:
        return replace(cluster, outcome=Outcome.WOULD_END)
    detail = ""
    for attempt in range(TRIES):
        if attempt:
            sleep(PAUSE_SECONDS)
        try:
            alive = [node for node in backend.list_alive() if node.lease_id == cluster.name]
            if alive:
                backend.stop(lease_of(alive[0], len(alive)))
            alive = [node for node in backend.list_alive() if node.lease_id == cluster.name]
        except BackendError as error:
            detail = str(error)
            continue
        if not alive:
            return replace(cluster, outcome=Outcome.ENDED)
        detail = f"{len(alive)} nodes are still listed"
    return replace(cluster, outcome=Outcome.LEFT, detail=detail)

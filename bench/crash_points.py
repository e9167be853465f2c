"""Kill the supervisor at every single boundary of its reads and writes, and run the command again.

`python bench/crash_points.py [--profile CLOUD] [--every N] [--json]`. One run of the simulation, with the ledger on
disk: it rents two nodes, renews, loses one and rents it again, reaches the drain threshold, stops and settles. All
boundaries of the ledger's transactions, the run store and the provider are counted first; then, for each of them, the
run is played anew and killed just there. What must hold then: the next supervisor brings the run to an end, the true
bill was covered by the ledger at each look and stays under the cap, nothing lives, and the entries add up.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from faults.cloud import FakeCloud
from faults.kinds import kill
from faults.machine import DOLLAR_TOLERANCE, Machine, rng_of
from faults.schedule import spot_offers, terms_of
from faults.storage import MemoryStore
from faults.world import World

from cost.ledger.database import migrate
from cost.ledger.ledger import Ledger, replay
from cost.market.providers import provider

SEED = 42
LOSS_SECONDS = 600.0
CAP_HOURS = 0.45
"""Of two nodes at the worst price."""
QUIET = ("poll", "list", "progress")
"""Reads that change nothing: a kill there is a kill at the write before."""


class CountingWorld(World):
    """Counts boundaries, and kills at one of them."""

    machine: Machine | None = None
    kill_at: int = 0
    seen: Counter[str]
    count: int = 0

    def boundary(self, name: str) -> None:
        super().boundary(name)
        if self.machine is None or not self.machine.depth or name.split(":")[0] in QUIET:
            return
        self.count += 1
        self.seen[name] += 1
        if self.count == self.kill_at:
            kill(self.machine, 30.0)


class WatchedConnection(sqlite3.Connection):
    """A connection whose commits are boundaries."""

    world: CountingWorld

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql != "COMMIT":
            return super().execute(sql, *arguments)
        self.world.boundary("commit:before")
        cursor = super().execute(sql, *arguments)
        self.world.boundary("commit:after")
        return cursor


@dataclass(slots=True)
class DiskMachine(Machine):
    """A ledger in a file, opened anew by every supervisor, as a new process would."""

    folder: Path = field(default_factory=Path)

    def _new_ledger(self) -> None:
        self._open()
        migrate(self.db)

    def _open(self) -> None:
        from orchestrator.runs.records import Runs

        db = sqlite3.connect(self.folder / "slm.db", isolation_level=None, factory=WatchedConnection)
        db.world = self.world  # type: ignore[attr-defined]
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        self.db, self.runs = db, Runs(db)

    def supervise(self) -> Any:
        self.db.close()
        self._open()
        return Machine.supervise(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one play came to."""

    count: int
    seen: Counter[str]
    problems: tuple[str, ...]


def play(cloud_name: str, kill_at: int) -> Outcome:
    """One run, killed at that boundary; 0: never."""
    with tempfile.TemporaryDirectory(prefix="slm-crash-") as folder:
        world = CountingWorld(rng_of(SEED))
        world.seen = Counter()
        world.kill_at = kill_at
        offer = next(offer for offer in spot_offers() if 1 <= offer.usd_per_hour <= 2)
        profile = provider(cloud_name)
        cap = CAP_HOURS * 2 * float(offer.on_demand_usd_per_hour or offer.usd_per_hour)
        store = MemoryStore()
        cloud = FakeCloud(
            world,
            store,
            terms=terms_of(profile, balance_usd=Decimal(f"{cap / 2:.6f}")),
            armed_at_create=not profile.arm_seconds,
            prices={offer.offer_id: [(0.0, float(offer.usd_per_hour))]},
        )
        world.machine = machine = DiskMachine(world, cloud, store, [offer], 2, cap, folder=Path(folder))
        world.at(LOSS_SECONDS, lambda: take_one(cloud))
        machine.live()
        world.advance(86_400.0)
        machine.check()
        return Outcome(world.count, world.seen, tuple(problems(machine, cloud)))


def take_one(cloud: FakeCloud) -> None:
    for node in cloud.alive():
        if node.rank == 1:
            cloud.end(node)


def problems(machine: Machine, cloud: FakeCloud) -> list[str]:
    """What does not hold at the end."""
    found = []
    ledger = Ledger(machine.db, machine.run.run_id, fencing_token=0)
    bill = cloud.true_bill_usd()
    if machine.end != "OUT_OF_BUDGET":
        found.append(f"it ended as {machine.end}")
    if bill > machine.cap_usd + DOLLAR_TOLERANCE:
        found.append(f"billed ${bill:.4f} of a cap of ${machine.cap_usd:.4f}")
    if machine.shortfall_usd > DOLLAR_TOLERANCE:
        found.append(f"the ledger was ${machine.shortfall_usd:.4f} short")
    if cloud.alive():
        found.append(f"{len(cloud.alive())} nodes live")
    if ledger.open_accounts():
        found.append("a lease is open")
    if machine.unfenced_writes():
        found.append("records out of order")
    spent, held = replay(ledger.entries())
    accounts = [*ledger.accounts(), *ledger.lines()]
    if (spent, held) != (
        sum(account.spent_micro_usd for account in accounts),
        sum(account.held_micro_usd for account in accounts),
    ):
        found.append("the entries do not add up")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="aws")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th boundary")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    calm = play(arguments.profile, 0)
    broken: dict[int, tuple[str, ...]] = {}
    tried = range(1, calm.count + 1, arguments.every)
    for number in tried:
        outcome = play(arguments.profile, number)
        if outcome.problems:
            broken[number] = outcome.problems
    facts = {
        "profile": arguments.profile,
        "boundaries": calm.count,
        "kinds": dict(sorted(calm.seen.items())),
        "kills": len(tried),
        "repaired": len(tried) - len(broken),
        "without_a_kill": calm.problems,
        "broken": broken,
    }
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(f"{k:16} {v}" for k, v in facts.items()))
    return 1 if broken or calm.problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""A run under the real supervisor, on a fake cloud and a clock that moves only when somebody sleeps."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from cost.ledger.database import connect
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from orchestrator.events import Event
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.lease_policy import Terms, same_terms
from orchestrator.supervisor.supervise import Supervisor
from tests.support.builders import make_offer
from trainer.run_store.base import DirectoryStore

SCALE = 60.0
"""One real second is one billed minute."""
PRICE = Decimal("0.60")
"""Dollars per node-hour: one cent per node and real second."""


def offer_in(region: str) -> Offer:
    """One L4 on spot, which on demand costs twice as much."""
    return make_offer(
        cloud="gcp",
        region=region,
        instance_type=None,
        accelerator="L4",
        gpu_memory_gib=24.0,
        usd_per_hour=PRICE,
        on_demand_usd_per_hour="1.20",
        as_of="",
    )


class AgendaClock(ManualClock):
    """Sleeping runs what was put on the agenda for that time."""

    def __init__(self) -> None:
        super().__init__(scale=SCALE)
        self.agenda: list[tuple[float, Callable[[], None]]] = []

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self.agenda.append((self.real_seconds() + seconds, act))

    def sleep(self, seconds: float) -> None:
        until = self.real_seconds() + seconds
        while due := sorted((item for item in self.agenda if item[0] <= until), key=lambda item: item[0]):
            self.agenda.remove(due[0])
            super().sleep(max(0.0, due[0][0] - self.real_seconds()))
            due[0][1]()
        super().sleep(max(0.0, until - self.real_seconds()))


@dataclass
class World:
    """A run, its ledger, its cloud, and a trainer that takes a second for each step."""

    path: Path
    cap: Decimal = Decimal("100")
    num_steps: int = 60
    clock: AgendaClock = field(default_factory=AgendaClock)
    events: list[Event] = field(default_factory=list)
    step: int = 0
    incarnation: int = 0
    switch: StopSwitch = field(default_factory=StopSwitch)
    bug_at: int | None = None
    breaks_at_start: bool = False
    deaf: bool = False
    noticed: bool = False

    def __post_init__(self) -> None:
        self.db: sqlite3.Connection = connect(self.path / "slm.db")
        self.runs = Runs(self.db)
        self.store = DirectoryStore(self.path / "store")
        self.backend = FakeBackend(self.clock, on_start=self.trainer_starts)
        self.run: Run = self.runs.create(
            recipe_name="tiny", recipe_digest="d", recipe_json="{}", options=RunOptions("fake"), cap_usd=self.cap
        )

    def supervisor(self, offers: int = 2, nodes: int = 2, terms: Terms | None = None) -> Supervisor:
        run = self.runs.take_over(self.run.run_id)
        self.ledger = Ledger(self.db, run.run_id, fencing_token=run.fencing_token)
        candidates = [Candidate(offer_in(f"zone-{i}"), nodes, Decimal("0.50")) for i in range(offers)]
        return Supervisor(
            run_record=run,
            runs=self.runs,
            ledger=self.ledger,
            backend=self.backend,
            store=self.store,
            clock=self.clock,
            terms=same_terms(terms or Terms()),
            candidates=lambda _: candidates,
            command=["train"],
            owner="abc123",
            write_spec=lambda lease: self.store.write("spec.json", lease.lease_id.encode()),
            emit=self.events.append,
            switch=self.switch,
        )

    def trainer_starts(self, backend: FakeBackend, lease: Lease) -> None:
        if self.store_has(f"control/{lease.lease_id}.json"):
            return
        self.incarnation += 1
        if self.breaks_at_start:
            self.clock.after(3.0, lambda: backend.end_command(lease.lease_id, 30))
        else:
            self.clock.after(15.0, lambda: self.train(lease, self.incarnation))

    def train(self, lease: Lease, incarnation: int) -> None:
        """One step, then the next in a second, as long as the head lives and nobody started anew."""
        if not self.store.root.exists():
            return
        ranks = {item.rank for item in self.backend.list_alive() if item.lease_id == lease.lease_id}
        if incarnation != self.incarnation or 0 not in ranks:
            return
        if self.store_has(f"control/{lease.lease_id}.json") and not self.deaf:
            self.backend.end_command(lease.lease_id, 10)
            return
        if self.step == self.bug_at:
            record = {"step": self.step, "message": "ValueError: shapes"}
            self.store.write("failures/0001.json", json.dumps(record).encode())
            self.backend.end_command(lease.lease_id, 20)
            return
        self.step += 1
        progress = {
            "step": self.step,
            "num_steps": self.num_steps,
            "incarnation": incarnation,
            "tokens": self.step * 100,
        }
        self.store.write("progress/latest.json", json.dumps(progress).encode())
        request = {"number": self.step, "boottime": 0.0, "state": "running", "noticed": self.noticed}
        for rank in ranks:
            self.store.write(f"guard/{lease.lease_id}/{rank}/request.json", json.dumps(request).encode())
        if self.step >= self.num_steps:
            self.backend.end_command(lease.lease_id, 0)
        else:
            self.clock.after(1.0, lambda: self.train(lease, incarnation))

    def store_has(self, key: str) -> bool:
        return key in self.store.list("control/")

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def told(self, kind: str) -> list[str]:
        return [event.message for event in self.events if event.kind == kind]


class Killed(BaseException):
    """The supervisor's process ends here."""


def check_ledger(world: World) -> None:
    """The ledger is never under the cloud's own bill, never over the cap, and nothing lives."""
    balance = world.ledger.balance()
    assert world.backend.true_bill_usd() <= balance.spent_usd <= world.cap
    assert balance.held_usd == 0
    assert world.backend.list_alive() == []

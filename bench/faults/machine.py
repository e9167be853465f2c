"""One run of the real supervisor on a machine that can be killed, held up, misled about time, and fill its disk."""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cost.errors import SlmError, UserError
from cost.ledger.accounts import LeaseAccount
from cost.ledger.database import migrate
from cost.ledger.leases import Lease
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from faults.cloud import FakeCloud
from faults.storage import MemoryStore, SupervisorsDoor
from faults.world import ORIGIN_MS, Killed, SkewedClock, World
from orchestrator.clock import start_ms
from orchestrator.events import Event
from orchestrator.runs.journal import StoreJournal, enter, recover
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import TERMINAL, Run, Runs, RunState
from orchestrator.supervisor import supervise as loop
from orchestrator.supervisor.grants import heard_ms
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.supervisor.lease_policy import Terms, needed_usd, same_terms
from tasks.run_store_keys import LEDGER, SPEC

TERMS = Terms(
    term_seconds=600.0,
    boot_allowance_seconds=120.0,
    startup_seconds=120.0,
    kill_latency_seconds=60.0,
    drain_seconds=90.0,
    stop_grace_seconds=180.0,
    stall_seconds=600.0,
    grow_delay_seconds=30.0,
    confirm_seconds=60.0,
    create_seconds=30.0,
    call_seconds=30.0,
    store_patience_seconds=1200.0,
    poll_seconds=60.0,
    accrue_seconds=120.0,
)
OWNER = "abc123"
RESTART_SECONDS = 60.0
"""When a person runs the command again after it ended with an error."""
MAX_STARTS = 12
CHECK_SECONDS = 60.0
"""Between two looks at the invariant while nothing but progress is told."""
DOLLAR_TOLERANCE = 1e-5
"""Clocks count whole milliseconds."""


class WatchedLedger(Ledger):
    """The real ledger; before and after each write the process may be killed or held up."""

    world: World

    def reserve(self, *arguments: Any, **named: Any) -> LeaseAccount:
        return self._between("reserve", super().reserve, *arguments, **named)

    def renew(self, *arguments: Any, **named: Any) -> LeaseAccount:
        return self._between("renew", super().renew, *arguments, **named)

    def resize(self, *arguments: Any, **named: Any) -> LeaseAccount:
        return self._between("resize", super().resize, *arguments, **named)

    def settle(self, *arguments: Any, **named: Any) -> LeaseAccount:
        return self._between("settle", super().settle, *arguments, **named)

    def _between(self, name: str, write: Callable[..., LeaseAccount], *arguments: Any, **named: Any) -> LeaseAccount:
        self.world.boundary(f"{name}:before")
        account = write(*arguments, **named)
        self.world.boundary(f"{name}:after")
        return account


@dataclass(slots=True)
class Machine:
    """Ledger, store, cloud and as many supervisors after one another (or at once) as the faults make."""

    world: World
    cloud: FakeCloud
    store: MemoryStore
    offers: list[Offer]
    num_nodes: int
    cap_usd: float
    skew_seconds: float = 0.0
    away_seconds: float | None = 0.0
    """After a kill: until somebody starts the command again; None: nobody ever does."""
    depth: int = 0
    checks: int = 0
    shortfall_usd: float = 0.0
    """The most by which a lease's true bill was ever above what the ledger had spent and set aside for it."""
    end: str = "nobody came back"
    """How it came to an end; `RunState` of the last supervisor that reached one."""
    moves: bool = False
    """Whether the next start is on another machine, which knows nothing but the run store."""
    log: Callable[[str], None] | None = None
    _checked_at: float = 0.0
    db: sqlite3.Connection = field(init=False)
    runs: Runs = field(init=False)
    run: Run = field(init=False)
    door: SupervisorsDoor = field(init=False)

    def __post_init__(self) -> None:
        self.door = SupervisorsDoor(self.store, self.world)
        self._new_ledger()
        cap = Decimal(int(self.cap_usd * 1_000_000)) / 1_000_000
        self.run = self.runs.create(
            recipe_name="r", recipe_digest="d", recipe_json="{}", options=RunOptions("fake"), cap_usd=cap
        )

    def _new_ledger(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.row_factory = sqlite3.Row
        migrate(self.db)
        self.runs = Runs(self.db)

    def live(self) -> None:
        """Supervise, and start again after each end that is not final, as a careful person would."""
        for _ in range(MAX_STARTS):
            try:
                state = self.supervise()
            except Killed:
                if self.away_seconds is None:
                    return
                self.world.advance(self.away_seconds)
                continue
            except SlmError as error:
                self.tell(f"ended with: {error}")
                self.world.advance(RESTART_SECONDS)
                continue
            if state in TERMINAL and state is not RunState.FAILED:
                self.end = state.value
                return
            self.world.advance(RESTART_SECONDS)
        self.end = "given up"

    def supervise(self) -> RunState:
        self.depth += 1
        try:
            return self._supervisor().run()
        finally:
            self.depth -= 1

    def takes_over_for(self, seconds: float, *, elsewhere: bool = False) -> None:
        """A second supervisor, while the first is held up; it is killed after so long."""
        mine = self.depth + 1
        self.moves = self.moves or elsewhere

        def kill() -> None:
            if self.depth == mine:
                raise Killed

        self.world.after(seconds, kill)
        with suppress(Killed, SlmError):
            self.supervise()

    def _supervisor(self) -> loop.Supervisor:
        if self.moves:
            self.moves = False
            before = self.db, self.runs
            self._new_ledger()
            try:
                run = recover(self.runs, self.door)
            except BaseException as error:  # nothing was made of it: tried again, unless there is nothing to recover
                self.db, self.runs = before
                self.moves = not isinstance(error, UserError)
                raise
            self.tell("recovered on another machine")
            journal = StoreJournal(self.door)
        else:
            run, journal = enter(self.runs, self.run.run_id, self.door, owner=OWNER)
        ledger = WatchedLedger(self.db, run.run_id, fencing_token=run.fencing_token, journal=journal)
        ledger.world = self.world
        clock = self._clock(ledger)
        return loop.Supervisor(
            run_record=run,
            runs=self.runs,
            ledger=ledger,
            backend=self.cloud,
            store=self.door,
            clock=clock,
            terms=same_terms(self.cloud.terms),
            candidates=lambda _: self._candidates(),
            command=["train"],
            owner=OWNER,
            write_spec=self._write_spec,
            emit=self._heard,
            switch=StopSwitch(),
        )

    def unfenced_writes(self) -> int:
        """Records by which a supervisor raised what may be spent after another had taken over: out of order."""
        records = sorted(key for key in self.store.data if key.startswith(LEDGER))
        tokens = [json.loads(self.store.read(key))["fencing_token"] for key in records]
        return sum(1 for before, after in itertools.pairwise(tokens) if after < before)

    def _clock(self, ledger: Ledger) -> SkewedClock:
        wall_ms = ORIGIN_MS + int((self.world.t + self.skew_seconds) * 1000)
        floor_ms = max(ledger.newest_ms(), heard_ms(self.door, ledger.open_accounts()))
        return SkewedClock(self.world, start_ms(wall_ms, floor_ms, ledger.last_moment_ms()))

    def _candidates(self) -> list[Candidate]:
        counts = dict.fromkeys((self.num_nodes, 1))
        return [
            Candidate(offer, count, needed_usd(offer, self.cloud.terms, num_nodes=count))
            for count in counts
            for offer in self.offers
        ]

    def _write_spec(self, lease: Lease) -> None:
        self.door.write(SPEC, lease.lease_id.encode())

    def _heard(self, event: Event) -> None:
        if event.kind != "progress" or self.world.t > self._checked_at + CHECK_SECONDS:
            self.check()
        if event.kind != "progress":
            self.tell(event.message)

    def tell(self, text: str) -> None:
        if self.log is not None:
            self.log(f"{self.world.t:9.1f} {text}")

    def check(self) -> None:
        """The ledger's promise at this moment, lease by lease: what was billed so far is spent or set aside."""
        rows = self.db.execute(
            "SELECT lease_id, SUM(spent_micro_usd) + SUM(held_micro_usd) AS sum FROM entries GROUP BY lease_id"
        )
        covered = {row["lease_id"]: row["sum"] / 1e6 for row in rows}
        self.checks += 1
        self._checked_at = self.world.t
        missing = max((bill - covered.get(lease_id, 0.0) for lease_id, bill in self.cloud.bills().items()), default=0.0)
        if missing > max(self.shortfall_usd, DOLLAR_TOLERANCE):
            self.tell(f"SHORTFALL: the true bill is ${missing:.4f} above spent and held")
            self.shortfall_usd = missing


def rng_of(seed: int) -> random.Random:
    return random.Random(f"cap-{seed}")

"""One rented node: the real guard's decisions on a clock of its own, the provider's time limit, and a training loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from cost.ledger.leases import Lease
from faults.storage import MemoryStore
from faults.world import World
from tasks import run_store_keys as keys
from tasks.guard.decision import END_NODE, STOP_COMMAND, State, decide, issue, parse_answer
from trainer.run_store.base import StoreKeyMissing

CONTACT_SECONDS = 60.0
STEP_SECONDS = 60.0
START_SECONDS = 60.0
"""From boot to the first step."""
CHECKPOINT_SECONDS = 180.0
SAVE_SECONDS = 20.0
GUARD_KILL_SECONDS = 3.0


@dataclass(slots=True)
class Node:
    """`ttl` is the true time at which the provider ends it; `end` is called when it ends."""

    world: World
    store: MemoryStore
    lease: Lease
    rank: int
    boot_seconds: float
    ttl: float | None
    """None while the provider's limit is not armed."""
    ttl_latency: float
    end: Callable[[Node], None]
    command_ended: Callable[[Node, int], None]
    usd_per_hour: Callable[[], float]
    guarded: bool = True
    created: float = 0.0
    ended: float | None = None
    hung: bool = False
    cut: bool = False
    ttl_works: bool = True
    late_seconds: float = 0.0
    """How much longer than kappa its terminators take: broken on purpose."""
    is_stray: bool = False
    """Created after its lease was settled: broken on purpose."""
    hung_unarmed: bool = False
    """Hung before its provider's limit was armed: broken on purpose."""
    guard: State | None = None
    clock_offset: float = 0.0
    training_since: float | None = None
    stopped: bool = False
    kept_usd: float = 0.0
    unsaved_usd: float = 0.0
    startup_usd: float = 0.0
    """What the whole lease cost until its first step; on the first node."""
    _last_tick: float = 0.0
    _last_save: float = 0.0
    step: Callable[[], int] = field(default=lambda: 0)

    def begin(self) -> None:
        self.created = self.world.t
        self.clock_offset = self.world.rng.uniform(0, 1e6)
        self.world.after(self.boot_seconds, self._boot)
        if self.ttl is not None:
            self.move_ttl(self.ttl)

    @property
    def alive(self) -> bool:
        return self.ended is None

    def move_ttl(self, until: float) -> None:
        self.ttl = until
        self.world.at(until + self.ttl_latency, self._ttl_fires)

    def kill_late(self, seconds: float) -> None:
        self.ttl_latency += seconds
        self.late_seconds = seconds
        if self.ttl is not None:
            self.move_ttl(self.ttl)

    def _ttl_fires(self) -> None:
        due = self.ttl is not None and self.world.t >= self.ttl + self.ttl_latency - 1e-6
        if self.alive and self.ttl_works and due:
            self.end(self)

    # -- guard

    def _boottime(self) -> float:
        return self.world.t + self.clock_offset

    def _boot(self) -> None:
        if not self.alive or self.hung:
            return
        if self.guarded:
            self.guard = State(deadline=self._boottime() + self.lease.first_grant_seconds)
            self._guard_wakes_at_deadline()
            self._contact()
        if self.rank == 0:
            self.world.after(START_SECONDS, self._train)

    def _guard_wakes_at_deadline(self) -> None:
        assert self.guard is not None
        self.world.at(self.guard.deadline - self.clock_offset, self._decide)

    def _decide(self, data: bytes | None = None) -> None:
        if not self.alive or self.hung or self.guard is None:
            return
        before = self.guard
        answer = parse_answer(data) if data is not None else None
        self.guard, action = decide(before, self._boottime() + 1e-6, answer)
        if action == STOP_COMMAND:
            self.stopped = True
        if action == END_NODE:
            self.world.after(GUARD_KILL_SECONDS, lambda: self.end(self) if self.alive else None)
        elif self.guard.deadline != before.deadline:
            self._guard_wakes_at_deadline()

    def _contact(self) -> None:
        if not self.alive or self.hung or self.guard is None:
            return
        if not self.cut:
            self.guard, number = issue(self.guard, self._boottime(), int(self.world.t * 1000) + 1)
            request = {"number": number, "boottime": self._boottime(), "state": "running", "exit_code": None}
            self.store.write(keys.guard_request(self.lease.lease_id, self.rank), json.dumps(request).encode())
            with suppress(StoreKeyMissing):
                self._decide(self.store.read(keys.grant(self.lease.lease_id, self.rank)))
        self.world.after(CONTACT_SECONDS, self._contact)

    def lose_guard(self) -> None:
        """The guard is killed; its watchdog starts it again with what it had saved: deadline, fencing token, number."""
        if self.guard is not None:
            self.guard = replace(self.guard, issued=())

    def reboot(self) -> None:
        """The guard finds a deadline of another boot, and ends the node."""
        if self.guard is not None and self.alive and not self.hung:
            self.guard = State(deadline=self._boottime(), ending=True)
            self.stopped = True
            self.world.after(30.0, self._decide)

    # -- training, on the first node for all

    def _train(self) -> None:
        if not self.alive or self.hung or self.stopped:
            return
        now = self.world.t
        if self.training_since is None:
            self.training_since = self._last_save = now
            self.startup_usd = self.usd_per_hour() * (now - self.created) / 3600
        else:
            self.unsaved_usd += self.usd_per_hour() * (now - self._last_tick) / 3600
        self._last_tick = now
        if self._told_to_stop():
            self.stopped = True
            self.save()
            self.world.after(SAVE_SECONDS, lambda: self.command_ended(self, keys.EXIT_STOPPED))
            return
        if now - self._last_save >= CHECKPOINT_SECONDS:
            self.save()
        if not self.cut:
            progress = {"step": self.step(), "incarnation": self.lease.attempt, "tokens": 1}
            self.store.write(keys.PROGRESS, json.dumps(progress).encode())
        self.world.after(STEP_SECONDS, self._train)

    def save(self) -> None:
        if not self.cut:
            self.kept_usd += self.unsaved_usd
            self.unsaved_usd = 0.0
            self._last_save = self.world.t

    def _told_to_stop(self) -> bool:
        return not self.cut and keys.control(self.lease.lease_id) in self.store.data

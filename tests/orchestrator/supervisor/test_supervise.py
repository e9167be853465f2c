"""The loop against a fake cloud and a clock that moves only when somebody sleeps."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import SlmError
from cost.ledger.database import DatabaseError, connect
from cost.ledger.leases import Lease
from cost.ledger.ledger import EntryKind, Fenced, Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from cost.market.providers import PriceBound, Ttl
from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from orchestrator.events import Event
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs, RunState
from orchestrator.supervisor.grants import heard_ms
from orchestrator.supervisor.lease_policy import Terms, same_terms, worst_price
from orchestrator.supervisor.lease_watch import StopSwitch
from orchestrator.supervisor.supervise import Supervisor
from trainer.run_store.base import DirectoryStore, StoreError

SCALE = 60.0
"""One real second is one billed minute."""
PRICE = Decimal("0.60")
"""Dollars per node-hour: one cent per node and real second."""


def an_offer(region: str) -> Offer:
    return Offer(
        cloud="gcp",
        region=region,
        zone=None,
        instance_type=None,
        accelerator="L4",
        gpus_per_node=1,
        gpu_memory_gib=24.0,
        spot=True,
        usd_per_hour=PRICE,
        on_demand_usd_per_hour=Decimal("1.20"),
        as_of="",
        source="test",
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
    """A run, its ledger, its cloud, and a trainer that takes `step_seconds` a step with two nodes."""

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
        candidates = [Candidate(an_offer(f"zone-{i}"), nodes, Decimal("0.50")) for i in range(offers)]
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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def check_ledger(world: World) -> None:
    """The ledger is never under the cloud's own bill, never over the cap, and nothing lives."""
    balance = world.ledger.balance()
    assert world.backend.true_bill_usd() <= balance.spent_usd <= world.cap
    assert balance.held_usd == 0
    assert world.backend.list_alive() == []


def test_a_calm_run_finishes_and_pays_for_what_it_used(world: World) -> None:
    assert world.supervisor().run() is RunState.SUCCEEDED
    check_ledger(world)
    # 15 s to start and 60 steps of 1 s on two nodes at a cent per node-second, and a turn of the loop or two.
    assert Decimal("1.48") <= world.ledger.balance().spent_usd <= Decimal("1.56")
    assert world.runs.get(world.run.run_id).state is RunState.SUCCEEDED


def test_the_reservation_is_in_the_ledger_before_the_rent(world: World) -> None:
    held_at_start: list[Decimal] = []
    world.backend.on_start = lambda backend, lease: (
        held_at_start.append(world.ledger.balance().held_usd),
        world.trainer_starts(backend, lease),
    )[0]
    world.supervisor().run()
    # 2 s to ask, 10 s to boot, 37 s first grant and 5 s to kill, two nodes, one cent each per second.
    assert held_at_start == [Decimal("1.08")]


def test_grants_answer_each_request_and_end_before_what_is_paid(world: World) -> None:
    supervisor = world.supervisor()
    seen: list[tuple[int, float, float]] = []

    def look() -> None:
        for account in world.ledger.open_accounts():
            key = f"grants/{account.lease.lease_id}/0.json"
            if key in world.store.list("grants/"):
                grant = json.loads(world.store.read(key))
                paid = (account.expires_ms - world.clock.now_ms()) / 1000 / SCALE
                seen.append((grant["number"], grant["duration_seconds"], paid))
                assert grant["fencing_token"] == world.ledger.fencing_token
        world.clock.after(5.0, look)

    world.clock.after(20.0, look)
    world.clock.after(110.0, lambda: None)  # the agenda may outlive the run
    supervisor.run()
    assert len({number for number, _, _ in seen}) >= 8
    assert all(0 < duration <= paid + 5.0 for _, duration, paid in seen)


def test_a_preempted_lease_is_settled_and_the_next_offer_is_rented(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]
    assert world.runs.get(world.run.run_id).preemptions == 1
    check_ledger(world)


def test_a_preempted_zone_is_left_though_another_machine_there_is_next_in_the_plan(world: World) -> None:
    supervisor = world.supervisor()
    zone_0, zone_1 = supervisor.candidates(Decimal(0))
    larger = replace(zone_0, offer=replace(zone_0.offer, instance_type="larger"))
    supervisor.candidates = lambda _: [zone_0, larger, zone_1]
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id))
    assert supervisor.run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]


def test_losing_the_head_ends_the_whole_lease(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id, 0))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 2
    check_ledger(world)


def test_a_damaged_checkpoint_that_the_workers_passed_over_is_told(world: World) -> None:
    record = {"incarnation": 1, "skipped": ["step 40 of incarnation 0: part a.distcp has another checksum"]}
    world.store.write("incarnations/1.json", json.dumps(record).encode())
    world.supervisor().run()
    told = [message for message in world.told("warning") if "passed over" in message]
    assert told == [
        "a damaged checkpoint was passed over for the one before: "
        "step 40 of incarnation 0: part a.distcp has another checksum"
    ]


def test_a_head_that_leaves_as_announced_is_a_preemption(world: World) -> None:
    def leave() -> None:
        lease_id = world.backend.starts[0].lease_id
        world.noticed = True
        world.clock.after(5.0, lambda: world.backend.end_command(lease_id, 40))

    world.clock.after(30.0, leave)
    assert world.supervisor().run() is RunState.SUCCEEDED
    run = world.runs.get(world.run.run_id)
    assert (run.preemptions, run.failures) == (1, 0)
    assert world.told("notice")[0] == "the cloud will take node 0 of slm-abc123-tiny-1-1"
    check_ledger(world)


def test_losing_another_node_keeps_the_lease_and_rents_that_node_again(world: World) -> None:
    world.clock.after(30.0, lambda: world.backend.take(world.backend.starts[0].lease_id, 1))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 1 and len(world.backend.starts) == 2
    assert "lost" in world.kinds() and "grown" in world.kinds()
    check_ledger(world)


def test_without_capacity_to_grow_it_goes_on_smaller_and_owes_nothing_for_the_try(world: World) -> None:
    def take() -> None:
        world.backend.take(world.backend.starts[0].lease_id, 1)
        world.backend.capacity = 1

    world.clock.after(30.0, take)
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert any("no node to grow back" in message for message in world.told("warning"))
    check_ledger(world)


def test_no_capacity_anywhere_waits_at_no_cost(world: World) -> None:
    world.backend.capacity = 0
    world.clock.after(40.0, lambda: setattr(world.backend, "capacity", 10))
    assert world.supervisor().run() is RunState.SUCCEEDED
    spent = [entry.spent_micro_usd for entry in world.ledger.entries() if entry.kind is EntryKind.ACCRUE]
    assert sum(spent) < 1_600_000
    assert any("at $0" in message for message in world.told("relaunch"))
    check_ledger(world)


def test_at_the_cap_it_asks_for_a_checkpoint_and_stops_under_it(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"), num_steps=10_000)
    assert world.supervisor().run() is RunState.OUT_OF_BUDGET
    check_ledger(world)
    assert world.ledger.balance().spent_usd > Decimal("0.80")
    assert any("drain threshold" in message for message in world.told("warning"))


def test_a_trainer_that_does_not_hear_the_drain_is_ended_within_the_cap(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"), num_steps=10_000, deaf=True)
    assert world.supervisor().run() is RunState.OUT_OF_BUDGET
    check_ledger(world)


def test_a_higher_cap_lets_it_go_on(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.30"))
    world.supervisor().run()
    reached = world.step
    world.cap = Decimal("50")
    supervisor = world.supervisor()
    world.ledger.set_cap(world.cap)
    assert supervisor.run() is RunState.SUCCEEDED
    assert 0 < reached < world.step == world.num_steps
    check_ledger(world)


def test_a_bug_stops_the_run_and_says_what_it_was(tmp_path: Path) -> None:
    world = World(tmp_path, bug_at=7)
    assert world.supervisor().run() is RunState.FAILED
    assert "step 7: ValueError: shapes" in world.runs.get(world.run.run_id).reason
    assert len(world.backend.starts) == 1
    check_ledger(world)


def test_a_cluster_that_breaks_again_and_again_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, breaks_at_start=True)
    assert world.supervisor().run() is RunState.FAILED
    assert "failures in a row" in world.runs.get(world.run.run_id).reason
    assert world.runs.get(world.run.run_id).failures == 6
    check_ledger(world)


def test_a_stop_checkpoints_and_ends(world: World) -> None:
    world.clock.after(30.0, lambda: world.runs.request_stop(world.run.run_id))
    assert world.supervisor().run() is RunState.STOPPED
    check_ledger(world)


def test_ctrl_c_twice_ends_at_once(world: World) -> None:
    world.deaf = True
    world.clock.after(30.0, world.switch.press)
    world.clock.after(31.0, world.switch.press)
    assert world.supervisor().run() is RunState.STOPPED
    assert world.clock.real_seconds() < 40
    check_ledger(world)


def test_a_run_store_that_vanishes_ends_the_nodes_and_is_named(world: World) -> None:
    world.clock.after(30.0, lambda: shutil.rmtree(world.path / "store"))
    with pytest.raises(StoreError, match="store"):
        world.supervisor().run()
    run = world.runs.get(world.run.run_id)
    assert run.state is RunState.FAILED and "store" in run.reason
    check_ledger(world)


def test_a_ledger_that_can_not_be_written_ends_the_nodes(tmp_path: Path) -> None:
    """A full disk: no entry can be made, so nothing can be paid for any longer."""
    world = World(tmp_path, num_steps=600)
    supervisor = world.supervisor()
    world.clock.after(30.0, lambda: world.db.execute("PRAGMA max_page_count = 1") and None)
    with pytest.raises(DatabaseError, match=r"the ledger cannot be written: .*full; free disk space"):
        supervisor.run()
    assert world.backend.list_alive() == []
    world.db.execute("PRAGMA max_page_count = 1000000")
    assert world.supervisor().run() is RunState.SUCCEEDED
    check_ledger(world)


def test_a_broken_cluster_is_told_with_its_last_words(tmp_path: Path) -> None:
    world = World(tmp_path, breaks_at_start=True)
    world.clock.after(1.0, lambda: world.store.write("logs/slm-abc123-tiny-1-1-0.log", b"ok\nno port is free\n\n"))
    world.supervisor().run()
    assert any("exit code 30 after: no port is free" in message for message in world.told("relaunch"))


class Killed(BaseException):
    """The supervisor's process ends here."""


@pytest.mark.parametrize("moment", [0.5, 8.0, 16.0, 33.0, 60.0])
def test_a_killed_supervisor_is_replaced_and_adopts_the_lease(world: World, moment: float) -> None:
    def kill() -> None:
        raise Killed

    world.clock.after(moment, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len({lease.lease_id for lease in world.backend.starts}) == 1
    check_ledger(world)


def test_a_supervisor_that_comes_back_late_finds_nothing_alive_and_starts_again(world: World) -> None:
    def kill() -> None:
        raise Killed

    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    world.clock.sleep(3600)  # the provider's own limit ended the nodes long ago
    assert world.backend.list_alive() == []
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 2
    check_ledger(world)


@pytest.mark.parametrize("spoke", [True, False])
def test_a_lease_whose_nodes_all_came_is_settled_without_waiting_for_more_to_come(world: World, spoke: bool) -> None:
    def kill() -> None:
        raise Killed

    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0, create_seconds=600.0)
    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor(terms=terms).run()
    (lease,) = world.backend.starts
    world.backend.stop(lease)  # its guards ended it, long before the provider's limit
    if not spoke:
        world.store.delete(f"guard/{lease.lease_id}/1/request.json")
    back = world.clock.real_seconds()
    restarted: list[float] = []
    world.backend.on_start = lambda backend, lease: (
        restarted.append(world.clock.real_seconds() - back),
        world.trainer_starts(backend, lease),
    )[0]
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    assert (restarted[0] < 10) is spoke
    check_ledger(world)


def test_the_old_supervisor_is_powerless_after_a_take_over(world: World) -> None:
    old = world.supervisor()
    world.clock.after(30.0, lambda: world.runs.take_over(world.run.run_id))
    with pytest.raises((Fenced, SlmError), match="taken over"):
        old.run()
    world.supervisor().run()
    check_ledger(world)


def test_a_create_without_a_reply_is_ended_and_charged(world: World) -> None:
    world.backend.fail_next = 1
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 2
    check_ledger(world)


def test_a_provider_that_does_not_answer_for_a_while_is_waited_for(world: World) -> None:
    world.clock.after(30.0, lambda: setattr(world.backend, "fail_next", 5))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert any("cannot see" in message for message in world.told("warning"))
    check_ledger(world)


def test_an_instance_that_the_ledger_does_not_know_is_ended(world: World) -> None:
    supervisor = world.supervisor()
    stray = Lease("slm-abc123-other-1", "other", 1, an_offer("zone-9"), 1, PRICE, 600.0, 5.0, 1)
    world.backend.on_start = None
    world.backend.start(stray, ["x"])
    world.backend.on_start = world.trainer_starts
    supervisor.run()
    assert any("slm-abc123-other-1" in message for message in world.told("warning"))
    assert world.backend.list_alive() == []


def test_the_worst_price_is_on_demand_unless_the_price_is_fixed() -> None:
    offer = an_offer("zone-0")
    assert worst_price(offer, PriceBound.FIXED) == PRICE
    assert worst_price(offer, PriceBound.ON_DEMAND) == Decimal("1.20")


def test_an_offer_whose_price_nothing_bounds_is_not_rented() -> None:
    with pytest.raises(SlmError, match="nothing bounds the future price"):
        worst_price(replace(an_offer("zone-0"), on_demand_usd_per_hour=None), PriceBound.ON_DEMAND)


def test_a_list_that_lies_once_frees_nothing(world: World) -> None:
    """A node that is missing from a list for less than `confirm_seconds` may live, and stays paid for."""
    world.clock.after(30.0, lambda: world.backend.hidden.add(1))
    world.clock.after(34.0, world.backend.hidden.clear)
    assert world.supervisor(terms=Terms(confirm_seconds=6.0)).run() is RunState.SUCCEEDED
    assert "lost" not in world.kinds()
    check_ledger(world)


def test_a_node_that_comes_back_after_it_was_given_up_is_paid_for(world: World) -> None:
    world.clock.after(30.0, lambda: (world.backend.hidden.add(1), setattr(world.backend, "capacity", 0))[0])
    world.clock.after(50.0, world.backend.hidden.clear)
    assert world.supervisor(terms=Terms(confirm_seconds=3.0, grow_delay_seconds=60.0)).run() is RunState.SUCCEEDED
    sizes = [entry.note for entry in world.ledger.entries() if "nodes" in entry.note]
    assert sizes == ["2 -> 1 nodes", "1 -> 2 nodes"]


def test_a_lease_that_is_gone_by_a_lie_is_waited_for_before_it_is_settled(world: World) -> None:
    """The interface hides both nodes and does not end them: only after the silence is the lease settled."""
    world.clock.after(30.0, lambda: (world.backend.hidden.update({0, 1}), setattr(world.backend, "deaf_to_stop", True)))
    world.clock.after(33.0, lambda: (world.backend.hidden.clear(), setattr(world.backend, "deaf_to_stop", False)))
    assert world.supervisor(terms=Terms(confirm_seconds=6.0)).run() is RunState.SUCCEEDED
    check_ledger(world)


def test_a_price_above_the_bound_ends_the_node_before_its_first_grant(world: World) -> None:
    def prices(backend: FakeBackend, lease: Lease) -> None:
        backend.usd_per_hour = PRICE * 3 if lease.attempt == 1 else None
        if lease.attempt > 1:
            world.trainer_starts(backend, lease)

    world.backend.on_start = prices
    assert world.supervisor().run() is RunState.SUCCEEDED
    first, second = world.ledger.accounts()[:2]
    assert (first.outcome, second.lease.offer.region) == ("too_dear", "zone-1")
    assert not world.store.list(f"grants/{first.lease.lease_id}/")
    assert any("a node costs $1.80/h now, and at most $0.60/h" in message for message in world.told("relaunch"))


def test_prices_above_their_bound_everywhere_end_the_run(world: World) -> None:
    world.backend.usd_per_hour = PRICE * 3
    assert world.supervisor().run() is RunState.FAILED
    assert "every offer costs more than its worst-case price" in world.runs.get(world.run.run_id).reason
    assert len(world.backend.starts) == 2 and world.backend.list_alive() == []


def test_a_rent_that_comes_late_after_its_reservation_is_paid_anew(world: World) -> None:
    supervisor = world.supervisor()
    supervisor.write_spec = lambda lease: world.clock.sleep(100.0)
    left: list[float] = []

    def look(backend: FakeBackend, lease: Lease) -> None:
        left.append((world.ledger.account(lease.lease_id).expires_ms - world.clock.now_ms()) / 1000 / SCALE)
        world.trainer_starts(backend, lease)

    world.backend.on_start = look
    assert supervisor.run() is RunState.SUCCEEDED
    assert left == [49.0]  # 2 s to ask, 10 s to boot and 37 s first grant, from the rent and not from the reservation
    check_ledger(world)


def test_a_late_rent_that_the_cap_can_no_longer_pay_is_not_made(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("1.06"))
    supervisor = world.supervisor()
    supervisor.write_spec = lambda lease: world.clock.sleep(100.0)
    assert supervisor.run() is RunState.OUT_OF_BUDGET
    assert world.backend.starts == [] and world.ledger.balance().spent_usd == 0


def test_a_supervisor_held_up_before_the_rent_learns_there_that_it_was_replaced(world: World) -> None:
    """Its successor finds nothing alive and settles; nodes rented now would be paid for by nobody."""
    old = world.supervisor()

    def taken_over(lease: Lease) -> None:
        new = world.supervisor()
        new.ledger.settle(lease.lease_id, ended_ms=world.clock.now_ms(), at_ms=world.clock.now_ms(), outcome="expired")

    old.write_spec = taken_over
    with pytest.raises(Fenced, match="taken over"):
        old.run()
    assert world.backend.starts == []


def test_a_wall_clock_ahead_does_not_settle_what_still_lives(world: World) -> None:
    """The next supervisor's clock says that the last terminator has fired; only its own waiting proves that."""

    def kill() -> None:
        raise Killed

    world.clock.after(30.0, kill)
    with pytest.raises(Killed):
        world.supervisor().run()
    lease_id = world.backend.starts[0].lease_id
    world.clock._now_ms += 7_200_000
    world.backend.fail_next = 4
    open_while_alive: list[bool] = []
    world.clock.after(3.0, lambda: open_while_alive.append(world.ledger.account(lease_id).is_open))
    assert world.supervisor().run() is RunState.SUCCEEDED
    assert open_while_alive == [True]
    assert world.backend.list_alive() == []


def test_the_ledger_is_settled_by_its_newest_expiry_when_the_store_fails(world: World) -> None:
    """The interface does not end the nodes, so they cost money until the provider's limit: so long it stays open."""
    world.num_steps = 10_000

    def fail() -> None:
        world.backend.deaf_to_stop = True
        shutil.rmtree(world.path / "store")

    world.clock.after(120.0, fail)
    with pytest.raises(StoreError):
        world.supervisor().run()
    check_ledger(world)


def test_strangers_are_looked_for_while_a_run_goes_on(world: World) -> None:
    stray = Lease("slm-abc123-other-1", "other", 1, an_offer("zone-9"), 1, PRICE, 600.0, 5.0, 1)
    world.clock.after(22.0, lambda: (setattr(world.backend, "on_start", None), world.backend.start(stray, ["x"]))[0])
    assert world.supervisor(terms=Terms(reconcile_seconds=10.0)).run() is RunState.SUCCEEDED
    assert any("slm-abc123-other-1" in message for message in world.told("warning"))


def test_half_of_the_cap_is_told_once_also_when_it_passes_between_steps(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("2.30"), num_steps=100)
    world.clock.after(20.0, lambda: world.backend.take(world.backend.starts[-1].lease_id))
    world.supervisor().run()
    told = [event.data["percent"] for event in world.events if event.kind == "warning" and "percent" in event.data]
    assert told == sorted(set(told)) and told[0] == 50 and told[-1] >= 80


def test_a_price_that_rose_moves_the_run_where_the_rest_costs_less(world: World) -> None:
    supervisor = world.supervisor(terms=Terms(price_bound=PriceBound.ON_DEMAND))
    here, there = supervisor.candidates(Decimal(0))
    both = [replace(here, expected_usd=Decimal("10.00")), replace(there, expected_usd=Decimal("10.50"))]
    supervisor.candidates = lambda _: both
    world.clock.after(20.0, lambda: setattr(world.backend, "usd_per_hour", Decimal("1.10")))
    world.backend.on_start = lambda backend, lease: (
        setattr(backend, "usd_per_hour", None) if lease.attempt > 1 else None,
        world.trainer_starts(backend, lease),
    )[0]
    assert supervisor.run() is RunState.SUCCEEDED
    assert [lease.offer.region for lease in world.backend.starts] == ["zone-0", "zone-1"]
    assert [account.outcome for account in world.ledger.accounts()] == ["dearer", "finished"]


def test_a_limit_that_cannot_be_moved_is_rolled_over_and_is_no_preemption(world: World) -> None:
    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=40.0)
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    outcomes = [account.outcome for account in world.ledger.accounts()]
    assert outcomes[-1] == "finished" and set(outcomes[:-1]) == {"ttl"} and len(outcomes) > 1
    assert {lease.offer.region for lease in world.backend.starts} == {"zone-0"}
    assert world.runs.get(world.run.run_id).preemptions == 0
    assert world.ledger.balance().spent_usd >= world.backend.true_bill_usd()


def test_a_fixed_limit_is_set_aside_as_a_whole_and_granted_bit_by_bit(world: World) -> None:
    held: list[Decimal] = []
    terms = Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0)
    world.clock.after(30.0, lambda: held.append(world.ledger.balance().held_usd))
    world.supervisor(terms=terms).run()
    assert held[0] > Decimal("3.50")  # some 190 s more of two nodes, one cent each per second
    grants = json.loads(world.store.read(f"grants/{world.backend.starts[0].lease_id}/0.json"))
    assert grants["duration_seconds"] <= terms.term_seconds


def test_grants_say_how_late_it_was_to_a_ledger_that_holds_no_accruals(world: World) -> None:
    """A clock set back by hours shows only against the newest moment that anything tells of."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((heard_ms(world.store, world.ledger.open_accounts()), world.clock.now_ms()))

    world.clock.after(45.0, look)
    world.supervisor(terms=Terms(ttl=Ttl.FIXED, fixed_ttl_seconds=200.0)).run()
    ((heard, now),) = seen
    assert now - 30_000 * SCALE <= heard <= now
    assert heard_ms(world.store, []) == 0


class AwayStore(DirectoryStore):
    """Cannot be written to while `away`."""

    away = False

    def write(self, key: str, data: bytes) -> None:
        if self.away:
            raise StoreError("the store does not answer; run the command again.")
        super().write(key, data)


def test_a_store_that_is_away_for_less_than_a_grant_ends_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    store = AwayStore(tmp_path / "store")
    supervisor = world.supervisor()
    supervisor.store = store
    world.clock.after(15.0, lambda: setattr(store, "away", True))
    world.clock.after(25.0, lambda: setattr(store, "away", False))
    assert supervisor.run() is RunState.SUCCEEDED
    assert len(world.backend.starts) == 1
    assert any("nothing is granted while the run store is away" in event.message for event in world.events)


def test_a_prepaid_account_is_set_aside_as_a_whole_and_no_more_is_rented_than_it_holds(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("3.00"))
    terms = Terms(balance_usd=Decimal("5.00"))
    assert world.supervisor(terms=terms).run() is RunState.OUT_OF_BUDGET
    assert world.backend.starts == []  # $5 on the account could all be used up, and the cap is $3
    world = World(tmp_path / "more", cap=Decimal("9.00"))
    assert world.supervisor(terms=terms).run() is RunState.SUCCEEDED
    assert world.backend.starts[0].ttl_seconds == pytest.approx(250.0)  # $5 at two cents a second

"""The ledger in the run store: written first, one order for all machines, and enough to go on elsewhere."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cost.errors import BudgetExceeded, UserError
from cost.ledger.database import connect
from cost.ledger.journal import JournalDamaged
from cost.ledger.leases import Lease
from cost.ledger.ledger import Fenced, Ledger, replay
from orchestrator.runs.journal import StoreJournal, enter, recover
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs
from tasks.run_store_keys import ledger_record
from tests.support.builders import make_lease, make_offer
from trainer.run_store.base import DirectoryStore, StoreError

HOUR_MS = 3_600_000
START_MS = 1_800_000_000_000


class FlakyStore(DirectoryStore):
    """A folder whose next conditional writes are lost: before they take effect, or after."""

    lost_before = lost_after = acknowledged_only = 0

    def create(self, key: str, data: bytes) -> bool:
        if self.lost_before:
            self.lost_before -= 1
            raise StoreError("the store does not answer; run the command again.")
        if self.acknowledged_only:
            self.acknowledged_only -= 1
            return True
        created = super().create(key, data)
        if self.lost_after:
            self.lost_after -= 1
            raise StoreError("the store does not answer; run the command again.")
        return created


class Machine:
    """One computer with a ledger of its own, over a store that others reach too."""

    def __init__(self, home: Path, store: DirectoryStore, owner: str) -> None:
        self.runs, self.store, self.owner = Runs(connect(home / "slm.db")), store, owner

    def create(self) -> Run:
        return self.runs.create(
            recipe_name="tiny", recipe_digest="d", recipe_json="{}", options=RunOptions("fake"), cap_usd=Decimal(100)
        )

    def enter(self, run_id: str) -> Ledger:
        run, journal = enter(self.runs, run_id, self.store, owner=self.owner)
        return Ledger(self.runs.db, run_id, fencing_token=run.fencing_token, journal=journal)


@pytest.fixture
def store(tmp_path: Path) -> FlakyStore:
    return FlakyStore(tmp_path / "store")


@pytest.fixture
def laptop(tmp_path: Path, store: FlakyStore) -> Machine:
    return Machine(tmp_path / "laptop", store, "aaaaaa")


@pytest.fixture
def desktop(tmp_path: Path, store: FlakyStore) -> Machine:
    return Machine(tmp_path / "desktop", store, "bbbbbb")


def a_lease(attempt: int = 1, *, nodes: int = 1, price: str = "1.00", **more: Any) -> Lease:
    offer = make_offer(
        cloud="nebius",
        region="eu-north1",
        instance_type="gpu-h100",
        usd_per_hour=price,
        on_demand_usd_per_hour="2.95",
        as_of="2026-05-08",
    )
    return make_lease(
        offer,
        lease_id=f"slm-aaaaaa-tiny-1-{attempt}",
        run_id="tiny-1",
        attempt=attempt,
        num_nodes=nodes,
        worst_usd_per_hour=price,
        **more,
    )


def reserve(ledger: Ledger, attempt: int = 1, *, hours: int = 1) -> None:
    ledger.reserve(a_lease(attempt), expires_ms=START_MS + hours * HOUR_MS, latency_ms=0, at_ms=START_MS)


def adds_up(ledger: Ledger) -> None:
    spent, held = replay(ledger.entries())
    accounts, lines = ledger.accounts(), ledger.lines()
    assert spent == sum(account.spent_micro_usd for account in [*accounts, *lines])
    assert held == sum(account.held_micro_usd for account in [*accounts, *lines])


def test_a_reservation_stands_in_the_store_before_it_counts(laptop: Machine, store: FlakyStore) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    store.lost_before = 1
    with pytest.raises(StoreError):
        reserve(ledger)
    assert ledger.accounts() == [] and ledger.balance().held_usd == 0
    reserve(ledger)
    newest = json.loads(store.read(ledger_record(1)))
    assert [entry["held_micro_usd"] for entry in newest["entries"]] == [1_000_000]


def test_a_reservation_whose_reply_was_lost_counts_from_the_next_look(laptop: Machine, store: FlakyStore) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    store.lost_after = 1
    with pytest.raises(StoreError):
        reserve(ledger)
    with pytest.raises(BudgetExceeded):  # $1 of the first is set aside by now: the journal was read first
        reserve(ledger, 2, hours=100)
    assert [account.lease.attempt for account in ledger.open_accounts()] == [1]
    assert ledger.balance().held_usd == 1
    adds_up(ledger)


def test_a_write_that_is_only_acknowledged_reserves_nothing(laptop: Machine, store: FlakyStore) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    store.acknowledged_only = 1
    with pytest.raises(StoreError, match="is not there; nothing is rented"):
        reserve(ledger)
    assert ledger.accounts() == []


def test_what_lowers_the_sum_is_written_here_while_the_store_is_away(laptop: Machine, store: FlakyStore) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    reserve(ledger)
    store.lost_before = 10
    end = START_MS + HOUR_MS // 2
    ledger.settle(a_lease().lease_id, ended_ms=end, at_ms=end, outcome="finished")
    assert ledger.balance().spent_usd == Decimal("0.5")
    store.lost_before = 0
    assert ledger.mirror()
    kinds = [entry["kind"] for entry in json.loads(store.read(ledger_record(2)))["entries"]]
    assert kinds == ["accrue", "settle", "release"]


def test_a_full_disk_after_the_store_took_the_record_loses_nothing(laptop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    db = laptop.runs.db
    db.execute(
        "CREATE TEMP TRIGGER full AFTER UPDATE OF journal_next ON main.runs BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    with pytest.raises(Exception, match="full"):
        reserve(ledger)
    db.execute("DROP TRIGGER full")
    assert ledger.accounts() == []
    ledger.require_mine()
    assert [account.lease.attempt for account in ledger.open_accounts()] == [1]
    adds_up(ledger)


def test_another_machine_rebuilds_the_ledger_and_takes_the_run(laptop: Machine, desktop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    reserve(ledger)
    ledger.accrue(a_lease().lease_id, at_ms=START_MS + HOUR_MS // 4, usd_per_hour=Decimal("1.00"))
    ledger.renew(a_lease().lease_id, expires_ms=START_MS + 2 * HOUR_MS, at_ms=START_MS + HOUR_MS // 2)
    run = recover(desktop.runs, desktop.store)
    theirs = Ledger(desktop.runs.db, run.run_id, fencing_token=run.fencing_token, journal=StoreJournal(desktop.store))
    assert theirs.balance() == ledger.balance() and run.cap_usd == 100
    assert [(account.expires_ms, account.state) for account in theirs.accounts()] == [(START_MS + 2 * HOUR_MS, "open")]
    assert run.options.owners == ("aaaaaa",) and run.options.store == desktop.store.uri
    for act in (
        lambda: reserve(ledger, 2),
        lambda: ledger.renew(a_lease().lease_id, expires_ms=START_MS + 3 * HOUR_MS, at_ms=START_MS),
        lambda: ledger.set_cap(Decimal(1000)),
        ledger.require_mine,
        ledger.mirror,
    ):
        with pytest.raises(Fenced, match="taken over by another supervisor"):
            act()
    theirs.renew(a_lease().lease_id, expires_ms=START_MS + 3 * HOUR_MS, at_ms=START_MS + HOUR_MS)


def test_recovering_again_changes_nothing(laptop: Machine, desktop: Machine) -> None:
    reserve(laptop.enter(laptop.create().run_id))
    first = recover(desktop.runs, desktop.store)
    again = recover(desktop.runs, desktop.store)
    assert again.fencing_token == first.fencing_token + 1
    ledger = Ledger(desktop.runs.db, "tiny-1", fencing_token=again.fencing_token)
    assert len(ledger.entries()) == 1 and ledger.balance().held_usd == 1


def test_the_first_machine_can_take_the_run_back(laptop: Machine, desktop: Machine) -> None:
    run_id = laptop.create().run_id
    old = laptop.enter(run_id)
    reserve(old)
    lease_id = a_lease().lease_id
    run = recover(desktop.runs, desktop.store)
    theirs = Ledger(desktop.runs.db, run_id, fencing_token=run.fencing_token, journal=StoreJournal(desktop.store))
    end = START_MS + HOUR_MS // 2
    theirs.settle(lease_id, ended_ms=end, at_ms=end, outcome="finished")
    # Unaware of it, the first machine goes on counting time, which only it knows of.
    old.accrue(lease_id, at_ms=START_MS + HOUR_MS // 4, usd_per_hour=Decimal("1.00"))
    back = laptop.enter(run_id)
    assert back.fencing_token > run.fencing_token
    assert [account.state for account in back.accounts()] == ["settled"]
    assert back.balance() == theirs.balance()
    adds_up(back)


def test_costs_that_are_no_nodes_are_set_aside_charged_and_released(laptop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    ledger.set_aside("egress", Decimal(5), at_ms=START_MS)
    assert ledger.balance().free_usd == 95
    ledger.charge("egress", Decimal("1.25"), at_ms=START_MS)
    ledger.charge("egress", Decimal("1.00"), at_ms=START_MS)
    assert (ledger.balance().spent_usd, ledger.balance().held_usd) == (Decimal("1.25"), Decimal("3.75"))
    ledger.charge("egress", Decimal(7), at_ms=START_MS)
    assert (ledger.balance().spent_usd, ledger.balance().held_usd) == (Decimal(7), Decimal(0))
    with pytest.raises(BudgetExceeded):
        ledger.charge("egress", Decimal(101), at_ms=START_MS)
    ledger.set_aside("download", Decimal(2), at_ms=START_MS)
    ledger.close_lines(at_ms=START_MS)
    assert (ledger.balance().spent_usd, ledger.balance().held_usd) == (Decimal(7), Decimal(0))
    adds_up(ledger)


def test_the_stage_of_leases_and_entries_is_in_the_copy(laptop: Machine, desktop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    ledger.reserve_stage("count", Decimal(3), at_ms=START_MS)
    ledger.begin_stage("count", at_ms=START_MS)
    ledger.reserve(replace(a_lease(), stage="count"), expires_ms=START_MS + HOUR_MS, latency_ms=0, at_ms=START_MS)
    run = recover(desktop.runs, desktop.store)
    copied = Ledger(desktop.runs.db, run.run_id, fencing_token=run.fencing_token)
    assert [entry.stage for entry in copied.entries()] == ["count"] * 3
    assert [account.lease.stage for account in copied.accounts()] == ["count"]


def test_records_of_before_there_were_stages_are_read_as_those_of_pre_training(
    laptop: Machine, desktop: Machine, store: FlakyStore
) -> None:
    reserve(laptop.enter(laptop.create().run_id))
    for key in store.list("ledger/"):
        record = json.loads(store.read(key))
        for row in (*record["entries"], *record["leases"]):
            del row["stage"]
        store.write(key, json.dumps(record).encode())
    run = recover(desktop.runs, desktop.store)
    copied = Ledger(desktop.runs.db, run.run_id, fencing_token=run.fencing_token)
    assert [entry.stage for entry in copied.entries()] == ["pretrain"]
    assert [account.lease.stage for account in copied.accounts()] == ["pretrain"]


def test_a_node_that_lived_shortly_is_charged_for_its_shortest_billed_time(laptop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    lease = a_lease(nodes=2, minimum_billed_seconds=1800.0)
    ledger.reserve(lease, expires_ms=START_MS + 60_000, latency_ms=0, at_ms=START_MS)
    assert ledger.balance().held_usd == 1  # half an hour of two nodes, though they are granted a minute
    ledger.resize(lease.lease_id, num_nodes=1, at_ms=START_MS + 60_000, usd_per_hour=Decimal("1.00"))
    assert ledger.balance().spent_usd + ledger.balance().held_usd == 1
    ledger.settle(lease.lease_id, ended_ms=START_MS + 60_000, at_ms=START_MS + 60_000, outcome="preempted")
    assert (ledger.balance().spent_usd, ledger.balance().held_usd) == (Decimal(1), Decimal(0))


def test_what_was_never_rented_owes_no_shortest_time(laptop: Machine) -> None:
    ledger = laptop.enter(laptop.create().run_id)
    lease = a_lease(minimum_billed_seconds=1800.0)
    ledger.reserve(lease, expires_ms=START_MS + 60_000, latency_ms=0, at_ms=START_MS)
    ledger.settle(lease.lease_id, ended_ms=START_MS, at_ms=START_MS, outcome="no_capacity", rented=False)
    assert ledger.balance().spent_usd == 0


def test_a_damaged_record_stops_everything_that_would_spend(laptop: Machine, desktop: Machine) -> None:
    reserve(laptop.enter(laptop.create().run_id))
    laptop.store.write(ledger_record(1), b'{"fencing_token"')
    with pytest.raises(JournalDamaged, match="record 1 of the ledger"):
        recover(desktop.runs, desktop.store)


def test_a_folder_without_a_ledger_is_named(desktop: Machine) -> None:
    with pytest.raises(UserError, match="holds no ledger of a run"):
        recover(desktop.runs, desktop.store)


def test_a_run_of_the_same_name_is_not_overwritten(laptop: Machine, desktop: Machine) -> None:
    laptop.enter(laptop.create().run_id)
    desktop.runs.create(
        recipe_name="tiny", recipe_digest="other", recipe_json="{}", options=RunOptions("fake"), cap_usd=Decimal(1)
    )
    with pytest.raises(UserError, match="another run stands in this ledger as tiny-1"):
        recover(desktop.runs, desktop.store)


def test_a_ledger_made_before_there_was_a_copy_is_stored_whole(laptop: Machine, desktop: Machine) -> None:
    run = laptop.runs.take_over(laptop.create().run_id)
    without_copy = Ledger(laptop.runs.db, run.run_id, fencing_token=run.fencing_token)
    reserve(without_copy)
    laptop.enter(run.run_id)
    assert (
        Ledger(desktop.runs.db, "tiny-1", fencing_token=recover(desktop.runs, desktop.store).fencing_token)
        .balance()
        .held_usd
        == 1
    )


class TwoMachines(RuleBasedStateMachine):
    """Any order of the verbs, lost replies and take-overs: no grant is forgotten, and only one machine can grant."""

    @initialize()
    def launch(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.store = FlakyStore(root / "store")
        self.machines = [Machine(root / name, self.store, name * 6) for name in ("a", "b")]
        run_id = self.machines[0].create().run_id
        self.ledgers: list[Ledger | None] = [self.machines[0].enter(run_id), None]
        self.holder: int | None = 0
        self.attempt = 0
        self.granted: dict[str, int] = {}
        self.now = START_MS

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def holds(self, which: int) -> None:
        """Who can grant holds the run; after a take-over whose reply was lost, nobody knows who that is before."""
        assert self.holder in (which, None)
        self.holder = which

    def lease_ids(self, ledger: Ledger) -> list[str]:
        return [account.lease.lease_id for account in ledger.open_accounts()]

    @rule(which=st.integers(0, 1), minutes=st.integers(1, 600))
    def rent(self, which: int, minutes: int) -> None:
        ledger = self.ledgers[which]
        if ledger is None:
            return
        self.attempt += 1
        lease = a_lease(self.attempt)
        try:
            ledger.reserve(lease, expires_ms=self.now + minutes * 60_000, latency_ms=0, at_ms=self.now)
        except (StoreError, BudgetExceeded, Fenced):
            return
        self.holds(which)
        self.granted[lease.lease_id] = self.now + minutes * 60_000

    @rule(which=st.integers(0, 1), minutes=st.integers(1, 600), pick=st.integers(0, 5))
    def renew(self, which: int, minutes: int, pick: int) -> None:
        ledger = self.ledgers[which]
        lease_ids = [] if ledger is None else self.lease_ids(ledger)
        if ledger is None or not lease_ids:
            return
        lease_id = lease_ids[pick % len(lease_ids)]
        before = ledger.account(lease_id).expires_ms
        try:
            account = ledger.renew(lease_id, expires_ms=self.now + minutes * 60_000, at_ms=self.now)
        except (StoreError, BudgetExceeded, Fenced):
            return
        if account.expires_ms > before:
            self.holds(which)
            self.granted[lease_id] = account.expires_ms

    @rule(which=st.integers(0, 1), pick=st.integers(0, 5), settle=st.booleans())
    def count_time(self, which: int, pick: int, settle: bool) -> None:
        ledger = self.ledgers[which]
        lease_ids = [] if ledger is None else self.lease_ids(ledger)
        if ledger is None or not lease_ids:
            return
        lease_id = lease_ids[pick % len(lease_ids)]
        with contextlib.suppress(Fenced):
            if settle and which == self.holder:
                ledger.settle(lease_id, ended_ms=self.now, at_ms=self.now, outcome="test")
                self.granted.pop(lease_id, None)
            elif not settle:
                ledger.accrue(lease_id, at_ms=self.now, usd_per_hour=Decimal("1.00"))

    @rule(minutes=st.integers(1, 60))
    def time_passes(self, minutes: int) -> None:
        self.now += minutes * 60_000

    @rule(before=st.integers(0, 2), after=st.integers(0, 2), only_acknowledged=st.integers(0, 1))
    def trouble(self, before: int, after: int, only_acknowledged: int) -> None:
        self.store.lost_before, self.store.lost_after = before, after
        self.store.acknowledged_only = only_acknowledged

    @rule(which=st.integers(0, 1))
    def take_over(self, which: int) -> None:
        try:
            run = recover(self.machines[which].runs, self.store)
        except StoreError:
            self.ledgers[which], self.holder = None, None  # its record may stand in the store, or not
            return
        ledger = Ledger(
            self.machines[which].runs.db, "tiny-1", fencing_token=run.fencing_token, journal=StoreJournal(self.store)
        )
        self.ledgers[which] = ledger
        self.holder = which
        known = {account.lease.lease_id: account for account in ledger.open_accounts()}
        for lease_id, expires_ms in self.granted.items():
            assert known[lease_id].expires_ms >= expires_ms

    @precondition(lambda self: hasattr(self, "ledgers"))
    @invariant()
    def the_ledger_of_the_holder_holds(self) -> None:
        ledger = None if self.holder is None else self.ledgers[self.holder]
        if ledger is None:
            return
        adds_up(ledger)
        balance = ledger.balance()
        assert balance.spent_usd + balance.held_usd <= balance.cap_usd


TestTwoMachines = TwoMachines.TestCase
TestTwoMachines.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)

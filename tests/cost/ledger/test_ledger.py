"""The ledger: reserve before spend, never over the cap, replayable, fenced."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cost.errors import BudgetExceeded, SlmError
from cost.ledger.accounts import offer_text
from cost.ledger.database import MIGRATIONS, DatabaseError, connect, migrate, split_statements
from cost.ledger.leases import Lease
from cost.ledger.ledger import EntryKind, Fenced, Ledger, replay
from cost.market.offers import Offer
from tests.support.builders import make_lease, make_offer

HOUR_MS = 3_600_000
START_MS = 1_800_000_000_000


def an_offer(usd_per_hour: str = "1.00", region: str = "eu-north1") -> Offer:
    return make_offer(
        cloud="nebius",
        region=region,
        instance_type="gpu-h100",
        usd_per_hour=usd_per_hour,
        on_demand_usd_per_hour="2.95",
        as_of="2026-05-08",
    )


def a_lease(attempt: int = 1, *, nodes: int = 2, price: str = "1.00", worst: str | None = None) -> Lease:
    return make_lease(
        an_offer(price),
        lease_id=f"slm-abc123-run-1-{attempt}",
        run_id="run-1",
        attempt=attempt,
        num_nodes=nodes,
        worst_usd_per_hour=worst or price,
        kill_latency_seconds=5.0,
    )


def new_run(db: sqlite3.Connection, cap_micro_usd: int = 100_000_000, *, term: str = "fencing_token") -> None:
    db.execute(
        "INSERT INTO runs (run_id, recipe_name, recipe_digest, recipe_json, options_json, cap_micro_usd, state, "
        f"{term}, created_at, updated_at) VALUES ('run-1', 'r', 'd', '{{}}', '{{}}', ?, 'RUNNING', 1, '0', '0')",
        (cap_micro_usd,),
    )


@pytest.fixture
def db(tmp_path: Path) -> sqlite3.Connection:
    db = connect(tmp_path / "slm.db")
    new_run(db)
    return db


@pytest.fixture
def ledger(db: sqlite3.Connection) -> Ledger:
    return Ledger(db, "run-1", fencing_token=1)


def reserve(ledger: Ledger, lease: Lease, *, hours: int = 1) -> None:
    ledger.reserve(lease, expires_ms=START_MS + hours * HOUR_MS, latency_ms=0, at_ms=START_MS)


def test_a_reservation_sets_aside_worst_price_times_nodes_times_hours(ledger: Ledger) -> None:
    lease = a_lease(nodes=2, price="1.00", worst="3.00")
    ledger.reserve(lease, expires_ms=START_MS + HOUR_MS, latency_ms=HOUR_MS // 2, at_ms=START_MS)
    assert ledger.balance().held_usd == Decimal("9.00")  # 3 $/h x 2 nodes x 1.5 h
    assert ledger.balance().free_usd == Decimal("91.00")


def test_what_the_cap_cannot_pay_is_refused_and_leaves_no_trace(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match=r"may cost \$102\.00, but only \$100\.00 of the budget cap is left"):
        reserve(ledger, a_lease(nodes=2), hours=51)
    assert ledger.entries() == [] and ledger.accounts() == []


def test_elapsed_time_is_charged_at_the_price_and_only_the_future_at_the_worst(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=1, price="1.00", worst="3.00"), hours=2)
    ledger.accrue("slm-abc123-run-1-1", at_ms=START_MS + HOUR_MS, usd_per_hour=Decimal("1.00"))
    balance = ledger.balance()
    assert (balance.spent_usd, balance.held_usd) == (Decimal("1.00"), Decimal("3.00"))


def test_time_whose_price_nobody_confirmed_is_charged_at_the_worst(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=1, price="1.00", worst="3.00"), hours=2)
    ledger.accrue("slm-abc123-run-1-1", at_ms=START_MS + HOUR_MS)
    assert ledger.balance().spent_usd == Decimal("3.00")
    end = START_MS + 2 * HOUR_MS
    ledger.settle("slm-abc123-run-1-1", ended_ms=end, at_ms=end, outcome="expired")
    assert ledger.balance().spent_usd == Decimal("6.00")


def test_time_between_two_prices_is_charged_at_the_higher(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=1, price="1.00", worst="3.00"), hours=4)
    spent = []
    for hour, price in ((1, "2.00"), (2, "1.50"), (3, "1.50")):
        ledger.accrue("slm-abc123-run-1-1", at_ms=START_MS + hour * HOUR_MS, usd_per_hour=Decimal(price))
        spent.append(ledger.balance().spent_usd)
    assert spent == [Decimal("2.00"), Decimal("4.00"), Decimal("5.50")]


def test_the_last_moment_is_that_of_the_last_terminator_of_what_is_open(ledger: Ledger) -> None:
    assert (ledger.newest_ms(), ledger.last_moment_ms()) == (0, 0)
    ledger.reserve(a_lease(), expires_ms=START_MS + HOUR_MS, latency_ms=500, at_ms=START_MS)
    assert (ledger.newest_ms(), ledger.last_moment_ms()) == (START_MS, START_MS + HOUR_MS + 500)
    ledger.settle("slm-abc123-run-1-1", ended_ms=START_MS + 9, at_ms=START_MS + 10, outcome="finished")
    assert ledger.last_moment_ms() == START_MS + 10


def test_settling_charges_real_time_and_frees_the_rest(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=2), hours=4)
    at = START_MS + HOUR_MS
    ledger.settle("slm-abc123-run-1-1", ended_ms=at, at_ms=at, outcome="preempted")
    assert ledger.balance().spent_usd == Decimal("2.00") and ledger.balance().held_usd == 0
    kinds = [entry.kind for entry in ledger.entries()]
    assert kinds == [EntryKind.RESERVE, EntryKind.ACCRUE, EntryKind.SETTLE, EntryKind.RELEASE]


def test_settling_twice_changes_nothing(ledger: Ledger) -> None:
    reserve(ledger, a_lease())
    for later in (10, 20):
        ledger.settle("slm-abc123-run-1-1", ended_ms=START_MS + later, at_ms=START_MS + later, outcome="finished")
    assert len([entry for entry in ledger.entries() if entry.kind is EntryKind.SETTLE]) == 1


def test_a_lease_is_never_charged_past_its_last_terminator(ledger: Ledger) -> None:
    ledger.reserve(a_lease(nodes=1), expires_ms=START_MS + HOUR_MS, latency_ms=HOUR_MS, at_ms=START_MS)
    late = START_MS + 500 * HOUR_MS
    ledger.settle("slm-abc123-run-1-1", ended_ms=late, at_ms=late, outcome="expired")
    assert ledger.balance().spent_usd == Decimal("2.00")


def test_losing_a_node_frees_its_share_and_growing_reserves_it_again(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=2), hours=2)
    ledger.resize("slm-abc123-run-1-1", num_nodes=1, at_ms=START_MS + HOUR_MS)
    assert (ledger.balance().spent_usd, ledger.balance().held_usd) == (Decimal("2.00"), Decimal("1.00"))
    ledger.resize("slm-abc123-run-1-1", num_nodes=2, at_ms=START_MS + HOUR_MS)
    assert ledger.balance().held_usd == Decimal("2.00")
    assert ledger.entries()[-1].kind is EntryKind.RESERVE


def test_growing_past_the_cap_is_refused(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=1), hours=60)
    with pytest.raises(BudgetExceeded):
        ledger.resize("slm-abc123-run-1-1", num_nodes=2, at_ms=START_MS)
    assert ledger.account("slm-abc123-run-1-1").num_nodes == 1


def test_an_earlier_expiry_never_releases_what_was_granted(ledger: Ledger) -> None:
    reserve(ledger, a_lease(), hours=2)
    ledger.renew("slm-abc123-run-1-1", expires_ms=START_MS + HOUR_MS, at_ms=START_MS)
    assert ledger.account("slm-abc123-run-1-1").expires_ms == START_MS + 2 * HOUR_MS


def test_an_old_supervisor_can_neither_reserve_nor_renew(db: sqlite3.Connection, ledger: Ledger) -> None:
    reserve(ledger, a_lease())
    db.execute("UPDATE runs SET fencing_token = 2")
    for act in (
        lambda: reserve(ledger, a_lease(2)),
        lambda: ledger.renew("slm-abc123-run-1-1", expires_ms=START_MS + 9 * HOUR_MS, at_ms=START_MS),
        lambda: ledger.settle("slm-abc123-run-1-1", ended_ms=START_MS, at_ms=START_MS, outcome="x"),
        lambda: ledger.set_cap(Decimal(1000)),
    ):
        with pytest.raises(Fenced, match="taken over by another supervisor"):
            act()


def test_a_settled_lease_can_not_be_renewed(ledger: Ledger) -> None:
    reserve(ledger, a_lease())
    ledger.settle("slm-abc123-run-1-1", ended_ms=START_MS, at_ms=START_MS, outcome="finished")
    with pytest.raises(SlmError, match="is settled"):
        ledger.renew("slm-abc123-run-1-1", expires_ms=START_MS + 9 * HOUR_MS, at_ms=START_MS)


def test_a_lower_cap_than_what_is_committed_is_refused(ledger: Ledger) -> None:
    reserve(ledger, a_lease(nodes=2), hours=10)
    with pytest.raises(BudgetExceeded):
        ledger.set_cap(Decimal("19.99"))
    ledger.set_cap(Decimal("20.00"))
    assert ledger.balance().free_usd == 0


def test_entries_can_not_be_changed_or_deleted(db: sqlite3.Connection, ledger: Ledger) -> None:
    reserve(ledger, a_lease())
    for statement in ("UPDATE entries SET spent_micro_usd = 0", "DELETE FROM entries"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            db.execute(statement)


def test_unknown_runs_and_leases_are_named(db: sqlite3.Connection, ledger: Ledger) -> None:
    with pytest.raises(SlmError, match=r"the ledger of run .* has no lease nope"):
        ledger.account("nope")
    with pytest.raises(SlmError, match="no ledger for run other"):
        Ledger(db, "other", fencing_token=1).balance()


def test_the_ledger_survives_being_opened_again(tmp_path: Path, db: sqlite3.Connection, ledger: Ledger) -> None:
    reserve(ledger, a_lease(price="0.81", worst="2.95"))
    again = Ledger(connect(tmp_path / "slm.db"), "run-1", fencing_token=1)
    assert again.accounts() == ledger.accounts() and again.balance() == ledger.balance()


def test_a_ledger_of_a_newer_version_is_left_alone(tmp_path: Path, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(DatabaseError, match="upgrade slm"):
        connect(tmp_path / "slm.db")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "slm.db"
    path.write_bytes(b"this is a letter, not a database " * 100)
    with pytest.raises(DatabaseError, match=r"slm\.db"):
        connect(path)


def test_migrating_twice_changes_nothing(db: sqlite3.Connection) -> None:
    before = db.execute("SELECT sql FROM sqlite_master").fetchall()
    migrate(db)
    assert [tuple(row) for row in db.execute("SELECT sql FROM sqlite_master")] == [tuple(row) for row in before]


def test_a_ledger_of_before_there_were_stages_is_read_as_one_of_pre_training(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path, isolation_level=None)
    old.row_factory = sqlite3.Row
    before_stages = next(i for i, script in enumerate(MIGRATIONS) if "ADD COLUMN stage" in script)
    for script in MIGRATIONS[:before_stages]:
        for statement in split_statements(script):
            old.execute(statement)
    old.execute(f"PRAGMA user_version = {before_stages}")
    new_run(old, term="epoch")
    old.execute(
        "INSERT INTO leases VALUES ('slm-abc123-run-1-1', 'run-1', 1, ?, 2, 'open', 2, 1000000, 1000000, 0, 60, 5, "
        "?, ?, ?, NULL, 0, '', 0, 0, 0)",
        (offer_text(an_offer()), START_MS, START_MS, START_MS + HOUR_MS),
    )
    old.execute(
        "INSERT INTO entries (run_id, lease_id, kind, key, spent_micro_usd, held_micro_usd, at_ms, note) "
        "VALUES ('run-1', 'slm-abc123-run-1-1', 'reserve', 'k', 0, 2000000, ?, '')",
        (START_MS,),
    )
    old.close()
    ledger = Ledger(connect(path), "run-1", fencing_token=1)
    assert [entry.stage for entry in ledger.entries()] == ["pretrain"]
    assert [account.lease.stage for account in ledger.accounts()] == ["pretrain"]
    assert ledger.balance().held_usd == 2


def test_each_entry_says_which_stage_it_is_for(ledger: Ledger) -> None:
    ledger.reserve_stage("count", Decimal(3), at_ms=START_MS)
    reserve(ledger, a_lease())
    ledger.charge("disks", Decimal("0.5"), at_ms=START_MS)
    ledger.settle(a_lease().lease_id, ended_ms=START_MS, at_ms=START_MS, outcome="finished")
    ledger.begin_stage("count", at_ms=START_MS)
    ledger.charge("disks", Decimal("0.75"), at_ms=START_MS)
    reserve(ledger, replace(a_lease(2), stage="count"))
    stages = [(entry.kind.value, entry.stage) for entry in ledger.entries()]
    assert stages == [
        ("reserve", "count"),
        ("reserve", "pretrain"),
        ("accrue", "pretrain"),
        ("settle", "pretrain"),
        ("release", "pretrain"),
        ("release", "count"),
        ("accrue", "count"),
        ("reserve", "count"),
    ]
    assert [account.lease.stage for account in ledger.accounts()] == ["pretrain", "count"]


def test_what_is_reserved_for_a_later_stage_is_not_free_until_that_stage_begins(ledger: Ledger) -> None:
    # A cap of $100, and two nodes at $1 an hour.
    assert ledger.reserve_stage("count", Decimal(97), at_ms=START_MS) == 97
    with pytest.raises(BudgetExceeded):
        reserve(ledger, a_lease(), hours=2)
    reserve(ledger, a_lease(), hours=1)
    assert ledger.balance().free_usd == 1
    ledger.begin_stage("count", at_ms=START_MS)
    assert ledger.balance().free_usd == 98


def test_reserving_for_a_stage_again_changes_nothing(ledger: Ledger) -> None:
    ledger.reserve_stage("count", Decimal(5), at_ms=START_MS)
    entries = len(ledger.entries())
    assert ledger.reserve_stage("count", Decimal(5), at_ms=START_MS) == 5
    assert len(ledger.entries()) == entries


def test_a_later_stage_gets_what_is_left_where_that_is_less_than_planned(ledger: Ledger) -> None:
    reserve(ledger, a_lease(), hours=49)
    assert ledger.reserve_stage("count", Decimal(5), at_ms=START_MS) == 2
    assert ledger.balance().free_usd == 0


class LedgerMachine(RuleBasedStateMachine):
    """Any order of the verbs, at any prices and moments, keeps spent + held under the cap."""

    @initialize(cap=st.integers(0, 20_000_000))
    def open_ledger(self, cap: int) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.row_factory = sqlite3.Row
        migrate(self.db)
        new_run(self.db, cap)
        self.cap = Decimal(cap) / 1_000_000
        self.ledger = Ledger(self.db, "run-1", fencing_token=1)
        self.now = START_MS
        self.attempt = 0

    def an_open_lease(self, pick: int) -> str | None:
        accounts = self.ledger.open_accounts()
        return accounts[pick % len(accounts)].lease.lease_id if accounts else None

    @rule(
        price=st.integers(1, 5_000_000),
        extra=st.integers(0, 3_000_000),
        nodes=st.integers(1, 3),
        term=st.integers(1, 3 * HOUR_MS),
        latency=st.integers(0, 60_000),
    )
    def rent(self, price: int, extra: int, nodes: int, term: int, latency: int) -> None:
        self.attempt += 1
        usd_price, worst = Decimal(price) / 1_000_000, Decimal(price + extra) / 1_000_000
        lease = replace(a_lease(self.attempt, nodes=nodes, price=str(usd_price)), worst_usd_per_hour=worst)
        before = self.ledger.balance()
        try:
            self.ledger.reserve(lease, expires_ms=self.now + term, latency_ms=latency, at_ms=self.now)
        except BudgetExceeded:
            assert self.ledger.balance() == before

    @rule(milliseconds=st.integers(0, HOUR_MS))
    def time_passes(self, milliseconds: int) -> None:
        self.now += milliseconds

    @rule(pick=st.integers(0, 9))
    def accrue(self, pick: int) -> None:
        lease_id = self.an_open_lease(pick)
        if lease_id:
            before = self.ledger.balance()
            self.ledger.accrue(lease_id, at_ms=self.now)
            after = self.ledger.balance()
            # Moving the confirmed moment never raises what is committed.
            assert after.spent_usd + after.held_usd <= before.spent_usd + before.held_usd

    @rule(pick=st.integers(0, 9), term=st.integers(1, 2 * HOUR_MS))
    def renew(self, pick: int, term: int) -> None:
        lease_id = self.an_open_lease(pick)
        if lease_id:
            with contextlib.suppress(BudgetExceeded):
                self.ledger.renew(lease_id, expires_ms=self.now + term, at_ms=self.now)

    @rule(pick=st.integers(0, 9), nodes=st.integers(0, 4))
    def resize(self, pick: int, nodes: int) -> None:
        lease_id = self.an_open_lease(pick)
        if lease_id:
            with contextlib.suppress(BudgetExceeded):
                self.ledger.resize(lease_id, num_nodes=nodes, at_ms=self.now)

    @rule(pick=st.integers(0, 9))
    def settle(self, pick: int) -> None:
        lease_id = self.an_open_lease(pick)
        if lease_id:
            before = self.ledger.balance()
            self.ledger.settle(lease_id, ended_ms=self.now, at_ms=self.now, outcome="test")
            assert self.ledger.balance().free_usd >= before.free_usd

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def the_cap_holds(self) -> None:
        balance = self.ledger.balance()
        assert balance.spent_usd + balance.held_usd <= self.cap
        assert balance.held_usd >= 0

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def the_entries_add_up_to_the_accounts(self) -> None:
        spent, held = replay(self.ledger.entries())
        accounts = self.ledger.accounts()
        assert spent == sum(account.spent_micro_usd for account in accounts)
        assert held == sum(account.held_micro_usd for account in accounts)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

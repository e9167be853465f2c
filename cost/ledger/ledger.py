"""The append-only ledger of one run against its budget cap: reserve, accrue, settle, release.

Invariant, after every committed write: `spent + held <= cap`, where
- spent is what instances have cost up to the last confirmed moment, at the confirmed price, and
- held is what they can still cost until the slowest working terminator ends them:
  worst-case price x nodes x (expiry + kill latency - confirmed moment), and what is estimated for storage and
  transfers.

Only `reserve`, `renew`, `resize` and `set_aside` raise the sum. Each is durable before any call that can cost money:
first in the run store (`cost.ledger.journal`), then here. Times are billed milliseconds since the epoch, prices whole
micro-dollars per node-hour; debits round up.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from typing import Any

from cost.errors import BudgetExceeded, SlmError
from cost.ledger import journal as records
from cost.ledger.accounts import OPEN, SETTLED, LeaseAccount, Line, account_from_row, put
from cost.ledger.database import transaction
from cost.ledger.journal import Journal, line_id
from cost.ledger.leases import FIRST_STAGE, Lease, cost_units, micro_usd, usd

STAGE_LINE = "stage "
"""Before the name of a stage: the line that holds its planned cost until it begins."""
TAKE_OVER_TRIES = 50
"""Each one lost means that another supervisor took the run over in that moment, or that the store shows it late."""


class EntryKind(StrEnum):
    RESERVE = "reserve"
    ACCRUE = "accrue"
    SETTLE = "settle"
    RELEASE = "release"


class Fenced(SlmError):
    """Another supervisor took the run over; this one may neither grant nor spend."""

    def __init__(self, *, run_id: str, mine: int, current: int) -> None:
        super().__init__(
            f"run {run_id} was taken over by another supervisor (fencing token {current}, this one has {mine}); "
            f"follow it with: slm status {run_id}"
        )


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One entry of the ledger; the amounts are signed changes."""

    seq: int
    lease_id: str
    kind: EntryKind
    key: str
    spent_micro_usd: int
    held_micro_usd: int
    at_ms: int
    note: str
    stage: str = FIRST_STAGE
    """Of the run, that it is charged to or reserved for."""


@dataclass(frozen=True, slots=True)
class Balance:
    """Where a run stands against its cap, in dollars."""

    cap_usd: Decimal
    spent_usd: Decimal
    held_usd: Decimal

    @property
    def free_usd(self) -> Decimal:
        return self.cap_usd - self.spent_usd - self.held_usd


class Ledger:
    """The ledger of one run, written by the supervisor that holds `fencing_token`.

    With a `journal`, what raises spent + held stands there first; without one (to look at, or in tests) only here.
    """

    def __init__(
        self, db: sqlite3.Connection, run_id: str, *, fencing_token: int, journal: Journal | None = None
    ) -> None:
        self._db = db
        self.run_id = run_id
        self.fencing_token = fencing_token
        self._journal = journal
        self.stage = FIRST_STAGE
        """The stage that the run is in: whom costs that are no node's are charged to."""
        self._unsure = False
        """Whether the journal may hold a record that this ledger lacks: its reply, or our commit, was lost."""
        self._tries = 0

    # -- reading ---------------------------------------------------------------------------------

    def balance(self) -> Balance:
        """Cap, spent and held, summed over the entries."""
        row = self._db.execute(
            "SELECT cap_micro_usd, spent_micro_usd, held_micro_usd FROM runs WHERE run_id = ?", (self.run_id,)
        ).fetchone()
        if row is None:
            raise SlmError(f"there is no ledger for run {self.run_id}; `slm status` lists the runs.")
        return Balance(usd(row["cap_micro_usd"]), usd(row["spent_micro_usd"]), usd(row["held_micro_usd"]))

    def entries(self) -> list[LedgerEntry]:
        """Every line, oldest first."""
        rows = self._db.execute("SELECT * FROM entries WHERE run_id = ? ORDER BY seq", (self.run_id,))
        return [
            LedgerEntry(
                seq=row["seq"],
                lease_id=row["lease_id"],
                kind=EntryKind(row["kind"]),
                key=row["key"],
                spent_micro_usd=row["spent_micro_usd"],
                held_micro_usd=row["held_micro_usd"],
                at_ms=row["at_ms"],
                note=row["note"],
                stage=row["stage"],
            )
            for row in rows
        ]

    def accounts(self) -> list[LeaseAccount]:
        """Every lease of the run, oldest first."""
        rows = self._db.execute("SELECT * FROM leases WHERE run_id = ? ORDER BY attempt", (self.run_id,))
        return [account_from_row(row, fencing_token=self.fencing_token) for row in rows]

    def account(self, lease_id: str) -> LeaseAccount:
        row = self._db.execute("SELECT * FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
        if row is None:
            raise SlmError(f"the ledger of run {self.run_id} has no lease {lease_id}.")
        return account_from_row(row, fencing_token=self.fencing_token)

    def open_accounts(self) -> list[LeaseAccount]:
        rows = self._db.execute(
            "SELECT * FROM leases WHERE run_id = ? AND state = ? ORDER BY attempt", (self.run_id, OPEN)
        )
        return [account_from_row(row, fencing_token=self.fencing_token) for row in rows]

    def lines(self) -> list[Line]:
        """The incidental costs."""
        rows = self._db.execute("SELECT * FROM lines WHERE run_id = ? ORDER BY name", (self.run_id,))
        return [Line(row["name"], row["reserved_micro_usd"], row["spent_micro_usd"]) for row in rows]

    def open_leases_of_all_runs(self) -> set[str]:
        """Every open lease of every run in this ledger: nodes of other runs are no orphans."""
        rows = self._db.execute("SELECT lease_id FROM leases WHERE state = ?", (OPEN,))
        return {row["lease_id"] for row in rows}

    def newest_ms(self) -> int:
        """The newest time in the ledger; 0 if it is empty."""
        row = self._db.execute("SELECT MAX(at_ms) AS newest FROM entries WHERE run_id = ?", (self.run_id,)).fetchone()
        return row["newest"] or 0

    def last_moment_ms(self) -> int:
        """The latest time at which any leased node can have run: the newest entry, or an open lease's K + κ."""
        open_until = (account.expires_ms + account.latency_ms for account in self.open_accounts())
        return max(self.newest_ms(), *open_until, 0)

    # -- the four verbs --------------------------------------------------------------------------

    def reserve(self, lease: Lease, *, expires_ms: int, latency_ms: int, at_ms: int) -> LeaseAccount:
        """Write the intent to rent `lease` and reserve all that it can cost until `expires_ms` + `latency_ms`.

        Raises:
            BudgetExceeded: The cap would be passed; nothing is written.
            Fenced: Another supervisor holds the run.
            SlmError: The run store cannot be reached; nothing may be rented.
        """
        price = micro_usd(lease.offer.usd_per_hour)
        worst = max(price, micro_usd(lease.worst_usd_per_hour))
        minimum_ms = int(lease.minimum_billed_seconds * 1000)
        with self._writing(raises=True):
            known = self._db.execute("SELECT * FROM leases WHERE lease_id = ?", (lease.lease_id,)).fetchone()
            if known is not None:
                return account_from_row(known, fencing_token=self.fencing_token)
            account = LeaseAccount(
                lease=lease,
                state=OPEN,
                num_nodes=lease.num_nodes,
                price_micro_usd=price,
                worst_micro_usd=worst,
                latency_ms=latency_ms,
                started_ms=at_ms,
                accrued_until_ms=at_ms,
                expires_ms=expires_ms,
                ended_ms=None,
                accrued_units=0,
                outcome="",
                minimum_ms=minimum_ms,
                floor_ms=at_ms + minimum_ms if minimum_ms else 0,
            )
            self._check_cap(account.held_micro_usd)
            put(self._db, account)
            note = f"{lease.num_nodes} x {lease.offer.offer_id} at most ${usd(worst)}/h each"
            self._write(EntryKind.RESERVE, lease.lease_id, 0, account.held_micro_usd, at_ms, note, lease.stage)
        return account

    def renew(self, lease_id: str, *, expires_ms: int, at_ms: int) -> LeaseAccount:
        """Reserve what the lease can cost until a later `expires_ms`; an earlier one changes nothing.

        Raises:
            BudgetExceeded: The cap would be passed; nothing is written.
        """
        with self._writing(raises=True):
            before = self._open(lease_id)
            if expires_ms <= before.expires_ms:
                return before
            return self._change(before, replace(before, expires_ms=expires_ms), EntryKind.RESERVE, at_ms, "renewed")

    def resize(self, lease_id: str, *, num_nodes: int, at_ms: int, usd_per_hour: Decimal | None = None) -> LeaseAccount:
        """Set how many nodes may be alive from now on: more nodes reserve money, fewer release it.

        Elapsed time is accrued for the previous number, as `accrue` does; nodes that end before their shortest billed
        time is over are charged to its end.

        Raises:
            BudgetExceeded: Growing would pass the cap; nothing is written.
        """
        with self._writing(raises=num_nodes > self.account(lease_id).num_nodes):
            before = self.accrue(lease_id, at_ms=at_ms, usd_per_hour=usd_per_hour)
            if num_nodes == before.num_nodes:
                return before
            note = f"{before.num_nodes} -> {num_nodes} nodes"
            after = replace(before, num_nodes=num_nodes)
            if num_nodes > before.num_nodes:
                if before.minimum_ms:
                    after = replace(after, floor_ms=max(before.floor_ms, at_ms + before.minimum_ms))
                return self._change(before, after, EntryKind.RESERVE, at_ms, note)
            going = before.num_nodes - num_nodes
            owed = cost_units(before.worst_micro_usd, going, before.floor_ms - before.accrued_until_ms)
            after = replace(after, accrued_units=before.accrued_units + owed)
            return self._change(before, after, EntryKind.RELEASE, at_ms, note)

    def accrue(self, lease_id: str, *, at_ms: int, usd_per_hour: Decimal | None = None) -> LeaseAccount:
        """Move the confirmed moment to `at_ms`; never past what can still be billed.

        `usd_per_hour` is the price as read back from the provider. The time since the last accrual is charged at the
        higher of the prices at its two ends; without a price it is unconfirmed and charged at the worst-case price.
        """
        with self._writing():
            before = self._open(lease_id)
            until = min(at_ms, before.last_billed_ms)
            price = before.price_micro_usd if usd_per_hour is None else micro_usd(usd_per_hour)
            charged = max(before.price_micro_usd, before.worst_micro_usd if usd_per_hour is None else price)
            elapsed = until - before.accrued_until_ms
            if elapsed <= 0 and price == before.price_micro_usd:
                return before
            after = replace(
                before,
                accrued_until_ms=max(until, before.accrued_until_ms),
                accrued_units=before.accrued_units + cost_units(charged, before.num_nodes, elapsed),
                price_micro_usd=price,
            )
            return self._change(before, after, EntryKind.ACCRUE, at_ms, f"{max(0, elapsed) / 1000:.1f} s")

    def settle(self, lease_id: str, *, ended_ms: int, at_ms: int, outcome: str, rented: bool = True) -> LeaseAccount:
        """Close a lease whose end the provider confirmed: charge up to `ended_ms`, then release what is left.

        What was rented is charged for its shortest billed time at least. Repeating it changes nothing.
        """
        with self._writing():
            account = self.account(lease_id)
            if not account.is_open:
                return account
            account = self.accrue(lease_id, at_ms=max(ended_ms, account.floor_ms) if rented else ended_ms)
            closed = replace(account, state=SETTLED, num_nodes=0, ended_ms=ended_ms, outcome=outcome)
            put(self._db, closed)
            stage, note = account.lease.stage, f"{outcome}: ${usd(closed.spent_micro_usd)}"
            self._write(EntryKind.SETTLE, lease_id, 0, 0, at_ms, note, stage)
            if account.held_micro_usd:
                self._write(EntryKind.RELEASE, lease_id, 0, -account.held_micro_usd, at_ms, "unused", stage)
        self.mirror()
        return closed

    # -- costs that are no node's ----------------------------------------------------------------

    def set_aside(self, name: str, amount_usd: Decimal, *, at_ms: int) -> None:
        """Hold an estimate for storage or a transfer; a lower one than before changes nothing.

        Raises:
            BudgetExceeded: The cap would be passed; nothing is written.
        """
        with self._writing(raises=True):
            before = self._line(name)
            after = replace(before, reserved_micro_usd=max(before.reserved_micro_usd, micro_usd(amount_usd)))
            self._change_line(before, after, EntryKind.RESERVE, at_ms, "estimated")

    def charge(self, name: str, total_usd: Decimal, *, at_ms: int) -> None:
        """Record what an incidental cost has come to since the run began; a lower total changes nothing.

        Raises:
            BudgetExceeded: It came to more than was reserved, and the cap does not cover it; nothing is written.
        """
        total = micro_usd(total_usd)
        with self._writing(raises=total > self._line(name).reserved_micro_usd):
            before = self._line(name)
            after = replace(before, spent_micro_usd=max(before.spent_micro_usd, total))
            self._change_line(before, after, EntryKind.ACCRUE, at_ms, f"${total_usd:.4f} so far")

    def keep_lines(self, *, estimates: Mapping[str, Decimal], totals: Mapping[str, Decimal], at_ms: int) -> None:
        """`set_aside` and `charge` for several lines, all or none.

        Raises:
            BudgetExceeded: The cap does not cover it; nothing is written.
        """
        with self._writing(raises=True):
            for name, amount_usd in estimates.items():
                self.set_aside(name, amount_usd, at_ms=at_ms)
            for name, total_usd in totals.items():
                self.charge(name, total_usd, at_ms=at_ms)

    def close_lines(self, *, at_ms: int) -> None:
        """Nothing more is stored or sent: release the unused part of the estimates."""
        with self._writing():
            for line in self.lines():
                self.release_line(line.name, at_ms=at_ms)

    def release_line(self, name: str, *, at_ms: int) -> None:
        """Release the unused part of one incidental cost, if there is one of that name."""
        with self._writing():
            line = self._line(name)
            after = replace(line, reserved_micro_usd=min(line.reserved_micro_usd, line.spent_micro_usd))
            self._change_line(line, after, EntryKind.RELEASE, at_ms, "unused")

    # -- stages ----------------------------------------------------------------------------------

    def reserve_stage(self, name: str, planned_usd: Decimal, *, at_ms: int) -> Decimal:
        """Hold what a later stage is planned to cost, or what is free where that is less; returns what is held now.

        What is held for it already counts, so that repeating it changes nothing.
        """
        with self._writing(raises=True):
            held = self.held_for_stage(name)
            affordable = min(planned_usd, held + max(Decimal(0), self.balance().free_usd))
            self.set_aside(STAGE_LINE + name, affordable, at_ms=at_ms)
            return max(held, affordable)

    def held_for_stage(self, name: str) -> Decimal:
        """What is reserved for a stage that has not begun."""
        return usd(self._line(STAGE_LINE + name).held_micro_usd)

    def begin_stage(self, name: str, *, at_ms: int) -> None:
        """From now on the run is in this stage, and what was reserved for it is free for its leases."""
        self.stage = name
        self.release_line(STAGE_LINE + name, at_ms=at_ms)

    def set_cap(self, cap_usd: Decimal) -> None:
        """Change the cap; never below what is spent and held.

        Raises:
            BudgetExceeded: The new cap is lower than what is already committed.
        """
        with self._writing(raises=True, always=True):
            balance = self.balance()
            committed = balance.spent_usd + balance.held_usd
            if cap_usd < committed:
                raise BudgetExceeded(needed_usd=committed, remaining_usd=cap_usd)
            self._db.execute(
                "UPDATE runs SET cap_micro_usd = ? WHERE run_id = ?",
                (int(cap_usd * 1_000_000), self.run_id),  # a cap rounds down
            )

    # -- the copy in the run store ---------------------------------------------------------------

    def mirror(self) -> bool:
        """Bring the run store's copy up to date; False when it could not be reached.

        Raises:
            Fenced: Another supervisor holds the run.
        """
        if self._journal is None:
            return True
        with suppress_unless_fenced() as done, self._writing(raises=True):
            done.append(True)
        return bool(done)

    def require_mine(self) -> None:
        """Check with the run store that no other supervisor has taken the run over.

        Raises:
            Fenced: Another supervisor has.
            SlmError: The run store cannot be reached, so this is unknown.
        """
        if self._journal is not None:
            with transaction(self._db):
                self._check_fencing_token()
                self._catch_up()

    @contextmanager
    def _writing(self, *, raises: bool = False, always: bool = False) -> Iterator[None]:
        """One transaction. What `raises` spent + held stands in the journal before it is committed.

        `always`: also when it makes no entry.
        """
        if self._db.in_transaction:
            yield
            return
        if self._unsure:
            self._find_out(must=raises)
        with transaction(self._db):
            self._check_fencing_token()
            yield
            if raises and self._journal is not None:
                self._append(self._journal, always=always)
        self._unsure = False if raises else self._unsure

    def _find_out(self, *, must: bool) -> None:
        """Read the journal's newer records; without them no reservation may grow."""
        try:
            with transaction(self._db):
                self._catch_up()
            self._unsure = False
        except Fenced:
            raise
        except SlmError:
            if must:
                raise

    def _append(self, journal: Journal, *, always: bool) -> None:
        """Store what the journal lacks under its next number, as part of the transaction that made it."""
        content, newest_seq = records.pending(self._db, self.run_id)
        if not content["entries"] and not always:
            return
        self._unsure, self._tries = True, self._tries + 1
        if not append(self._db, self.run_id, journal, content, newest_seq, fencing_token=self.fencing_token):
            self._catch_up()
            raise SlmError(
                f"the ledger of run {self.run_id} was older than its copy in the run store and is now "
                "updated; try again."
            )

    def _catch_up(self) -> None:
        assert self._journal is not None
        newest = records.catch_up(self._db, self.run_id, self._journal, fencing_token=self.fencing_token)
        if newest > self.fencing_token:
            raise Fenced(run_id=self.run_id, mine=self.fencing_token, current=newest)

    # -- helpers ---------------------------------------------------------------------------------

    def _open(self, lease_id: str) -> LeaseAccount:
        self._check_fencing_token()
        account = self.account(lease_id)
        if not account.is_open:
            raise SlmError(f"lease {lease_id} is settled and can be neither renewed nor charged.")
        return account

    def _change(
        self, before: LeaseAccount, after: LeaseAccount, kind: EntryKind, at_ms: int, note: str
    ) -> LeaseAccount:
        spent = after.spent_micro_usd - before.spent_micro_usd
        held = after.held_micro_usd - before.held_micro_usd
        if kind is EntryKind.RESERVE:
            self._check_cap(spent + held)
        put(self._db, after)
        self._write(kind, after.lease.lease_id, spent, held, at_ms, note, after.lease.stage)
        return after

    def _line(self, name: str) -> Line:
        found = [line for line in self.lines() if line.name == name]
        return found[0] if found else Line(name, 0, 0)

    def _change_line(self, before: Line, after: Line, kind: EntryKind, at_ms: int, note: str) -> None:
        spent = after.spent_micro_usd - before.spent_micro_usd
        held = after.held_micro_usd - before.held_micro_usd
        if not spent and not held:
            return
        if spent + held > 0:
            self._check_cap(spent + held)
        self._db.execute(
            "INSERT OR REPLACE INTO lines (run_id, name, reserved_micro_usd, spent_micro_usd) VALUES (?, ?, ?, ?)",
            (self.run_id, after.name, after.reserved_micro_usd, after.spent_micro_usd),
        )
        reserved_for = after.name.removeprefix(STAGE_LINE) if after.name.startswith(STAGE_LINE) else self.stage
        self._write(kind, line_id(self.run_id, after.name), spent, held, at_ms, note, reserved_for)

    def _check_cap(self, rise_micro_usd: int) -> None:
        free = self.balance().free_usd
        if usd(rise_micro_usd) > free:
            raise BudgetExceeded(needed_usd=usd(rise_micro_usd), remaining_usd=free)

    def _check_fencing_token(self) -> None:
        row = self._db.execute("SELECT fencing_token FROM runs WHERE run_id = ?", (self.run_id,)).fetchone()
        if row is None:
            raise SlmError(f"there is no ledger for run {self.run_id}; `slm status` lists the runs.")
        if row["fencing_token"] != self.fencing_token:
            raise Fenced(run_id=self.run_id, mine=self.fencing_token, current=row["fencing_token"])

    def _write(self, kind: EntryKind, lease_id: str, spent: int, held: int, at_ms: int, note: str, stage: str) -> None:
        # A key is never used for two different lines, also when a write of ours was undone here and stands in the
        # journal: fencing token, tries and count name one moment of one supervisor.
        count = self._db.execute("SELECT COUNT(*) FROM entries WHERE lease_id = ?", (lease_id,)).fetchone()[0]
        self._db.execute(
            "INSERT INTO entries (run_id, lease_id, kind, key, spent_micro_usd, held_micro_usd, at_ms, note, stage) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.run_id,
                lease_id,
                kind.value,
                f"{lease_id}/{self.fencing_token}.{self._tries}.{count}",
                spent,
                held,
                at_ms,
                note,
                stage,
            ),
        )


def append(
    db: sqlite3.Connection,
    run_id: str,
    journal: Journal,
    content: Mapping[str, Any],
    newest_seq: int,
    *,
    fencing_token: int,
) -> bool:
    """Store a record under the next number; False when that number is taken."""
    run = db.execute("SELECT cap_micro_usd, journal_next FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    record = {
        **content,
        "fencing_token": fencing_token,
        "cap_micro_usd": run["cap_micro_usd"],
        "nonce": secrets.token_hex(8),
    }
    number = run["journal_next"]
    if not journal.append(number, json.dumps(record, sort_keys=True).encode()):
        return False
    db.execute("UPDATE runs SET journal_next = ?, mirrored_seq = ? WHERE run_id = ?", (number + 1, newest_seq, run_id))
    return True


def take_over(db: sqlite3.Connection, run_id: str, journal: Journal, facts: Mapping[str, Any]) -> int:
    """Apply all records of the run store and raise the fencing token there: the previous supervisor can grant no more.

    `facts` are what another machine needs to continue the run. Returns the new fencing token.
    """
    for _ in range(TAKE_OVER_TRIES):
        with transaction(db):
            known = db.execute("SELECT fencing_token FROM runs WHERE run_id = ?", (run_id,)).fetchone()["fencing_token"]
            fencing_token = 1 + max(int(known), records.catch_up(db, run_id, journal, fencing_token=known))
            db.execute("UPDATE runs SET fencing_token = ? WHERE run_id = ?", (fencing_token, run_id))
            content, newest_seq = records.pending(db, run_id)
            if append(db, run_id, journal, {**content, "run": dict(facts)}, newest_seq, fencing_token=fencing_token):
                return fencing_token
    raise SlmError(
        f"other supervisors keep taking over run {run_id}; stop them, or follow the run with: slm status {run_id}"
    )


@contextmanager
def suppress_unless_fenced() -> Iterator[list[bool]]:
    """Ignore a store that cannot be reached; the list is empty then."""
    done: list[bool] = []
    try:
        yield done
    except Fenced:
        raise
    except SlmError:
        done.clear()


def replay(entries: Sequence[LedgerEntry]) -> tuple[int, int]:
    """Spent and held in micro-dollars, from the entries alone: what `balance` must agree with."""
    return sum(entry.spent_micro_usd for entry in entries), sum(entry.held_micro_usd for entry in entries)

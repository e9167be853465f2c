"""Append-only books of one run against its cap: reserve, accrue, settle, release.

Invariant, after every committed write: `spent + held <= cap`, where
- spent is what instances have cost up to the last confirmed moment, at the confirmed price, and
- held is what they can still cost up to the last moment at which a killer assumed sound ends them:
  worst price x nodes x (expiry + kill latency - confirmed moment).

Only `reserve` raises the sum, and it is durable before any call that can cost money.
Times are billed milliseconds since the epoch, prices whole micro-dollars per node-hour; debits round up.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from enum import StrEnum

from cost.database import transaction
from cost.errors import BudgetExceeded, SlmError
from cost.leases import Lease, cost_units, micro_usd, units_to_micro_usd, usd
from cost.offers import Offer


class EntryKind(StrEnum):
    RESERVE = "reserve"
    ACCRUE = "accrue"
    SETTLE = "settle"
    RELEASE = "release"


class Fenced(SlmError):
    """Another supervisor took the run over; this one may neither grant nor spend."""

    def __init__(self, *, run_id: str, mine: int, current: int) -> None:
        super().__init__(
            f"run {run_id} was taken over by another supervisor (epoch {current}, this one has {mine}); "
            f"follow it with: slm status {run_id}"
        )


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the books; the deltas are signed."""

    seq: int
    lease_id: str
    kind: EntryKind
    key: str
    spent_micro_usd: int
    held_micro_usd: int
    at_ms: int
    note: str


@dataclass(frozen=True, slots=True)
class Balance:
    """Where a run stands against its cap, in dollars."""

    cap_usd: Decimal
    spent_usd: Decimal
    held_usd: Decimal

    @property
    def free_usd(self) -> Decimal:
        return self.cap_usd - self.spent_usd - self.held_usd


@dataclass(frozen=True, slots=True)
class LeaseAccount:
    """A lease as the books see it."""

    lease: Lease
    state: str
    num_nodes: int
    price_micro_usd: int
    worst_micro_usd: int
    latency_ms: int
    started_ms: int
    accrued_until_ms: int
    expires_ms: int
    ended_ms: int | None
    accrued_units: int
    outcome: str

    @property
    def is_open(self) -> bool:
        return self.state == "open"

    @property
    def spent_micro_usd(self) -> int:
        return units_to_micro_usd(self.accrued_units)

    @property
    def held_micro_usd(self) -> int:
        """What it can still cost: p-hat x nodes x (K + kappa - t_r), nothing once settled.

        Spent and held are rounded up together, so that moving from one to the other never raises their sum.
        """
        if not self.is_open:
            return 0
        left_ms = self.expires_ms + self.latency_ms - self.accrued_until_ms
        future_units = cost_units(self.worst_micro_usd, self.num_nodes, left_ms)
        return units_to_micro_usd(self.accrued_units + future_units) - self.spent_micro_usd


class Ledger:
    """The books of one run, written by the supervisor that holds `epoch`."""

    def __init__(self, db: sqlite3.Connection, run_id: str, *, epoch: int) -> None:
        self._db = db
        self.run_id = run_id
        self.epoch = epoch

    # -- reading ---------------------------------------------------------------------------------

    def balance(self) -> Balance:
        """Cap, spent and held, summed over the entries."""
        row = self._db.execute(
            "SELECT (SELECT cap_micro_usd FROM runs WHERE run_id = ?) AS cap, "
            "COALESCE(SUM(spent_micro_usd), 0) AS spent, COALESCE(SUM(held_micro_usd), 0) AS held "
            "FROM entries INDEXED BY entries_sums WHERE run_id = ?",
            (self.run_id, self.run_id),
        ).fetchone()
        if row["cap"] is None:
            raise SlmError(f"there are no books for run {self.run_id}.")
        return Balance(usd(row["cap"]), usd(row["spent"]), usd(row["held"]))

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
            )
            for row in rows
        ]

    def accounts(self) -> list[LeaseAccount]:
        """Every lease of the run, oldest first."""
        rows = self._db.execute("SELECT * FROM leases WHERE run_id = ? ORDER BY attempt", (self.run_id,))
        return [self._account(row) for row in rows]

    def account(self, lease_id: str) -> LeaseAccount:
        row = self._db.execute("SELECT * FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
        if row is None:
            raise SlmError(f"the books of run {self.run_id} know no lease {lease_id}.")
        return self._account(row)

    def open_accounts(self) -> list[LeaseAccount]:
        return [account for account in self.accounts() if account.is_open]

    def open_leases_of_all_runs(self) -> set[str]:
        """Every lease that these books pay for: other runs' nodes are no strangers."""
        rows = self._db.execute("SELECT lease_id FROM leases WHERE state = 'open'")
        return {row["lease_id"] for row in rows}

    def newest_ms(self) -> int:
        """The newest moment in the books; 0 for empty ones."""
        row = self._db.execute("SELECT MAX(at_ms) AS newest FROM entries WHERE run_id = ?", (self.run_id,)).fetchone()
        return row["newest"] or 0

    def last_moment_ms(self) -> int:
        """Until when anything in the books can have lived: the newest entry, or an open lease's K + kappa."""
        open_until = (account.expires_ms + account.latency_ms for account in self.open_accounts())
        return max(self.newest_ms(), *open_until, 0)

    # -- the four verbs --------------------------------------------------------------------------

    def reserve(self, lease: Lease, *, expires_ms: int, latency_ms: int, at_ms: int) -> LeaseAccount:
        """Write the intent to rent `lease` and set aside all that it can cost until `expires_ms` + `latency_ms`.

        Raises:
            BudgetExceeded: The cap would be passed; nothing is written.
            Fenced: Another supervisor holds the run.
        """
        price = micro_usd(lease.offer.usd_per_hour)
        worst = max(price, micro_usd(lease.worst_usd_per_hour))
        with transaction(self._db):
            self._check_epoch()
            known = self._db.execute("SELECT * FROM leases WHERE lease_id = ?", (lease.lease_id,)).fetchone()
            if known is not None:
                return self._account(known)
            account = LeaseAccount(
                lease=lease,
                state="open",
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
            )
            self._check_cap(account.held_micro_usd)
            self._insert(account)
            note = f"{lease.num_nodes} x {lease.offer.offer_id} at most ${usd(worst)}/h each"
            self._write(EntryKind.RESERVE, account, 0, account.held_micro_usd, at_ms, note)
        return account

    def renew(self, lease_id: str, *, expires_ms: int, at_ms: int) -> LeaseAccount:
        """Set aside what the lease can cost until a later `expires_ms`; an earlier one changes nothing.

        Raises:
            BudgetExceeded: The cap would be passed; nothing is written.
        """
        with transaction(self._db):
            before = self._open(lease_id)
            if expires_ms <= before.expires_ms:
                return before
            return self._change(before, replace(before, expires_ms=expires_ms), EntryKind.RESERVE, at_ms, "renewed")

    def resize(self, lease_id: str, *, num_nodes: int, at_ms: int, usd_per_hour: Decimal | None = None) -> LeaseAccount:
        """Say how many nodes may be alive from now on: more is a reservation of its own, fewer releases.

        Elapsed time is accrued with the number that was, as `accrue` does.

        Raises:
            BudgetExceeded: Growing would pass the cap; nothing is written.
        """
        with transaction(self._db):
            before = self.accrue(lease_id, at_ms=at_ms, usd_per_hour=usd_per_hour)
            if num_nodes == before.num_nodes:
                return before
            kind = EntryKind.RESERVE if num_nodes > before.num_nodes else EntryKind.RELEASE
            note = f"{before.num_nodes} -> {num_nodes} nodes"
            return self._change(before, replace(before, num_nodes=num_nodes), kind, at_ms, note)

    def accrue(self, lease_id: str, *, at_ms: int, usd_per_hour: Decimal | None = None) -> LeaseAccount:
        """Move the confirmed moment to `at_ms`; never past expiry + kill latency.

        `usd_per_hour` is the price as read back from the provider. The time since the last accrual is charged at the
        higher of the prices at its two ends; without a price it is unconfirmed and charged at the worst one.
        """
        with transaction(self._db):
            before = self._open(lease_id)
            until = min(at_ms, before.expires_ms + before.latency_ms)
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

    def settle(self, lease_id: str, *, ended_ms: int, at_ms: int, outcome: str) -> LeaseAccount:
        """Close a lease whose end the provider confirmed: charge up to `ended_ms`, then release what is left.

        Repeating it changes nothing.
        """
        with transaction(self._db):
            self._check_epoch()
            account = self.account(lease_id)
            if not account.is_open:
                return account
            account = self.accrue(lease_id, at_ms=ended_ms)
            closed = replace(account, state="settled", num_nodes=0, ended_ms=ended_ms, outcome=outcome)
            self._write(EntryKind.SETTLE, closed, 0, 0, at_ms, f"{outcome}: ${usd(closed.spent_micro_usd)}")
            self._update(closed)
            if account.held_micro_usd:
                self._write(EntryKind.RELEASE, closed, 0, -account.held_micro_usd, at_ms, "unused")
        return closed

    def set_cap(self, cap_usd: Decimal) -> None:
        """Change the cap; never below what is spent and held.

        Raises:
            BudgetExceeded: The new cap is lower than what is already committed.
        """
        with transaction(self._db):
            self._check_epoch()
            balance = self.balance()
            committed = balance.spent_usd + balance.held_usd
            if cap_usd < committed:
                raise BudgetExceeded(needed_usd=committed, remaining_usd=cap_usd)
            self._db.execute(
                "UPDATE runs SET cap_micro_usd = ? WHERE run_id = ?",
                (int(cap_usd * 1_000_000), self.run_id),  # a cap rounds down
            )

    # -- helpers ---------------------------------------------------------------------------------

    def _open(self, lease_id: str) -> LeaseAccount:
        self._check_epoch()
        account = self.account(lease_id)
        if not account.is_open:
            raise SlmError(f"lease {lease_id} is settled; it can neither be renewed nor charged.")
        return account

    def _change(
        self, before: LeaseAccount, after: LeaseAccount, kind: EntryKind, at_ms: int, note: str
    ) -> LeaseAccount:
        spent = after.spent_micro_usd - before.spent_micro_usd
        held = after.held_micro_usd - before.held_micro_usd
        if kind is EntryKind.RESERVE:
            self._check_cap(spent + held)
        self._update(after)
        self._write(kind, after, spent, held, at_ms, note)
        return after

    def _check_cap(self, rise_micro_usd: int) -> None:
        free = self.balance().free_usd
        if usd(rise_micro_usd) > free:
            raise BudgetExceeded(needed_usd=usd(rise_micro_usd), remaining_usd=free)

    def _check_epoch(self) -> None:
        row = self._db.execute("SELECT epoch FROM runs WHERE run_id = ?", (self.run_id,)).fetchone()
        if row is None:
            raise SlmError(f"there are no books for run {self.run_id}.")
        if row["epoch"] != self.epoch:
            raise Fenced(run_id=self.run_id, mine=self.epoch, current=row["epoch"])

    def _write(self, kind: EntryKind, account: LeaseAccount, spent: int, held: int, at_ms: int, note: str) -> None:
        lease_id = account.lease.lease_id
        # The next number of this lease: the same state written twice is the same key, refused by UNIQUE.
        count = self._db.execute("SELECT COUNT(*) FROM entries WHERE lease_id = ?", (lease_id,)).fetchone()[0]
        self._db.execute(
            "INSERT INTO entries (run_id, lease_id, kind, key, spent_micro_usd, held_micro_usd, at_ms, note) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self.run_id, lease_id, kind.value, f"{lease_id}/{count}", spent, held, at_ms, note),
        )

    def _insert(self, account: LeaseAccount) -> None:
        lease = account.lease
        self._db.execute(
            "INSERT INTO leases (lease_id, run_id, attempt, offer_json, nodes_asked, state, num_nodes, "
            "price_micro_usd, worst_micro_usd, latency_ms, first_grant_seconds, kill_latency_seconds, started_ms, "
            "accrued_until_ms, expires_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                lease.lease_id,
                self.run_id,
                lease.attempt,
                json.dumps(asdict(lease.offer), default=str),
                lease.num_nodes,
                account.state,
                account.num_nodes,
                account.price_micro_usd,
                account.worst_micro_usd,
                account.latency_ms,
                lease.first_grant_seconds,
                lease.kill_latency_seconds,
                account.started_ms,
                account.accrued_until_ms,
                account.expires_ms,
            ),
        )

    def _update(self, account: LeaseAccount) -> None:
        self._db.execute(
            "UPDATE leases SET state = ?, num_nodes = ?, price_micro_usd = ?, accrued_until_ms = ?, expires_ms = ?, "
            "ended_ms = ?, accrued_units = ?, outcome = ? WHERE lease_id = ?",
            (
                account.state,
                account.num_nodes,
                account.price_micro_usd,
                account.accrued_until_ms,
                account.expires_ms,
                account.ended_ms,
                account.accrued_units,
                account.outcome,
                account.lease.lease_id,
            ),
        )

    def _account(self, row: sqlite3.Row) -> LeaseAccount:
        offer = json.loads(row["offer_json"])
        for field in ("usd_per_hour", "on_demand_usd_per_hour"):
            offer[field] = None if offer[field] is None else Decimal(offer[field])
        lease = Lease(
            lease_id=row["lease_id"],
            run_id=row["run_id"],
            attempt=row["attempt"],
            offer=Offer(**offer),
            num_nodes=row["nodes_asked"],
            worst_usd_per_hour=usd(row["worst_micro_usd"]),
            first_grant_seconds=row["first_grant_seconds"],
            kill_latency_seconds=row["kill_latency_seconds"],
            epoch=self.epoch,
        )
        return LeaseAccount(
            lease=lease,
            state=row["state"],
            num_nodes=row["num_nodes"],
            price_micro_usd=row["price_micro_usd"],
            worst_micro_usd=row["worst_micro_usd"],
            latency_ms=row["latency_ms"],
            started_ms=row["started_ms"],
            accrued_until_ms=row["accrued_until_ms"],
            expires_ms=row["expires_ms"],
            ended_ms=row["ended_ms"],
            accrued_units=row["accrued_units"],
            outcome=row["outcome"],
        )


def replay(entries: Sequence[LedgerEntry]) -> tuple[int, int]:
    """Spent and held in micro-dollars, from the entries alone: what `balance` must agree with."""
    return sum(entry.spent_micro_usd for entry in entries), sum(entry.held_micro_usd for entry in entries)

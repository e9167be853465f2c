"""What a run costs beside its nodes: disks, the run store, transfers, and the download at the end.

All of it follows from billed time: so many gigabytes for so long, so many checkpoints sent. So the totals can be
computed anew from the ledger at any time, by any supervisor, and charging twice charges once. Rates:
`cost.market.clouds`; sizes and assumptions: `cost.plan.bill`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal

from cost.ledger.accounts import LeaseAccount
from cost.ledger.ledger import Ledger
from cost.market.clouds import cloud_terms
from cost.market.offers import Offer
from cost.plan.bill import (
    BYTES_PER_GB,
    CLOUDS_WITH_A_STORE_INSIDE,
    DISK_GB_PER_NODE,
    EXPORT_BYTES_PER_PARAM,
    HOURS_PER_MONTH,
    KEPT_CHECKPOINTS,
    checkpoint_bytes,
)

MS_PER_HOUR = 3_600_000
DISKS, RUN_STORE, EGRESS, DOWNLOAD = "disks", "run store", "egress", "final download"


@dataclass(frozen=True, slots=True)
class Rates:
    """Dollars per billed hour: of one node's disk, and of what the whole run stores and sends."""

    disk_usd: Decimal
    run_store_usd: Decimal
    egress_usd: Decimal

    def usd_per_hour(self, num_nodes: int) -> Decimal:
        """Of a lease of so many nodes."""
        return self.disk_usd * num_nodes + self.run_store_usd + self.egress_usd


def rates_on(offer: Offer, *, num_params: int, interval_seconds: float) -> Rates:
    """On that offer's cloud, where a checkpoint is sent every `interval_seconds` of billed time."""
    cloud = cloud_terms(offer.cloud)
    saved_gb = checkpoint_bytes(num_params) / BYTES_PER_GB
    sent_gb = 0.0 if cloud.name in CLOUDS_WITH_A_STORE_INSIDE else saved_gb * 3600 / interval_seconds
    months = Decimal(1 / HOURS_PER_MONTH)
    return Rates(
        disk_usd=Decimal(DISK_GB_PER_NODE) * cloud.disk_usd_per_gb_month * months,
        run_store_usd=Decimal(KEPT_CHECKPOINTS * saved_gb) * cloud.storage_usd_per_gb_month * months,
        egress_usd=Decimal(sent_gb) * cloud.egress_usd_per_gb,
    )


def download_usd(offer: Offer, *, num_params: int) -> Decimal:
    """Of the finished weights, once."""
    return Decimal(num_params * EXPORT_BYTES_PER_PARAM / BYTES_PER_GB) * cloud_terms(offer.cloud).egress_usd_per_gb


@dataclass(frozen=True, slots=True)
class Incidentals:
    """Keeps the lines of one run's ledger; `rates` is asked for each lease's offer."""

    ledger: Ledger
    rates: Callable[[Offer], Rates]
    download: Callable[[Offer], Decimal]

    def keep(self, *, at_ms: int) -> None:
        """Charge what it has come to, and set aside what it can still come to with what lives.

        Raises:
            BudgetExceeded: The cap does not cover it.
        """
        accounts = self.ledger.accounts()
        spent, most = self._totals(accounts, last=False), self._totals(accounts, last=True)
        if accounts:
            most[DOWNLOAD] = self.download(accounts[-1].lease.offer)
        self.ledger.keep_lines(estimates=most, totals=spent, at_ms=at_ms)

    def finish(self, *, at_ms: int) -> None:
        """Training is complete: the weights will be downloaded."""
        self.keep(at_ms=at_ms)
        accounts = self.ledger.accounts()
        if accounts:
            self.ledger.charge(DOWNLOAD, self.download(accounts[-1].lease.offer), at_ms=at_ms)

    def _totals(self, accounts: Iterable[LeaseAccount], *, last: bool) -> dict[str, Decimal]:
        """Dollars by line up to now, or to the last moment that can still be billed."""
        totals = dict.fromkeys((DISKS, RUN_STORE, EGRESS), Decimal(0))
        for account in accounts:
            until = account.last_billed_ms if last and account.is_open else account.accrued_until_ms
            hours = Decimal(max(0, until - account.started_ms)) / MS_PER_HOUR
            rates = self.rates(account.lease.offer)
            totals[DISKS] += rates.disk_usd * hours * account.lease.num_nodes
            totals[RUN_STORE] += rates.run_store_usd * hours
            totals[EGRESS] += rates.egress_usd * hours
        return totals

"""Terms of each cloud besides the hourly price: notice, start-up, egress, storage, billing, network.

Figures with their sources, and the assumption where none was found: cost/data/clouds.csv. A cloud without a row
gets the row '*'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from types import MappingProxyType

from cost.tables import table_rows

ANY = "*"
BYTES_PER_GIGABIT = 125_000_000


@dataclass(frozen=True, slots=True)
class Cloud:
    """Terms of one cloud. `startup_seconds` is from the request to a shell on a GPU node, all of it billed."""

    name: str
    notice_seconds: float
    startup_seconds: float
    egress_usd_per_gb: Decimal
    storage_usd_per_gb_month: Decimal
    disk_usd_per_gb_month: Decimal
    minimum_billed_seconds: float
    network_bytes_per_second: float
    """Between two nodes, one direction."""
    notice_source: str
    startup_source: str
    egress_source: str
    storage_source: str


@cache
def _table() -> Mapping[str, Cloud]:
    return MappingProxyType({row["cloud"]: _cloud(row) for row in table_rows("clouds.csv")})


def _cloud(row: Mapping[str, str]) -> Cloud:
    return Cloud(
        name=row["cloud"],
        notice_seconds=float(row["notice_seconds"]),
        startup_seconds=float(row["startup_seconds"]),
        egress_usd_per_gb=Decimal(row["egress_usd_per_gb"]),
        storage_usd_per_gb_month=Decimal(row["storage_usd_per_gb_month"]),
        disk_usd_per_gb_month=Decimal(row["disk_usd_per_gb_month"]),
        minimum_billed_seconds=float(row["minimum_billed_seconds"]),
        network_bytes_per_second=float(row["network_gbit_per_second"]) * BYTES_PER_GIGABIT,
        notice_source=row["notice_source"],
        startup_source=row["startup_source"],
        egress_source=row["egress_source"],
        storage_source=row["storage_source"],
    )


def cloud_terms(name: str) -> Cloud:
    """The row of a cloud, or the default row."""
    return _table().get(name, _table()[ANY])

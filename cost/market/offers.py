"""Offers: what can be rented and at which price, with the date and source of each price.

Two sources give the same `Offer`s: the dated reference table that ships with the project
(cost/data/reference_offers.csv) and SkyPilot's catalog rows. Invariant: every row either becomes an offer or is listed
in `skipped` with the reason; no price is guessed, and a spot price that is no lower than on-demand is skipped.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import Any

from cost.market.hardware import accelerators, canonical_name
from cost.tables import table_rows

MIB_PER_GIB = 1024
LARGEST_PLAUSIBLE_GIB_FIGURE = 1000
"""RunPod's catalog writes GiB into the MiB field: a smaller figure than this cannot be MiB of any GPU here."""
CARDS_SOLD_WITH_MORE_MEMORY = frozenset({"V100", "GH200"})
"""For all other cards, a row that states more memory than our table is read as our table has it."""
AUCTION_FLOORS_PER_GPU = {"mithril": Decimal(1)}
"""Clouds whose listed price is the lowest bid of an auction, in dollars per GPU-hour."""
ANY_REGION = "any"
SKYPILOT_CATALOG = "skypilot-catalog"
SLICED_A100_GIB = (40.0, 80.0)


@dataclass(frozen=True, slots=True)
class Offer:
    """One kind of node that a cloud rents by the hour.

    `usd_per_hour` is the price of one whole node. `accelerator` is a name of `cost.market.hardware`.
    `on_demand_usd_per_hour` is the same node's price without preemption, where it is known.
    """

    cloud: str
    region: str
    zone: str | None
    instance_type: str | None
    accelerator: str
    gpus_per_node: int
    gpu_memory_gib: float
    spot: bool
    usd_per_hour: Decimal
    on_demand_usd_per_hour: Decimal | None
    as_of: str
    source: str

    @property
    def offer_id(self) -> str:
        """Stable name, for logs and for telling a preempted offer from the next one."""
        place = "/".join(part for part in (self.cloud, self.region, self.zone) if part)
        kind = "spot" if self.spot else "on-demand"
        return f"{place}/{self.accelerator}x{self.gpus_per_node}/{self.instance_type or '-'}/{kind}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row, or one price of a row, that is no offer."""

    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class Quotes:
    """Offers of one source, in the source's order, and the rows that were skipped."""

    offers: tuple[Offer, ...]
    skipped: tuple[Skipped, ...]


class _NoOffer(ValueError):
    """Why a row is no offer; never leaves this module."""


def load_reference_offers() -> Quotes:
    """The dated table that ships with the project, used when there are no newer prices."""
    return _collect(_from_reference(row) for row in table_rows("reference_offers.csv"))


def read_catalog(rows: Iterable[Mapping[str, Any]], cloud: str, as_of: str, source: str) -> Quotes:
    """Rows of SkyPilot's catalog of one cloud, by column name, in any column order.

    Columns are those of its `vms.csv`, or the fields of `InstanceTypeInfo` that `sky.catalog.list_accelerators` gives.
    A row of `vms.csv` that prices an accelerator apart from its host (GCP, without an instance type) is skipped, since
    such a price is not that of a node; `list_accelerators` adds the host.
    """
    return _collect(_from_catalog(row, cloud.lower(), as_of, source) for row in rows)


FIELDS_OF_INSTANCE_TYPE_INFO: Mapping[str, str] = MappingProxyType(
    {
        "InstanceType": "instance_type",
        "AcceleratorName": "accelerator_name",
        "AcceleratorCount": "accelerator_count",
        "Price": "price",
        "SpotPrice": "spot_price",
        "Region": "region",
    }
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of either source, before it is known to be an offer."""

    cloud: str
    region: str
    zone: str
    instance_type: str
    accelerator: str
    count: str
    memory_gib: tuple[float, ...]
    """Readings of the memory of one device, of which the table's own figure tells the right one."""
    price: str
    spot_price: str
    as_of: str
    source: str
    hint: str = ""
    needs_region: bool = True
    """SkyPilot rents in a region only; a price tracker may leave it open."""

    @property
    def label(self) -> str:
        parts = (self.cloud, self.region, self.zone, self.instance_type or "-", self.accelerator or "-")
        return "/".join(part for part in parts if part)


def _collect(rows: Iterable[_Row]) -> Quotes:
    offers: dict[str, Offer] = {}
    skipped: list[Skipped] = []
    for row in rows:
        try:
            found, missing = _offers_in_row(row)
        except _NoOffer as error:
            skipped.append(Skipped(row.label, str(error)))
            continue
        skipped.extend(Skipped(row.label, reason) for reason in missing)
        for offer in found:
            known = offers.get(offer.offer_id)
            if known is None:
                offers[offer.offer_id] = offer
                continue
            offers[offer.offer_id] = min(known, offer, key=lambda either: either.usd_per_hour)
            higher = max(known.usd_per_hour, offer.usd_per_hour)
            skipped.append(Skipped(offer.offer_id, f"listed twice; the higher price, ${higher}, was skipped"))
    return Quotes(tuple(offers.values()), tuple(skipped))


def _from_reference(row: Mapping[str, str]) -> _Row:
    memory = _number(row["gpu_memory_gib"])
    return _Row(
        cloud=row["cloud"],
        region=_region(row["region"]),
        zone=row["zone"].strip(),
        instance_type=row["instance_type"].strip(),
        accelerator=row["accelerator"].strip(),
        count=row["count"],
        memory_gib=() if memory is None else (memory,),
        price=row["on_demand_usd_per_hour"],
        spot_price=row["spot_usd_per_hour"],
        as_of=row["as_of"],
        source=row["source"],
        needs_region=row["source"].startswith(SKYPILOT_CATALOG),
    )


def _from_catalog(row: Mapping[str, Any], cloud: str, as_of: str, source: str) -> _Row:
    cells = {key: "" if value is None else str(value).strip() for key, value in row.items() if key}
    for column, field in FIELDS_OF_INSTANCE_TYPE_INFO.items():
        cells.setdefault(column, cells.get(field, ""))
    name, memory = _gpu_info(cells.get("GpuInfo", ""), _number(cells["AcceleratorCount"]))
    device_gib = _number(cells.get("device_memory", ""))
    return _Row(
        cloud=cloud,
        region=_region(cells["Region"]),
        zone=cells.get("AvailabilityZone", ""),
        instance_type=cells["InstanceType"],
        accelerator=cells["AcceleratorName"],
        count=cells["AcceleratorCount"],
        memory_gib=memory or ((device_gib,) if device_gib else ()),
        price=cells["Price"],
        spot_price=cells["SpotPrice"],
        as_of=as_of,
        source=source,
        hint=name,
    )


def _gpu_info(text: str, count: float | None) -> tuple[str, tuple[float, ...]]:
    """Name and possible memory of one GPU from SkyPilot's GpuInfo: a Python literal, JSON, a bare word or nothing."""
    info: Any = None
    for parse in (json.loads, ast.literal_eval):
        try:
            info = parse(text.replace(": null", ": None") if parse is ast.literal_eval else text)
            break
        except (ValueError, SyntaxError):
            continue
    if not isinstance(info, dict) or not info.get("Gpus"):
        return text if info is None else "", ()
    gpu = info["Gpus"][0]
    size = _number(str((gpu.get("MemoryInfo") or {}).get("SizeInMiB") or ""))
    name = str(gpu.get("Name") or "")
    if not size:
        return name, ()
    gib = size if size < LARGEST_PLAUSIBLE_GIB_FIGURE else size / MIB_PER_GIB
    return name, (gib, gib / count) if count and count > 1 else (gib,)


def _offers_in_row(row: _Row) -> tuple[list[Offer], list[str]]:
    gpus_per_node = _whole_gpus(row.count, row.accelerator)
    if row.cloud == "gcp" and not row.instance_type:
        raise _NoOffer("the price is of an accelerator without its host machine")
    if row.needs_region and row.region == ANY_REGION:
        raise _NoOffer("no region is stated, so SkyPilot cannot rent it")
    name, memory_gib = _device(row)
    on_demand, spot = _prices(row, gpus_per_node)
    missing = (
        []
        if spot is None or on_demand is None or spot < on_demand
        else ["the spot price is no lower than the on-demand price"]
    )
    spot = None if missing else spot
    if on_demand is None and spot is None:
        raise _NoOffer("no price")
    offers = [
        Offer(
            cloud=row.cloud,
            region=row.region,
            zone=row.zone or None,
            instance_type=row.instance_type or None,
            accelerator=name,
            gpus_per_node=gpus_per_node,
            gpu_memory_gib=memory_gib,
            spot=is_spot,
            usd_per_hour=price,
            on_demand_usd_per_hour=on_demand,
            as_of=row.as_of,
            source=row.source,
        )
        for is_spot, price in ((True, spot), (False, on_demand))
        if price is not None
    ]
    return offers, missing


def _whole_gpus(text: str, accelerator: str) -> int:
    count = _number(text)
    if not accelerator or not count:
        raise _NoOffer("no accelerator")
    if count != int(count):
        raise _NoOffer(f"the row is for a fraction of a GPU ({text})")
    return int(count)


def _prices(row: _Row, gpus_per_node: int) -> tuple[Decimal | None, Decimal | None]:
    """On-demand and spot; a price of zero means missing (Vast writes 0.00), a floor of an auction is no price."""
    on_demand, spot = _money(row.price), _money(row.spot_price)
    floor = AUCTION_FLOORS_PER_GPU.get(row.cloud)
    if floor is not None and on_demand is not None and on_demand <= floor * gpus_per_node:
        raise _NoOffer(f"${on_demand} is the lowest bid of an auction, not a price")
    return on_demand, spot


def _device(row: _Row) -> tuple[str, float]:
    """Our name of the accelerator and the memory of one device in GiB."""
    hint = f"{row.hint} {row.instance_type}"
    memory = _nearest(row.memory_gib, SLICED_A100_GIB)
    name = canonical_name(row.accelerator, memory_gib=memory, hint=hint)
    if name is None:
        raise _NoOffer(f"the hardware table has no accelerator '{row.accelerator}'")
    expected = accelerators()[name].memory_gib
    memory = _nearest(row.memory_gib, (expected,))
    if memory is None:
        return name, expected
    return name, memory if name in CARDS_SOLD_WITH_MORE_MEMORY else min(memory, expected)


def _nearest(readings: tuple[float, ...], targets: tuple[float, ...]) -> float | None:
    """The reading whose ratio to any target is nearest to one."""
    if not readings:
        return None
    return min(readings, key=lambda gib: min(abs(math.log(gib / target)) for target in targets))


def _region(text: str) -> str:
    """One line without empty parts: Vast writes ', US, NA' where the city is unknown."""
    return ", ".join(part.strip() for part in text.split(",") if part.strip()) or ANY_REGION


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _money(text: str) -> Decimal | None:
    try:
        price = Decimal(text.strip())
    except InvalidOperation:
        return None
    return price if price.is_finite() and price > 0 else None

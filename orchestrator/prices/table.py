"""Which prices `slm plan` believes: the cache of SkyPilot's catalogs, else the dated table that ships with slm.

The cache is one JSON file that `python -m orchestrator.prices.sources.skypilot` writes whole or not at all. Nothing
here imports SkyPilot or waits for a network: a cache that is too old is refreshed by a process in the background, for
the next time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cost.market.offers import Offer, load_reference_offers
from orchestrator.settings import Home
from tasks.own_module import own_module

REFERENCE_TABLE = "reference table"
CACHE_VERSION = 1
STALE_AFTER = timedelta(days=1)
RETRY_AFTER = timedelta(hours=1)
"""A refresh that failed is not tried again sooner by itself."""
REFRESH_VARIABLE = "SLM_REFRESH"
NEVER = "never"
"""Value of `REFRESH_VARIABLE` with which nothing is refreshed in the background."""

_DATE = re.compile(r"(?:>=)?(\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True, slots=True)
class Unread:
    """A cloud whose catalog could not be read."""

    cloud: str
    reason: str


@dataclass(frozen=True, slots=True)
class Prices:
    """Offers, and where their prices come from. `read_at` is None for the table that ships with slm."""

    offers: tuple[Offer, ...]
    source: str
    num_skipped: int = 0
    """Rows of the source that are no offers."""
    read_at: datetime | None = None
    unread: tuple[Unread, ...] = ()
    enabled: tuple[str, ...] | None = None
    """Clouds that SkyPilot has credentials for; None where it has not said."""
    problem: str | None = None
    """Why a newer source was not used."""

    def dates(self) -> tuple[date, date] | None:
        """The oldest and the newest price that states its day; None where none does."""
        known = sorted(day for offer in self.offers if (day := day_of(offer)) is not None)
        return (known[0], known[-1]) if known else None

    @property
    def num_undated(self) -> int:
        """Offers whose source states no day."""
        return sum(day_of(offer) is None for offer in self.offers)


def day_of(offer: Offer) -> date | None:
    """The day from which a price is known; None where the source is undated."""
    found = _DATE.match(offer.as_of)
    return date.fromisoformat(found[1]) if found else None


def reference_prices(problem: str | None = None) -> Prices:
    """The dated table that ships with slm."""
    quotes = load_reference_offers()
    return Prices(quotes.offers, REFERENCE_TABLE, len(quotes.skipped), problem=problem)


def current_prices(home: Home | None = None) -> Prices:
    """The newest prices on this machine; without a home the table that ships with slm."""
    if home is None or not home.offers.exists():
        return reference_prices()
    try:
        return read_cache(home.offers)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return reference_prices(f"{home.offers} cannot be read ({error!r}); slm offers --refresh writes it anew")


# ---------------------------------------------------------------- the cache


def read_cache(path: Path) -> Prices:
    """What a refresh wrote.

    Raises:
        ValueError, KeyError, TypeError, ArithmeticError: The file is damaged, or of another version.
    """
    document: Any = json.loads(path.read_text(encoding="utf-8"))
    if document["version"] != CACHE_VERSION:
        raise ValueError(f"version {document['version']}, not {CACHE_VERSION}")
    enabled = document["enabled_clouds"]
    return Prices(
        offers=tuple(_offer(fields) for fields in document["offers"]),
        source=str(document["source"]),
        num_skipped=int(document["num_skipped"]),
        read_at=datetime.fromisoformat(document["read_at"]),
        unread=tuple(Unread(item["cloud"], item["reason"]) for item in document["unread"]),
        enabled=None if enabled is None else tuple(enabled),
    )


def write_cache(prices: Prices, path: Path) -> None:
    """Write the file whole or not at all."""
    assert prices.read_at is not None
    document = {
        "version": CACHE_VERSION,
        "read_at": prices.read_at.isoformat(),
        "source": prices.source,
        "num_skipped": prices.num_skipped,
        "unread": [asdict(catalog) for catalog in prices.unread],
        "enabled_clouds": prices.enabled,
        "offers": [_fields(offer) for offer in prices.offers],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(path)


def _fields(offer: Offer) -> dict[str, Any]:
    fields = asdict(offer)
    on_demand = offer.on_demand_usd_per_hour
    fields["usd_per_hour"] = str(offer.usd_per_hour)
    fields["on_demand_usd_per_hour"] = None if on_demand is None else str(on_demand)
    return fields


def _offer(fields: Mapping[str, Any]) -> Offer:
    on_demand = fields["on_demand_usd_per_hour"]
    prices = {
        "usd_per_hour": Decimal(fields["usd_per_hour"]),
        "on_demand_usd_per_hour": None if on_demand is None else Decimal(on_demand),
    }
    return Offer(**{**fields, **prices})


# ---------------------------------------------------------------- age


def age(prices: Prices, best: Offer | None, now: datetime) -> str:
    """Which source, and how old: of the whole cache, or of the one price that matters."""
    if prices.read_at is not None:
        return f"{prices.source}, read {ago(now - prices.read_at)}"
    day = None if best is None else day_of(best)
    if day is None:
        return f"{prices.source}, undated" if best is not None else prices.source
    days = max(0, (now.date() - day).days)
    return f"{prices.source}, {days} day{'' if days == 1 else 's'} old"


def ago(elapsed: timedelta) -> str:
    """3 hours ago."""
    minutes = max(0, int(elapsed.total_seconds() // 60))
    for size, unit in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size:
            number = minutes // size
            return f"{number} {unit}{'' if number == 1 else 's'} ago"
    return "just now"


# ---------------------------------------------------------------- refreshing


def has_skypilot() -> bool:
    """Whether SkyPilot is installed; looks without importing it."""
    return find_spec("sky") is not None


def refresh_when_stale(home: Home, now: datetime, environ: Mapping[str, str]) -> bool:
    """Start a refresh in the background where the cache is old and SkyPilot is there; says whether it did."""
    if environ.get(REFRESH_VARIABLE) == NEVER or not has_skypilot():
        return False
    if not _older(home.offers, now, STALE_AFTER) or not _older(home.offers_attempt, now, RETRY_AFTER):
        return False
    home.create()
    home.offers_attempt.touch()
    with home.offers_log.open("wb") as log:
        subprocess.Popen(
            refresh_command(home), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return True


def refresh_command(home: Home, clouds: Sequence[str] = ()) -> list[str]:
    """The child that reads SkyPilot's catalogs into the cache."""
    named = ["--clouds", ",".join(clouds)] if clouds else []
    return own_module("orchestrator.prices.sources.skypilot", str(home.offers), *named)


def _older(path: Path, now: datetime, limit: timedelta) -> bool:
    """Whether a file was written longer ago than this, or never."""
    try:
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return True
    return now - written > limit

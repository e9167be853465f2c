"""Which prices are believed, how old they are said to be, and when they are read anew."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.market.offers import Quotes, Skipped
from orchestrator.prices import table as prices
from orchestrator.prices.sources import skypilot as catalog
from orchestrator.prices.table import Prices, Unread
from orchestrator.settings import Home
from tasks.own_module import own_module
from tests.support.builders import make_offer

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
H100 = make_offer(
    cloud="lambda",
    region="us-east-1",
    instance_type="gpu_8x_h100",
    gpus_per_node=8,
    usd_per_hour="8.123456",
    on_demand_usd_per_hour="24.10",
    as_of="2026-11-22",
)
CACHED = Prices(
    (H100, replace(H100, cloud="aws", spot=False, on_demand_usd_per_hour=None)),
    "SkyPilot 0.14.1 catalogs",
    num_skipped=7,
    read_at=NOW - timedelta(hours=5),
    unread=(Unread("azure", "ConnectionError: no network"),),
    enabled=("aws", "lambda"),
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_the_cache_keeps_every_digit(home: Home) -> None:
    prices.write_cache(CACHED, home.offers)
    assert prices.current_prices(home) == CACHED
    assert [path.name for path in home.root.iterdir()] == ["offers.json"]


def test_without_a_cache_the_shipped_table_is_used(home: Home) -> None:
    assert prices.current_prices(home).source == prices.REFERENCE_TABLE
    assert prices.current_prices(home) == prices.current_prices()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "offers": [{"cloud": "aws"}]}'],
)
def test_a_damaged_cache_is_said_and_the_shipped_table_used(home: Home, text: str) -> None:
    home.offers.write_text(text)
    found = prices.current_prices(home)
    assert found.source == prices.REFERENCE_TABLE
    assert str(home.offers) in (found.problem or "")
    assert "slm offers --refresh writes it anew" in (found.problem or "")


def test_a_price_that_is_no_number_damages_the_cache(home: Home) -> None:
    prices.write_cache(CACHED, home.offers)
    document = json.loads(home.offers.read_text())
    document["offers"][0]["usd_per_hour"] = "cheap"
    home.offers.write_text(json.dumps(document))
    assert prices.current_prices(home).problem is not None


@pytest.mark.parametrize(
    ("elapsed", "said"),
    [
        (timedelta(seconds=20), "just now"),
        (timedelta(minutes=1), "1 minute ago"),
        (timedelta(hours=5), "5 hours ago"),
        (timedelta(days=3, hours=5), "3 days ago"),
    ],
)
def test_the_age_of_a_cache_is_that_of_its_reading(elapsed: timedelta, said: str) -> None:
    found = replace(CACHED, read_at=NOW - elapsed)
    assert prices.age(found, H100, NOW) == f"SkyPilot 0.14.1 catalogs, read {said}"


def test_the_age_of_a_shipped_price_is_that_of_the_price() -> None:
    table = Prices((H100,), prices.REFERENCE_TABLE)
    assert prices.age(table, H100, NOW) == "reference table, 1 day old"
    assert prices.age(table, replace(H100, as_of="undated"), NOW) == "reference table, undated"
    assert prices.age(table, None, NOW) == "reference table"


# ---------------------------------------------------------------- refreshing by itself


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were started in the background."""
    commands: list[list[str]] = []
    monkeypatch.setattr(prices, "has_skypilot", lambda: True)
    monkeypatch.setattr(prices.subprocess, "Popen", lambda command, **_: commands.append(command))
    return commands


def written(path: Path, age: timedelta) -> None:
    path.touch()
    moment = (NOW - age).timestamp()
    os.utime(path, (moment, moment))


def test_an_old_cache_is_refreshed_once_an_hour_at_most(home: Home, started: list[list[str]]) -> None:
    assert prices.refresh_when_stale(home, datetime.now(UTC), {})
    assert started == [own_module("orchestrator.prices.sources.skypilot", str(home.offers))]
    assert not prices.refresh_when_stale(home, datetime.now(UTC), {})
    written(home.offers_attempt, timedelta(hours=2))
    written(home.offers, timedelta(hours=25))
    assert prices.refresh_when_stale(home, NOW, {})


def test_a_fresh_cache_and_a_wish_leave_it_alone(home: Home, started: list[list[str]]) -> None:
    assert not prices.refresh_when_stale(home, NOW, {"SLM_REFRESH": "never"})
    written(home.offers, timedelta(hours=23))
    assert not prices.refresh_when_stale(home, NOW, {})
    assert started == []


def test_without_skypilot_nothing_is_started(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "find_spec", lambda _: None)
    assert not prices.refresh_when_stale(home, NOW, {})
    assert list(home.root.iterdir()) == []


# ---------------------------------------------------------------- the child that reads


def quotes_of(cloud: str) -> Quotes:
    if cloud == "azure":
        raise ConnectionError("no network")
    return Quotes((replace(H100, cloud=cloud),), (Skipped("row", "no price"),))


def collected(clouds: list[str], read: Any = quotes_of) -> Prices:
    return catalog.collect(clouds, read, source="test", enabled=None, now=NOW)


def test_a_cloud_that_cannot_be_read_is_named_and_the_others_are_kept() -> None:
    found = collected(["aws", "azure", "gcp"])
    assert [offer.cloud for offer in found.offers] == ["aws", "gcp"]
    assert found.unread == (Unread("azure", "ConnectionError: no network"),)
    assert found.num_skipped == 2


def test_a_cloud_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CLOUD_SECONDS", 1)

    def hang(cloud: str) -> Quotes:
        if cloud == "gcp":
            import threading

            threading.Event().wait(30)
        return quotes_of(cloud)

    found = collected(["gcp", "aws"], hang)
    assert [each_catalog.cloud for each_catalog in found.unread] == ["gcp"]
    assert "no answer within 1 s" in found.unread[0].reason
    assert [offer.cloud for offer in found.offers] == ["aws"]


def test_what_was_not_read_now_stays_as_it_was(home: Home) -> None:
    prices.write_cache(collected(["aws", "gcp", "lambda"]), home.offers)
    dearer = replace(H100, cloud="aws", usd_per_hour=Decimal(9))
    now = Prices((dearer,), "test", read_at=NOW, unread=(Unread("gcp", "no network"),))
    merged = catalog.with_kept(now, home.offers, ["aws", "gcp"])
    assert {offer.cloud: offer.usd_per_hour for offer in merged.offers} == {
        "aws": Decimal(9),
        "gcp": H100.usd_per_hour,
        "lambda": H100.usd_per_hour,
    }
    assert merged.unread == (Unread("gcp", "no network"),)


def test_only_one_refresh_runs_at_a_time(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with home.offers.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert catalog.main([str(home.offers)]) == catalog.BUSY
    assert "another refresh is under way" in capsys.readouterr().err


def test_a_broken_skypilot_is_told_from_none(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sky", None)
    assert catalog.main([str(home.offers)]) == catalog.NO_SKYPILOT
    assert "SkyPilot cannot be imported" in capsys.readouterr().err
    assert not home.offers.exists()

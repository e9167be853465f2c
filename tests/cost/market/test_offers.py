"""Prices become offers, or are skipped with a reason: every trap that a real price list was seen to set."""

from __future__ import annotations

import csv
import io
from decimal import Decimal
from pathlib import Path

import pytest

from cost.market.hardware import accelerators
from cost.market.offers import Quotes, load_reference_offers, read_catalog

CATALOGS = Path(__file__).resolve().parents[4] / "shared" / "data" / "catalogs"
HEADER = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region"


def read(line: str, *, header: str = HEADER, cloud: str = "Vast") -> Quotes:
    rows = csv.DictReader(io.StringIO(f"{header}\n{line}\n", newline=""))
    return read_catalog(rows, cloud, "2026-07-20", "test")


def info(name: str, mib: float, *, manufacturer: str = "'NVIDIA'") -> str:
    gpu = f"{{'Name': '{name}', 'Manufacturer': {manufacturer}, 'MemoryInfo': {{'SizeInMiB': {mib}}}}}"
    return f"\"{{'Gpus': [{gpu}], 'TotalGpuMemoryInMiB': {mib}}}\""


def test_the_reference_table_loads_with_dates_and_sources() -> None:
    quotes = load_reference_offers()
    assert len(quotes.offers) > 400
    assert all(offer.as_of and offer.source and offer.accelerator in accelerators() for offer in quotes.offers)
    assert all(skipped.reason for skipped in quotes.skipped)
    assert len({offer.offer_id for offer in quotes.offers}) == len(quotes.offers)


def test_no_reference_row_is_lost() -> None:
    quotes = load_reference_offers()
    table = Path(__file__).resolve().parents[3] / "cost" / "data" / "reference_offers.csv"
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    prices = sum(bool(row["spot_usd_per_hour"]) + bool(row["on_demand_usd_per_hour"]) for row in rows)
    unpriced = sum(not row["spot_usd_per_hour"] and not row["on_demand_usd_per_hour"] for row in rows)
    both_skipped = prices + unpriced - len(quotes.offers) - len(quotes.skipped)
    # A skipped row with two prices is one reason; every other price is an offer or a reason of its own.
    assert 0 <= both_skipped <= len(quotes.skipped)


def test_one_row_with_two_prices_is_two_offers() -> None:
    quotes = load_reference_offers()
    verda = [o for o in quotes.offers if o.cloud == "verda" and o.instance_type == "1A100.22V"]
    assert {(o.spot, o.usd_per_hour) for o in verda} == {(True, Decimal("0.4515")), (False, Decimal("1.29"))}
    assert {o.on_demand_usd_per_hour for o in verda} == {Decimal("1.29")}


def test_a_spot_price_of_zero_is_missing_not_free() -> None:
    quotes = read(f'1x-H200,H200,1,32,64,{info("H200", 143771)},2.65,0.00,"France, FR, EU"')
    assert [(o.spot, o.usd_per_hour) for o in quotes.offers] == [(False, Decimal("2.65"))]


def test_spot_at_the_on_demand_price_is_no_discount() -> None:
    quotes = read(f"1x_A100-80GB,A100-80GB,1.0,8,117,{info('A100 PCIe', 80)},1.39,1.39,IN", cloud="RunPod")
    assert [o.spot for o in quotes.offers] == [False]
    assert quotes.skipped[0].reason == "the spot price is no lower than the on-demand price"


def test_an_auction_floor_is_no_price() -> None:
    quotes = read(f"h100-80gb.sxm.8x,H100,8,168,1814,{info('H100', 81920)},8.0,8.0,us-central2-a", cloud="Mithril")
    assert not quotes.offers
    assert quotes.skipped[0].reason == "$8.0 is the lowest bid of an auction, not a price"


def test_spot_without_on_demand_and_the_reverse() -> None:
    only_spot = read(f"2B300.60V,B300,2.0,60,550,{info('B300', 268800)},,4.893,FIN-03", cloud="Verda")
    assert [(o.spot, o.on_demand_usd_per_hour) for o in only_spot.offers] == [(True, None)]
    neither = read(f"2B300.60V,B300,2.0,60,550,{info('B300', 268800)},,,FIN-03", cloud="Verda")
    assert [s.reason for s in neither.skipped] == ["no price"]


def test_a_fraction_of_a_gpu_is_no_offer() -> None:
    quotes = read(f"g6f.2xlarge,L4,0.25,8,32,{info('L4', 5722)},0.475,0.1213,us-east-2", cloud="AWS")
    assert [s.reason for s in quotes.skipped] == ["the row is for a fraction of a GPU (0.25)"]


@pytest.mark.parametrize(("region", "kept"), [("France, FR, EU", "France, FR, EU"), (", US, NA", "US, NA")])
def test_regions_may_hold_commas_and_empty_parts(region: str, kept: str) -> None:
    quotes = read(f'1x-H200,H200,1,32,64,{info("H200", 143771)},2.65,,"{region}"')
    assert quotes.offers[0].region == kept


def test_a_row_of_skypilot_without_a_region_cannot_be_placed() -> None:
    quotes = read(f"ECS3GPU8,H100,4,64,1024,{info('H100', 81920)},7.56,,", cloud="Seeweb")
    assert [s.reason for s in quotes.skipped] == ["no region is stated, so SkyPilot cannot rent it"]
    # A price tracker may leave the region open.
    assert any(offer.region == "any" and offer.cloud == "runpod" for offer in load_reference_offers().offers)


def test_a_bare_null_and_a_bare_word_in_gpu_info() -> None:
    null = read(f"n3-A100x1,A100-80G-PCIe,1,28,120,{info('A100-80G-PCIe', 81920, manufacturer='null')},1.35,,CANADA-1")
    assert (null.offers[0].accelerator, null.offers[0].gpu_memory_gib) == ("A100-80GB-PCIe", 80.0)
    word = read("1x_H100,H100-80GB-HBM3,1.0,16,80,H100_80GB_SXM5,4.41,2.29,US", cloud="RunPod")
    assert {offer.accelerator for offer in word.offers} == {"H100-SXM"}


def test_crlf_and_another_column_order() -> None:
    rows = "SpotPrice,Price,Region,AcceleratorCount,AcceleratorName,InstanceType\r\n1.25,2.95,eu-north1,1,H200,a\r\n"
    quotes = read_catalog(csv.DictReader(io.StringIO(rows, newline="")), "Nebius", "2026-07-20", "test")
    assert [(o.spot, o.region, o.usd_per_hour) for o in quotes.offers] == [
        (True, "eu-north1", Decimal("1.25")),
        (False, "eu-north1", Decimal("2.95")),
    ]


def test_a_gcp_accelerator_without_its_host_is_no_node() -> None:
    quotes = read(",L4,1,,,,0.56,0.22,us-central1", cloud="GCP")
    assert [s.reason for s in quotes.skipped] == ["the price is of an accelerator without its host machine"]


@pytest.mark.parametrize(
    ("name", "count", "mib", "gib"),
    [
        ("RTX5090", 2, 65214, 31.8),  # Vast: all GPUs together
        ("H100", 8, 655360, 80.0),  # Verda's older file: the same
        ("H100", 8, 81920, 80.0),  # one GPU
        ("A100-80GB", 1, 80, 80.0),  # RunPod: GiB in the MiB field
        ("L40S", 1, 0, 48.0),  # Seeweb: zero, so the table's figure
        ("A100", 8, 40960, 40.0),  # not an eighth of 40 GiB
    ],
)
def test_memory_is_that_of_one_gpu(name: str, count: int, mib: int, gib: float) -> None:
    quotes = read(f"x,{name},{count},8,64,{info(name, mib)},9.0,,US")
    assert quotes.offers[0].gpu_memory_gib == pytest.approx(gib, abs=0.1)


def test_no_more_memory_is_believed_than_the_card_has() -> None:
    super_ti = read(f"2x-RTX_4070S_Ti,RTX4070,2,32,64,{info('RTX4070', 32752)},0.3,,US")
    assert super_ti.offers[0].gpu_memory_gib == 12.0
    modified = read(f"1x-RTX_4090,RTX4090,1,32,64,{info('RTX4090', 49140)},0.4,,US")
    assert modified.offers[0].gpu_memory_gib == 24.0
    larger = read(f"p3dn.24xlarge,V100,8,96,768,{info('V100', 32768)},31.2,,us-east-1", cloud="AWS")
    assert larger.offers[0].gpu_memory_gib == 32.0


def test_the_same_offer_listed_twice_keeps_the_cheaper_price_and_says_so() -> None:
    lines = f"x,H200,1,8,64,{info('H200', 143771)},3.0,,US\nx,H200,1,8,64,{info('H200', 143771)},2.5,,US"
    quotes = read(lines)
    assert [o.usd_per_hour for o in quotes.offers] == [Decimal("2.5")]
    assert "listed twice; the higher price, $3.0, was skipped" in quotes.skipped[0].reason


def test_rows_of_skypilots_python_interface_are_read_too() -> None:
    """The fields of `sky.catalog.common.InstanceTypeInfo`; pandas writes nan where there is nothing."""
    row = {
        "cloud": "GCP",
        "instance_type": None,
        "accelerator_name": "L4",
        "accelerator_count": 1.0,
        "cpu_count": 4,
        "device_memory": 22.5,
        "memory": 16.0,
        "price": 0.7068,
        "spot_price": float("nan"),
        "region": "us-central1",
    }
    attached = read_catalog([row | {"instance_type": "g2-standard-4"}], "gcp", "2026-11-23", "sky")
    assert [(o.spot, o.usd_per_hour, o.gpu_memory_gib) for o in attached.offers] == [(False, Decimal("0.7068"), 22.5)]
    unknown_memory = read_catalog([row | {"instance_type": "x", "device_memory": float("nan")}], "gcp", "d", "sky")
    assert unknown_memory.offers[0].gpu_memory_gib == 24.0


def test_every_row_of_every_catalog_becomes_an_offer_or_a_reason() -> None:
    files = sorted(CATALOGS.glob("*/*/vms*.csv"))
    if not files:
        pytest.skip(f"no SkyPilot catalogs at {CATALOGS}")
    for file in files:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        quotes = read_catalog(rows, file.parent.name, "undated", file.name)
        assert len(quotes.offers) + len(quotes.skipped) >= len(rows), file
        assert all(offer.usd_per_hour > 0 for offer in quotes.offers), file
        assert all(12 <= offer.gpu_memory_gib <= 288 for offer in quotes.offers), file

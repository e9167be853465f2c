"""Against SkyPilot itself: its optimizer names our prices in our order, and a refresh reads what its files say.

Needs SkyPilot (the extra `cloud`) and catalog files beside the project; no credentials and no network. SkyPilot runs in
processes with homes of their own, since it reads and writes below the home.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cost.market.offers import read_catalog
from orchestrator.prices.table import read_cache

ROOT = Path(__file__).resolve().parents[3]
CATALOGS = ROOT.parent / "shared" / "data" / "catalogs"
FILES = CATALOGS / "v8"
CLOUDS = ("lambda", "nebius", "verda", "vast", "mithril", "hyperbolic", "seeweb")
REQUESTS = 50
SECONDS = 300

pytestmark = [
    pytest.mark.skipif(find_spec("sky") is None, reason="SkyPilot is not installed (the extra cloud)"),
    pytest.mark.skipif(not FILES.is_dir(), reason=f"no catalog files in {CATALOGS}"),
]


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    # Nothing answers on this port: what has no file here must fail at once, not wait for a network.
    environment = {
        **os.environ,
        "HOME": str(home),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def test_prices_and_order_agree_with_skypilots_optimizer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.sky_agreement", str(CATALOGS), "--requests", str(REQUESTS), "--json"]
    done = run(command, tmp_path)
    assert done.stdout, done.stderr[-2000:]
    document: Any = json.loads(done.stdout)
    wrong = [item for item in document["answers"] if not item["agrees"]]
    assert document["requests"] == REQUESTS
    assert document["agree"] == REQUESTS, wrong
    assert done.returncode == 0


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home whose catalogs are ours, after one refresh of the clouds that have a file and of one that has none."""
    home = tmp_path_factory.mktemp("sky-home")
    for cloud in CLOUDS:
        for folder, name, text in ((".", "vms.csv", None), (".meta", "vms.csv.md5", "another file")):
            target = home / ".sky" / "catalogs" / "v8" / folder / cloud
            target.mkdir(parents=True)
            if text is None:
                shutil.copy(FILES / cloud / "vms.csv", target / name)
            else:
                (target / name).write_text(text)  # SkyPilot leaves files alone that differ from what it fetched
    cache = home / "offers.json"
    command = [
        sys.executable,
        "-m",
        "orchestrator.prices.sources.skypilot",
        str(cache),
        "--clouds",
        ",".join((*CLOUDS, "paperspace")),
    ]
    done = run(command, home)
    assert done.returncode == 0, done.stderr[-2000:]
    return cache, done.stdout


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_refresh_reads_the_prices_of_the_files(refreshed: tuple[Path, str], cloud: str) -> None:
    with (FILES / cloud / "vms.csv").open(newline="", encoding="utf-8") as lines:
        ours = read_catalog(list(csv.DictReader(lines)), cloud, "undated", "file").offers
    key = "{0.region}/{0.instance_type}/{0.accelerator}x{0.gpus_per_node}/{0.spot}".format
    cheapest: dict[str, Any] = {}
    for our in ours:
        cheapest[key(our)] = min(our.usd_per_hour, cheapest.get(key(our), our.usd_per_hour))
    theirs = {key(offer): offer.usd_per_hour for offer in read_cache(refreshed[0]).offers if offer.cloud == cloud}
    assert theirs == cheapest


def test_a_cloud_without_a_file_and_a_network_is_named_and_skipped(refreshed: tuple[Path, str]) -> None:
    cache, said = refreshed
    prices = read_cache(cache)
    assert [catalog.cloud for catalog in prices.unread] == ["paperspace"]
    assert said.startswith("not read: paperspace (")
    assert prices.source.startswith("SkyPilot ")
    assert prices.enabled is None
    assert {offer.cloud for offer in prices.offers} <= set(CLOUDS)


def test_prices_are_dated_by_the_file_that_was_read(refreshed: tuple[Path, str]) -> None:
    prices = read_cache(refreshed[0])
    assert prices.read_at is not None
    assert {offer.as_of for offer in prices.offers} == {prices.read_at.date().isoformat()}


def test_clouds_with_credentials_are_those_that_sky_check_found(tmp_path: Path) -> None:
    code = """
from sky import global_user_state
from sky.clouds import CloudCapability
from orchestrator.prices.sources.skypilot import enabled_clouds
print(enabled_clouds())
global_user_state.set_enabled_clouds(["AWS", "Lambda", "Kubernetes"], CloudCapability.COMPUTE, "default")
print(enabled_clouds())
"""
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.stdout.splitlines() == ["None", "['aws', 'lambda']"], done.stderr[-2000:]

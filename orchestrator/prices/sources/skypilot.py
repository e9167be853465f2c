"""Reads SkyPilot's price catalogs into the cache of `orchestrator.prices.table`; a process of its own.

    python -m orchestrator.prices.sources.skypilot OFFERS_JSON [--clouds aws,gcp]

`import sky` takes seconds and hundreds of megabytes, so nothing else of ours does it for prices. Each cloud is asked
alone and without credentials (all at once would query the clusters of Kubernetes and Slurm too); one that cannot be
read is named in the cache and keeps the offers that it had. Invariant: the cache is replaced only if a cloud was read.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cost.market.offers import Offer, Quotes, Skipped, read_catalog
from orchestrator.prices.sources import slurm as catalog_slurm
from orchestrator.prices.table import Prices, Unread, read_cache, write_cache

UNPRICED = frozenset({"kubernetes", "ssh", "vsphere"})
"""Machines that people own: SkyPilot lists what their clusters have, at no price."""
SLURM = "slurm"
"""Machines of one's own too, but SkyPilot's settings can price them, and they can be spot markets."""
CLOUD_SECONDS = 60
"""Longest wait for one cloud: SkyPilot downloads without a limit of its own."""
LONGEST_REASON = 120
NOTHING_READ = 1
NO_SKYPILOT = 3
BUSY = 4

Read = Callable[[str], Quotes]


class _TookTooLong(Exception):
    """A cloud did not answer within `CLOUD_SECONDS`."""


def collect(clouds: Sequence[str], read: Read, *, source: str, enabled: Sequence[str] | None, now: datetime) -> Prices:
    """All offers of all clouds that can be read; the others with the reason."""
    offers: list[Offer] = []
    unread: list[Unread] = []
    skipped = 0
    for cloud in clouds:
        try:
            with at_most(CLOUD_SECONDS):
                quotes = read(cloud)
        except Exception as error:  # one cloud's files, library or network must not cost us the others
            unread.append(Unread(cloud, f"{type(error).__name__}: {error}".strip(": ")[:LONGEST_REASON]))
            continue
        offers += quotes.offers
        skipped += len(quotes.skipped)
    return Prices(
        offers=tuple(offers),
        source=source,
        num_skipped=skipped,
        read_at=now,
        unread=tuple(unread),
        enabled=None if enabled is None else tuple(enabled),
    )


def with_kept(prices: Prices, path: Path, asked: Sequence[str]) -> Prices:
    """What was read now, and the offers of other clouds, or of clouds that failed now, from the cache before."""
    failed = {each_catalog.cloud for each_catalog in prices.unread}
    read = {cloud for cloud in asked if cloud not in failed}
    try:
        before = read_cache(path)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
        return prices
    kept = tuple(offer for offer in before.offers if offer.cloud not in read)
    named = tuple(each_catalog for each_catalog in before.unread if each_catalog.cloud not in read | failed)
    return replace(prices, offers=(*prices.offers, *kept), unread=(*prices.unread, *named))


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Interrupt what takes longer."""

    def interrupt(*_: object) -> None:
        raise _TookTooLong(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- SkyPilot


def priced_clouds() -> list[str]:
    """Clouds of SkyPilot that have a catalog of prices."""
    from sky.utils.registry import CLOUD_REGISTRY

    names = sorted(str(name) for name in CLOUD_REGISTRY if str(name) not in UNPRICED)
    here = Path("~/.slurm/config").expanduser().exists()
    names = [name for name in names if name != SLURM or here]
    return [name for name in names if importlib.util.find_spec(f"sky.catalog.{name}_catalog") is not None]


def read_cloud(cloud: str) -> Quotes:
    """One cloud's offers through SkyPilot's Python API, dated by the file that it downloaded.

    The API leaves out what a file says about the GPU itself, which tells an H100's form; that is added from the file.
    """
    if cloud == SLURM:
        return catalog_slurm.read()
    from sky import catalog
    from sky.catalog import common

    found = catalog.list_accelerators(gpus_only=True, clouds=cloud, all_regions=True)
    file = Path(common.get_catalog_path(f"{cloud}/vms.csv"))
    about, day = about_gpus(file), "undated"
    if file.exists():
        day = datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()
    rows = [
        {**row._asdict(), "GpuInfo": about.get((str(row.instance_type), str(row.accelerator_name)), "")}
        for several in found.values()
        for row in several
    ]
    quotes = read_catalog(rows, cloud, day, f"SkyPilot's catalog of {cloud}")
    return quotes if quotes.offers else Quotes((), (*quotes.skipped, Skipped(cloud, "no offer")))


def about_gpus(file: Path) -> dict[tuple[str, str], str]:
    """What a catalog file says about the GPUs of each instance type."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        return {
            (row.get("InstanceType") or "", row.get("AcceleratorName") or ""): row.get("GpuInfo") or "" for row in rows
        }


def enabled_clouds() -> list[str] | None:
    """What `sky check` last found credentials for; None where it has not run. Asks no cloud."""
    from sky import global_user_state, skypilot_config
    from sky.clouds import CloudCapability
    from sky.skylet import runtime_utils

    if not Path(runtime_utils.get_runtime_dir_path(".sky/state.db")).exists():
        return None
    workspace = skypilot_config.get_active_workspace()
    known = global_user_state.get_cached_enabled_clouds(CloudCapability.COMPUTE, workspace)
    return sorted({str(cloud).lower() for cloud in known} - UNPRICED) or None


def main(arguments: Sequence[str]) -> int:
    """Refresh the cache; prints one line for each cloud."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("offers_json", type=Path)
    parser.add_argument("--clouds", default="", help="only these, such as aws,gcp")
    options = parser.parse_args(arguments)
    with options.offers_json.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another refresh is under way.", file=sys.stderr)  # noqa: T201
            return BUSY
        return refresh(options.offers_json, [name for name in options.clouds.split(",") if name])


def refresh(path: Path, clouds: Sequence[str]) -> int:
    """Read every cloud, or the named ones, and replace the cache."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import sky

            names = list(clouds) or priced_clouds()
            try:
                enabled = enabled_clouds()
            except Exception as error:  # a database of another version is no reason to have no prices
                print(f"credentials are unknown: {error}")  # noqa: T201
                enabled = None
            prices = collect(
                names,
                read_cloud,
                source=f"SkyPilot {sky.__version__} catalogs",
                enabled=enabled,
                now=datetime.now(UTC),
            )
    except ImportError as error:
        print(f"SkyPilot cannot be imported: {error}", file=sys.stderr)  # noqa: T201
        return NO_SKYPILOT
    for kind in sorted({each_catalog.reason.partition(":")[0] for each_catalog in prices.unread}):
        alike = [each_catalog for each_catalog in prices.unread if each_catalog.reason.partition(":")[0] == kind]
        print(f"not read: {', '.join(entry.cloud for entry in alike)} ({alike[0].reason})")  # noqa: T201
    if not prices.offers:
        print("no cloud could be read; the prices stay as they were.", file=sys.stderr)  # noqa: T201
        return NOTHING_READ
    write_cache(with_kept(prices, path, names), path)
    print(f"{len(prices.offers)} offers of {len(names) - len(prices.unread)} clouds in {path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

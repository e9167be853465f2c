"""How long a full plan takes over thousands of offers, how much memory, and how it grows.

    python bench/plan_speed.py [--offers 2500] [--max-nodes 4] [--repeat 5] [--json]

Offers are the reference table with its prices moved by up to 20 % and its regions renamed, until there are enough: as
many accelerators and node sizes as the table has. A second process measures the whole of `python -c` with imports,
warm (bytecode and files cached). Where SkyPilot is installed, its optimizer is timed on the same on-demand offers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from cost.market.offers import Offer, load_reference_offers
from cost.plan.frontier import model_shape
from cost.plan.planner import make_plan

SIZES = (0.25, 0.5, 1.0, 2.0)
"""Shares of the asked number of offers, to see how the time grows."""
NUM_PARAMS = 1.1e9
BUDGET_USD = Decimal(100)
SKY_CLOUD = "lambda"
SKY_COLUMNS = (
    "InstanceType",
    "AcceleratorName",
    "AcceleratorCount",
    "vCPUs",
    "MemoryGiB",
    "Price",
    "Region",
    "GpuInfo",
    "SpotPrice",
)
MAC_UNIT = 2**20
LINUX_UNIT = 2**10


def many_offers(count: int, seed: int = 0) -> list[Offer]:
    """The reference offers again and again under other regions and prices."""
    rng = random.Random(seed)
    table = load_reference_offers().offers
    offers: list[Offer] = []
    while len(offers) < count:
        original = table[len(offers) % len(table)]
        factor = Decimal(str(round(rng.uniform(0.8, 1.2), 4)))
        offers.append(
            dataclasses.replace(
                original,
                region=f"{original.region}-{len(offers) // len(table)}",
                usd_per_hour=original.usd_per_hour * factor,
                on_demand_usd_per_hour=None
                if original.on_demand_usd_per_hour is None
                else original.on_demand_usd_per_hour * factor,
            )
        )
    return offers


def seconds_to_plan(offers: Sequence[Offer], max_nodes: int, repeat: int) -> float:
    """Median over repetitions, of which the first, cold one does not count."""
    work = model_shape(NUM_PARAMS)
    timings = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        plan = make_plan(work, offers, budget_usd=BUDGET_USD, max_nodes=max_nodes)
        timings.append(time.perf_counter() - begin)
        assert len(plan.ranked) + len(plan.rejected) == len(offers)
    return statistics.median(timings[1:])


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MAC_UNIT if sys.platform == "darwin" else LINUX_UNIT)


def child(offers: int, max_nodes: int) -> dict[str, float]:
    """A fresh process that imports, loads, plans once and ends: wall seconds and peak memory."""
    command = [sys.executable, __file__, "--child", "--offers", str(offers), "--max-nodes", str(max_nodes)]
    subprocess.run(command, check=True, capture_output=True)
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"wall_seconds": time.perf_counter() - begin, "peak_mib": float(done.stdout)}


def sky_seconds(offers: Sequence[Offer], repeat: int) -> float | None:
    """SkyPilot's optimizer on the same offers, written as one cloud's catalog; None where it is not installed.

    It is asked for any of the accelerators and counts that are on demand, and answers with the cheapest. It knows no
    throughput, memory, preemption or start-up: this is the time of choosing by $/h alone.
    """
    with tempfile.TemporaryDirectory(prefix="sky-home-") as home:
        kinds = _write_catalog(offers, Path(home))
        os.environ["HOME"] = home
        os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
        try:
            import sky
            from sky import check
            from sky.utils import registry
        except ImportError:
            return None
        cloud = registry.CLOUD_REGISTRY.from_str(SKY_CLOUD)
        check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: [cloud]
        timings = []
        for _ in range(repeat + 1):
            with contextlib.redirect_stdout(io.StringIO()), sky.Dag() as dag:
                wanted = {sky.Resources(accelerators={name: count}) for name, count in kinds}
                sky.Task(run="true").set_resources(wanted)
                begin = time.perf_counter()
                sky.Optimizer.optimize(dag, quiet=True)
                timings.append(time.perf_counter() - begin)
        return statistics.median(timings[1:])


def _write_catalog(offers: Sequence[Offer], home: Path) -> list[tuple[str, int]]:
    """SkyPilot's files for one cloud; returns accelerators and counts."""
    folder = home / ".sky" / "catalogs" / "v8"
    kinds = sorted({(offer.accelerator, offer.gpus_per_node) for offer in offers if not offer.spot})
    for name in (f"{SKY_CLOUD}/vms.csv", "common/accelerators.csv"):
        (folder / name).parent.mkdir(parents=True)
        (folder / ".meta" / name).parent.mkdir(parents=True)
        (folder / ".meta" / f"{name}.md5").write_text("of another file")
    with (folder / SKY_CLOUD / "vms.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(SKY_COLUMNS)
        for number, offer in enumerate(offers):
            if not offer.spot:
                kind = f"{offer.gpus_per_node}x-{offer.accelerator}-{number}"
                region = f"{offer.cloud}-{offer.region}".replace(",", "").replace(" ", "-")
                info = f"{{'Gpus': [{{'Name': '{offer.accelerator}', 'Count': {offer.gpus_per_node}}}]}}"
                row = (kind, offer.accelerator, offer.gpus_per_node, 16, 64, offer.usd_per_hour, region, info, "")
                writer.writerow(row)
    with (folder / "common" / "accelerators.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("AcceleratorName", "Clouds"))
        writer.writerows((name, f"['{SKY_CLOUD}']") for name in sorted({name for name, _ in kinds}))
    return kinds


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offers", type=int, default=2500)
    parser.add_argument("--max-nodes", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        make_plan(
            model_shape(NUM_PARAMS), many_offers(options.offers), budget_usd=BUDGET_USD, max_nodes=options.max_nodes
        )
        print(peak_mib())
        return 0
    counts = [max(1, round(options.offers * share)) for share in SIZES]
    by_count = {count: seconds_to_plan(many_offers(count), options.max_nodes, options.repeat) for count in counts}
    process = child(options.offers, options.max_nodes)
    document = {
        "offers": options.offers,
        "max_nodes": options.max_nodes,
        "plan_seconds": by_count[options.offers],
        "process_wall_seconds": process["wall_seconds"],
        "process_peak_mib": process["peak_mib"],
        "seconds_by_offers": {str(count): seconds for count, seconds in by_count.items()},
        "sky_optimizer_seconds": sky_seconds(many_offers(options.offers), options.repeat),
    }
    if options.json:
        print(json.dumps(document, indent=2))
        return 0
    print(f"plan over {options.offers} offers, up to {options.max_nodes} nodes: {by_count[options.offers]:.3f} s")
    print(f"whole process: {process['wall_seconds']:.3f} s, {process['peak_mib']:.0f} MiB at most")
    for count, seconds in by_count.items():
        print(f"{count:>8} offers {seconds:>8.3f} s {seconds / count * 1e6:>8.0f} us each")
    sky = document["sky_optimizer_seconds"]
    print(
        "SkyPilot's optimizer: "
        + ("not installed here" if sky is None else f"{sky:.3f} s for the cheapest $/h of the same on-demand offers")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

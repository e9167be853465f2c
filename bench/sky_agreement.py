"""Do our prices and their order agree with SkyPilot's own optimizer on the same catalog files?

    python bench/sky_agreement.py CATALOGS [--requests 50] [--seed 0] [--json]

CATALOGS holds SkyPilot's files as `v8/<cloud>/vms.csv`. Needs `skypilot` (the `cloud` extra) but no credentials and no
network: it runs in a home of its own, where the clouds that have a file count as enabled. Each request is a random
accelerator, count, and spot or on-demand. SkyPilot's candidates in every region are compared with our offers of the
same instance type, and what its optimizer picks with our cheapest. Where SkyPilot has a spot price and we have no spot
offer, our on-demand offer must cost the same: spot without a discount is not offered.

Not compared, since the files set traps that SkyPilot walks into: spot of Vast (0.00 there means missing) and Mithril
(the lowest bid of an auction). AWS, GCP and Azure need further files.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cost.market.offers import Offer, read_catalog

LEFT_OUT = frozenset({"aws", "gcp", "azure", "mithril"})
WITHOUT_SPOT = frozenset({"vast"})
CENT_FRACTION = 1e-6


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of both."""

    accelerator: str
    count: int
    spot: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went."""

    request: Request
    sky_usd_per_hour: float
    our_usd_per_hour: float
    num_candidates: int
    prices_agree: bool
    order_agrees: bool
    seconds: float

    @property
    def agrees(self) -> bool:
        return (
            self.prices_agree
            and self.order_agrees
            and abs(self.sky_usd_per_hour - self.our_usd_per_hour) <= CENT_FRACTION
        )


class Ours:
    """Our offers of the same files, by place, and how the files spell the accelerator of an instance type."""

    def __init__(self, folder: Path, clouds: Sequence[str]) -> None:
        self.prices: dict[tuple[str, str, str, bool], float] = {}
        self.kinds: dict[tuple[str, int], set[tuple[str, str]]] = {}
        for cloud in clouds:
            with (folder / cloud / "vms.csv").open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            for offer in read_catalog(rows, cloud, "undated", "test").offers:
                self._add(offer)
            known = {instance_type for _, instance_type, _, _ in self.prices}
            for row in rows:
                if row["InstanceType"] in known:
                    kind = (row["AcceleratorName"], int(float(row["AcceleratorCount"])))
                    self.kinds.setdefault(kind, set()).add((cloud, row["InstanceType"]))

    def _add(self, offer: Offer) -> None:
        key = (offer.cloud, offer.instance_type or "", offer.region, offer.spot)
        price = float(offer.usd_per_hour)
        self.prices[key] = min(price, self.prices.get(key, price))

    def price(self, cloud: str, instance_type: str, region: str, spot: bool) -> float | None:
        """In one place; on-demand where spot is no discount."""
        place = ", ".join(part.strip() for part in region.split(",") if part.strip())
        found = self.prices.get((cloud, instance_type, place, spot))
        return self.prices.get((cloud, instance_type, place, False)) if found is None else found

    def cheapest(self, request: Request, places: set[tuple[str, str, str]]) -> float:
        """Over all instance types of this accelerator and count, in places that SkyPilot can use at all."""
        kinds = self.kinds[request.accelerator, request.count]
        prices = (
            price
            for (cloud, instance_type, region, spot), price in self.prices.items()
            if (cloud, instance_type) in kinds
            and (spot == request.spot or (cloud, instance_type, region) in places)
            and not (spot and not request.spot)
        )
        return min(prices)


def enable(folder: Path, clouds: Sequence[str]) -> Path:
    """A home with these catalog files; SkyPilot takes files that somebody else put there as they are."""
    home = Path(tempfile.mkdtemp(prefix="sky-home-"))
    catalogs = home / ".sky" / "catalogs" / "v8"
    for name in (*(f"{cloud}/vms.csv" for cloud in clouds), "common/accelerators.csv"):
        for place in (catalogs / name, catalogs / ".meta" / f"{name}.md5"):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, catalogs / name)
        (catalogs / ".meta" / f"{name}.md5").write_text("of another file")
    os.environ["HOME"] = str(home)
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    return home


def requests(ours: Ours, seed: int) -> Iterator[Request]:
    """Random ones that at least one instance type can meet."""
    rng = random.Random(seed)
    spot = {(cloud, kind) for cloud, kind, _, is_spot in ours.prices if is_spot and cloud not in WITHOUT_SPOT}
    on_demand = {(cloud, kind) for cloud, kind, _, is_spot in ours.prices if not is_spot}
    possible = [
        Request(accelerator, number, is_spot)
        for (accelerator, number), kinds in sorted(ours.kinds.items())
        for is_spot, priced in ((True, spot), (False, on_demand))
        if kinds & priced
    ]
    while True:
        yield rng.choice(possible)


def ask(sky: Any, request: Request, ours: Ours) -> Answer:
    """One request to SkyPilot's optimizer and to our offers."""
    from sky import optimizer

    with sky.Dag() as dag:
        task = sky.Task(run="true")
        task.set_resources(sky.Resources(accelerators={request.accelerator: request.count}, use_spot=request.spot))
    found, _, _, _ = optimizer._fill_in_launchable_resources(task, None, quiet=True)
    candidates = [
        item
        for several in found.values()
        for item in several
        if not (request.spot and str(item.cloud).lower() in WITHOUT_SPOT)
    ]
    begin = time.perf_counter()
    sky.Optimizer.optimize(dag, quiet=True)
    seconds = time.perf_counter() - begin
    pairs = []
    places = set()
    for candidate in candidates:
        cloud, kind, region = str(candidate.cloud).lower(), candidate.instance_type, candidate.region
        pairs.append((candidate.get_cost(3600), ours.price(cloud, kind, region, request.spot)))
        places.add((cloud, kind, ", ".join(part.strip() for part in region.split(",") if part.strip())))
    best = task.best_resources
    sky_best = best.get_cost(3600)
    if request.spot and str(best.cloud).lower() in WITHOUT_SPOT:
        sky_best = min(theirs for theirs, _ in pairs)
    by_theirs = [mine for _, mine in sorted(pairs, key=lambda pair: pair[0])]
    return Answer(
        request=request,
        sky_usd_per_hour=sky_best,
        our_usd_per_hour=ours.cheapest(request, places),
        num_candidates=len(pairs),
        prices_agree=all(mine is not None and abs(theirs - mine) <= CENT_FRACTION for theirs, mine in pairs),
        order_agrees=all(
            low is not None and high is not None and low <= high + CENT_FRACTION
            for low, high in itertools.pairwise(by_theirs)
        ),
        seconds=seconds,
    )


def ask_many(sky: Any, ours: Ours, count: int, seed: int) -> tuple[list[Answer], list[Request]]:
    """That many answered requests, and those for which SkyPilot finds nothing in its own catalog."""
    answers: list[Answer] = []
    unknown: list[Request] = []
    for request in requests(ours, seed):
        try:
            answers.append(ask(sky, request, ours))
        except sky.exceptions.ResourcesUnavailableError:
            unknown.append(request)
        if len(answers) == count or len(unknown) > 10 * count:
            break
    return answers, unknown


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogs", type=Path)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    folder = options.catalogs.resolve() / "v8"
    files = sorted(path.parent.name for path in folder.glob("*/vms.csv"))
    home = enable(folder, files)
    try:
        import sky
        from sky import check
        from sky.utils import registry
    except ImportError:
        print("error: skypilot is not installed; install the extra: pip install 'slm-spot[cloud]'", file=sys.stderr)
        return 1
    try:
        known = {str(cloud).lower(): cloud for cloud in registry.CLOUD_REGISTRY.values()}
        names = [name for name in files if name in known and name not in LEFT_OUT]
        check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: [known[name] for name in names]
        ours = Ours(folder, names)
        with contextlib.redirect_stdout(io.StringIO()):  # where SkyPilot draws its spinners
            answers, unknown = ask_many(sky, ours, options.requests, options.seed)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    agree = sum(answer.agrees for answer in answers)
    if options.json:
        rows = [{**asdict(answer), "agrees": answer.agrees} for answer in answers]
        print(json.dumps({"clouds": names, "requests": len(answers), "agree": agree, "answers": rows}, indent=2))
    else:
        print(f"{agree} of {len(answers)} requests agree, over {', '.join(names)}")
        print(
            f"{sum(answer.num_candidates for answer in answers)} prices compared; SkyPilot's optimizer took a median "
            f"of {sorted(answer.seconds for answer in answers)[len(answers) // 2]:.3f} s"
        )
        print(f"{len(unknown)} more had no answer from SkyPilot: {', '.join(sorted({r.accelerator for r in unknown}))}")
        for answer in answers:
            if not answer.agrees:
                print(answer)
    return 0 if agree == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

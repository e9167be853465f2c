"""Thousands of schedules of faults against the real ledger and supervisor: is the true bill ever above the cap?

`python bench/cap_faults.py --schedules N --seed S [--faults NAME,...] [--price-ratio R] [--workers W] [--json]`
`python bench/cap_faults.py --without LAYER` takes one layer of the promise out, with the faults that it is there for.
`python bench/cap_faults.py --replay SEED` tells one schedule line by line.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from faults.fault_free import cases, row
from faults.fault_free import play as play_free
from faults.layers import LAYERS
from faults.schedule import Result, nothing, run_schedule

SEEDS_APART = 1_000_003
EXAMPLES = 5
WHY_LEFT = {
    "OUT_OF_BUDGET": "less than the smallest lease sets aside",
    "nobody came back": "the supervisor was lost and nobody came back",
    "given up": "started again so often that a person would look",
    "STOPPED": "stopped as asked",
    "SUCCEEDED": "training was complete",
}


def report(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """The figures over all schedules; each is scaled to a cap of $100."""
    held = [result for result in results if not result.broken]
    shares = sorted(100 * schedule.bill_usd / schedule.cap_usd for schedule in held)
    kinds = Counter(name for result in results for name in result.faults)
    wrong = [schedule for schedule in held if schedule.violation]
    short = [schedule for schedule in held if schedule.ledger_short]
    beyond = [result for result in results if result.broken and (result.violation or result.ledger_short)]
    spent = sum(result.bill_usd / result.cap_usd for result in results)
    return {
        "schedules": len(results),
        "violations": len(wrong),
        "ledger_short": len(short),
        "overshoot_beyond_bound": len(beyond),
        "max_usd": round(shares[-1], 2) if shares else 0.0,
        "p99_usd": round(shares[int(0.99 * (len(shares) - 1))], 2) if shares else 0.0,
        "kept_share": kept_share(results),
        "kept_share_where_assumptions_hold": kept_share(held),
        "use": round(sum(shares) / 100 / len(shares), 4) if shares else 0.0,
        "startup_share": round(sum(result.startup_usd / result.cap_usd for result in results) / spent, 4)
        if spent
        else 0.0,
        "unspent_by_cause": unspent_by_cause(results),
        "kept_by_profile": kept_by_profile(results),
        "invariant_checks": sum(result.checks for result in results),
        "rarest_fault_share": round(min(kinds.values()) / len(results), 4) if kinds else 0.0,
        "seeds_of_violations": [schedule.seed for schedule in wrong[:EXAMPLES]],
        "seeds_beyond_bound": [schedule.seed for schedule in beyond[:EXAMPLES]],
        "seeds_of_short_ledgers": [schedule.seed for schedule in short[:EXAMPLES]],
        "faults_of_short_ledgers": dict(Counter(name for schedule in short for name in schedule.faults).most_common(8)),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds(), 1),
    }


def cpu_seconds() -> float:
    """Of this process and its workers, the same however busy the machine is, but for what its cores share."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def collect_seldom() -> None:
    """A schedule makes little garbage that counting references does not find, and looking for it takes a tenth."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def unspent_by_cause(results: Sequence[Result]) -> dict[str, float]:
    """What stays of the caps, as shares of them, by why it stays."""
    shares: Counter[str] = Counter()
    for result in results:
        unconfirmed = result.cap_usd - result.left_usd - result.bill_usd
        shares["charged at the worst price, never confirmed"] += unconfirmed / result.cap_usd
        shares[WHY_LEFT[result.end]] += result.left_usd / result.cap_usd
    return {cause: round(share / len(results), 4) for cause, share in shares.most_common()}


def kept_by_profile(results: Sequence[Result]) -> dict[str, float]:
    """Share of the dollars spent whose training was kept, by provider."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.profile, []).append(result)
    shares = {}
    for name, group in sorted(found.items()):
        shares[name] = kept_share(group)
    return shares


def kept_share(results: Sequence[Result]) -> float:
    """Share of the dollars spent that bought training which was kept, each cap counted alike."""
    spent = sum(result.bill_usd / result.cap_usd for result in results)
    return round(sum(result.kept_usd / result.cap_usd for result in results) / spent, 4) if spent else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", help="exactly these kinds, by comma; '' for none")
    parser.add_argument("--price-ratio", type=float, help="price over p-hat, instead of the table's")
    parser.add_argument("--without", choices=sorted(LAYERS), help="take this layer out")
    parser.add_argument("--fault-free", type=int, default=0, metavar="N", help="runs of each case without faults")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    faults = None if arguments.faults is None else [name for name in arguments.faults.split(",") if name]
    layer = LAYERS[arguments.without] if arguments.without else None
    if layer is not None and faults is None:
        faults = list(layer.faults)
    take_out = nothing if layer is None else layer.take_out
    play = partial(run_schedule, faults=faults, price_ratio=arguments.price_ratio, break_layer=take_out)
    if arguments.replay is not None:
        print(play(arguments.replay, log=print))
        return 0
    started = time.monotonic()
    seeds = range(arguments.seed * SEEDS_APART, arguments.seed * SEEDS_APART + arguments.schedules)
    if arguments.workers == 1:
        results = [play(seed) for seed in seeds]
    else:
        with multiprocessing.Pool(arguments.workers, initializer=collect_seldom) as pool:
            results = pool.map(play, seeds, chunksize=20)
    found = report(results, time.monotonic() - started)
    if arguments.fault_free:
        free_seeds = range(arguments.seed, arguments.seed + arguments.fault_free)
        with multiprocessing.Pool(arguments.workers) as pool:
            found["fault_free"] = [
                row(
                    case,
                    pool.map(partial(play_free, case), free_seeds),
                )
                for case in cases()
            ]
        found["fault_free_use"] = found["fault_free"][0]["use"]
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:24} {value}")
    return 1 if found["violations"] or found["overshoot_beyond_bound"] or found["ledger_short"] else 0


if __name__ == "__main__":
    sys.exit(main())

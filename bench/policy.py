"""Spot policies on real availability traces: useful hours against what hindsight could reach.

    python bench/policy.py FOLDER [--budget 100] [--spot 0.918] [--on-demand 3.06] [--deadline 120]
        [--startup 12min] [--lost 7.5min] [--starts 150] [--seed 0] [--json]

FOLDER holds .json traces as in "Can't Be Late" (NSDI 2024), one per zone. The bound pays nothing for start-up or
losses; `cost.plan.policy.offline_bound` states it. With several zones the table also shows each zone alone (their
mean).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cost.errors import UserError
from cost.plan.policy import DEFAULT, POLICIES, Score, Terms, Traces, read_traces, score

HOURS_PER_UNIT = {"h": 1.0, "min": 1 / 60, "s": 1 / 3600}


def duration(text: str, unit: str) -> float:
    """Hours of '12', '12min', '0.2h' or '720s'; a bare number is in `unit`."""
    match = re.fullmatch(r"([0-9.]+)\s*(h|min|s)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no duration; write 12min, 0.2h or 720s")
    return float(match[1]) * HOURS_PER_UNIT[match[2] or unit]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=100.0, help="dollars")
    parser.add_argument("--spot", type=float, default=0.918, help="dollars per hour")
    parser.add_argument("--on-demand", type=float, default=3.06, help="dollars per hour")
    parser.add_argument("--deadline", type=lambda text: duration(text, "h"), default=120.0, help="hours")
    parser.add_argument("--startup", type=lambda text: duration(text, "min"), default=0.2, help="minutes, billed")
    parser.add_argument("--lost", type=lambda text: duration(text, "min"), default=0.125, help="minutes a preemption")
    parser.add_argument("--starts", type=int, default=150, help="random starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def random_starts(traces: Traces, terms: Terms, count: int, seed: int) -> list[float]:
    """Hours from which the deadline still lies in the trace, or any of a trace shorter than that; whole ticks."""
    hours = traces.hours - terms.deadline_hours
    ticks = round((hours if hours >= 0 else traces.hours) / traces.tick_hours)
    rng = random.Random(seed)
    return [rng.randrange(ticks + 1) * traces.tick_hours for _ in range(count)]


def mean(scores: Sequence[Score]) -> Score:
    values = zip(*(dataclasses.astuple(each_score) for each_score in scores), strict=True)
    return Score(*(sum(column) / len(scores) for column in values))


def table(title: str, scores: Mapping[str, Score]) -> None:
    print(f"{title:<32} {'of bound':>9} {'useful h':>9} {'usd':>8} {'preemptions':>12}")
    for name, each_score in scores.items():
        mark = "*" if name == DEFAULT else " "
        print(
            f"{mark} {name:<30} {each_score.fraction_of_bound:>9.3f} {each_score.useful_hours:>9.1f} "
            f"{each_score.usd:>8.2f} {each_score.preemptions:>12.1f}"
        )


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        traces = read_traces(options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    terms = Terms(options.budget, options.spot, options.on_demand, options.deadline, options.startup, options.lost)
    starts = random_starts(traces, terms, options.starts, options.seed)
    every_zone = {name: score(policy, traces, terms, starts) for name, policy in POLICIES.items()}
    alone = [traces.only(zone) for zone in traces.zones]
    one_zone = {name: mean([score(policy, zone, terms, starts) for zone in alone]) for name, policy in POLICIES.items()}
    if options.json:
        document = {
            "policies": {name: dataclasses.asdict(item) for name, item in every_zone.items()},
            "default": DEFAULT,
            "one_zone": {name: dataclasses.asdict(item) for name, item in one_zone.items()},
        }
        print(json.dumps(document, indent=2))
        return 0
    table(f"all {len(traces.zones)} zones, {len(starts)} starts", every_zone)
    table("one zone, mean over zones", one_zone)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

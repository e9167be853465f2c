"""Refits the planner's constants: `python bench/fit_throughput.py [RUNS.csv] [--add NEW.csv] [--check]`.

Reads cost/data/calibration_runs.csv (or RUNS.csv) and writes cost/data/calibration.json: constants with their priors,
effects of frameworks and devices, and how far cross-validated predictions lay off, which is what an estimate's
interval is made of. `--add` first appends the usable rows of another file, by id; `--check` adds a nested
check against overfitting: constants fitted to random halves of the cells, tried on the other half.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from crossvalidate import Errors, leave_out, summary
from estimate_accuracy import CALIBRATION_RUNS
from runs_file import Run, read_runs
from throughput_fit import NAMES, PRIORS, Fit, Row, fit

from cost.errors import SlmError

CALIBRATION = CALIBRATION_RUNS.with_name("calibration.json")
LOW, HIGH = 0.05, 0.95
NUM_HALVES = 30
DIGITS = 4


def add_rows(target: Path, other: Path) -> int:
    """Append the usable rows of `other` that `target` lacks, in its columns; returns how many."""
    reader = csv.DictReader(target.read_text(encoding="utf-8").splitlines())
    known = list(reader)
    usable = {run.id for run in read_runs(other)[0]} - {row["id"] for row in known}
    new = [row for row in csv.DictReader(other.read_text(encoding="utf-8-sig").splitlines()) if row["id"] in usable]
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames or (), extrasaction="ignore", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows([*known, *new])
    return len(new)


def weighted_quantile(errors: Errors, weight: dict[str, float], share: float) -> float:
    """The smallest error that holds `share` of the weight below or at it."""
    total = sum(weight[run] for run in errors)
    passed = 0.0
    for run in sorted(errors, key=lambda name: errors[name]):
        passed += weight[run]
        if passed >= share * total:
            return errors[run]
    return max(errors.values())


def intervals(rows: Sequence[Row], whole: Fit) -> dict[str, dict[str, float | int]]:
    """Errors where the framework was seen on this device, on others, or not at all; every framework weighs the same."""
    by_cell = leave_out(rows, [], lambda row: row.run.cell, whole)
    by_type = leave_out(rows, [], lambda row: row.run.gpu_type, whole)
    by_framework = leave_out(rows, [], lambda row: row.framework, whole)
    pairs = {(row.framework, row.accelerator): set[tuple[str, str]]() for row in rows}
    types = {row.framework: set[str]() for row in rows}
    for row in rows:
        pairs[row.framework, row.accelerator].add(row.run.cell)
        types[row.framework].add(row.run.gpu_type)
    seen = {row.run.id for row in rows if len(pairs[row.framework, row.accelerator]) > 1}
    elsewhere = {row.run.id for row in rows if len(types[row.framework]) > 1}
    cases = {
        "measured": {run: error for run, error in by_cell.items() if run in seen},
        "framework": {run: error for run, error in by_type.items() if run in elsewhere},
        "pooled": by_framework,
    }
    result: dict[str, dict[str, float | int]] = {}
    for basis, errors in cases.items():
        count = Counter(row.framework for row in rows if row.run.id in errors)
        weight = {row.run.id: 1.0 / count[row.framework] for row in rows if row.run.id in errors}
        low, high = (round(weighted_quantile(errors, weight, share), DIGITS) for share in (LOW, HIGH))
        result[basis] = {"low": min(low, 0.0), "high": max(high, 0.0), "num_rows": len(errors)}
    return result


def document(rows: Sequence[Row], whole: Fit) -> dict[str, Any]:
    """What cost/performance/throughput.py reads."""
    values = [float(f"{math.exp(value):.{DIGITS}g}") for value in whole.constants]
    return {
        "version": 1,
        "written_by": "bench/fit_throughput.py from cost/data/calibration_runs.csv",
        "num_rows": len(rows),
        "constants": {
            name: {
                "value": value,
                "prior": PRIORS[name].value,
                "prior_log_spread": PRIORS[name].spread,
                "prior_source": PRIORS[name].source,
            }
            for name, value in zip(NAMES, values, strict=True)
        },
        "frameworks": {
            name: {
                "speed": round(speed, DIGITS),
                "attention": round(whole.framework_attention[name], DIGITS),
                "num_rows": sum(row.framework == name for row in rows),
            }
            for name, speed in whole.framework_speed.items()
        },
        "accelerators": {name: round(speed, DIGITS) for name, speed in whole.accelerator_speed.items()},
        "pairs": sorted({(row.framework, row.accelerator) for row in rows}),
        "intervals": intervals(rows, whole),
    }


def nested_check(rows: Sequence[Row], whole: Fit) -> list[str]:
    """Random halves of the cells, and whole frameworks, predicted by fits that saw none of them."""
    cells = sorted({row.run.cell for row in rows})
    halves: list[dict[str, float | int]] = []
    for seed in range(NUM_HALVES):
        shuffled = random.Random(seed).sample(cells, len(cells))
        kept = set(shuffled[: len(cells) // 2])
        fitted = fit([row for row in rows if row.run.cell in kept])
        unseen = [row for row in rows if row.run.cell not in kept]
        halves.append(summary([fitted.log_tokens_per_second(row) - row.log_actual for row in unseen]))
    in_sample = summary([whole.log_tokens_per_second(row) - row.log_actual for row in rows])
    by_framework = summary(list(leave_out(rows, [], lambda row: row.framework, whole).values()))
    text = [f"{'check':<40} {'median':>7} {'p90':>7}"]
    text.append(f"{'in sample':<40} {in_sample['median']:>7.1%} {in_sample['p90']:>7.1%}")
    for name, pick in (("mean of", fmean), ("worst of", max)):
        median, p90 = (pick([half[key] for half in halves]) for key in ("median", "p90"))
        text.append(f"{f'half of the cells, {name} {NUM_HALVES} splits':<40} {median:>7.1%} {p90:>7.1%}")
    text.append(f"{'leave one framework out':<40} {by_framework['median']:>7.1%} {by_framework['p90']:>7.1%}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=CALIBRATION_RUNS, help="runs to fit")
    parser.add_argument("--add", type=Path, help="append this file's usable rows to the runs first")
    parser.add_argument("--out", type=Path, default=CALIBRATION, help="where the constants go")
    parser.add_argument("--check", action="store_true", help="also check against overfitting")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.add:
            print(f"added {add_rows(chosen.file, chosen.add)} rows to {chosen.file}")
        runs: list[Run] = read_runs(chosen.file)[0]
    except SlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = [Row.of(run) for run in runs]
    whole = fit(rows)
    chosen.out.write_text(json.dumps(document(rows, whole), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {chosen.out}: {len(rows)} rows")
    if chosen.check:
        print("\n".join(nested_check(rows, whole)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How far estimated tokens per second lie from published ones: `python bench/estimate_accuracy.py FILE.csv [--json]`.

Every row is predicted by a fit that has seen no row of its cell: its type of GPU (an A100 of 40 or of 80 GB is one
type) and its size (matrix weights without the head, to two digits). Three figures:

- overall, by_group, by_gpu: leave-one-(GPU, size)-cell-out over the file. The project's own calibration rows train
  too, unless the file has a row of the same id, and unless they are of the cell left out: that is what a user gets.
- file_only: the same where nothing but the file's rows trains. Equal for a file that holds all calibration rows.
- leave_one_gpu_out: all rows of a type of GPU are left out together, so it is predicted from its data sheet.
- as_shipped: cost/data/calibration.json as it is, on the rows whose cell it was not fitted to.
- memory: predicted peak per device against the rows that give it, and which rows that ran it calls impossible.

A framework or GPU without rows gets the pooled constants. Skipped: rows without throughput, GPU or shape, and three
named odd ones, each with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossvalidate import Errors, by, leave_out, summary
from runs_file import Run, Skipped, read_rows, read_runs
from throughput_fit import Row, fit

from cost.errors import SlmError, UserError
from cost.performance.memory import peak
from cost.performance.throughput import default_calibration, estimate

CALIBRATION_RUNS = Path(__file__).resolve().parent.parent / "cost" / "data" / "calibration_runs.csv"


def report(errors: Errors, rows: Sequence[Row]) -> dict[str, Any]:
    """Overall, per group and per GPU."""
    group = {row.run.id: row.run.group for row in rows}
    gpu = {row.run.id: row.accelerator for row in rows}
    return {"overall": summary(list(errors.values())), "by_group": by(errors, group), "by_gpu": by(errors, gpu)}


def shipped_error(run: Run) -> float:
    """Log of predicted over actual with the project's own constants."""
    calibration = default_calibration()
    predicted = estimate(
        run.workload,
        run.accelerator,
        run.layout,
        calibration,
        software=run.software,
        node_network_bytes_per_second=run.node_network_bytes_per_second,
    )
    return math.log(predicted.tokens_per_second / (run.tokens_per_second or math.nan))


def memory_report(runs: Sequence[Run]) -> dict[str, Any]:
    """Peak memory; only rows that tell their micro-batch can be called impossible."""
    peaks = {run.id: peak(run.workload, run.accelerator, run.layout, software=run.software) for run in runs}
    told = {run.id: run.peak_memory_gib for run in runs if run.peak_memory_gib}
    errors = {name: math.log(peaks[name].total_gib / gib) for name, gib in told.items()}
    return {
        "overall": summary(list(errors.values())) if errors else None,
        "impossible": [run.id for run in runs if run.knows_micro_batch and peaks[run.id].impossible],
        "rows": [{"id": name, "actual_gib": gib, "predicted_gib": peaks[name].total_gib} for name, gib in told.items()],
    }


def accuracy(
    runs: Sequence[Run], skipped: Sequence[Skipped], calibration: Sequence[Run], memory: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is printed."""
    rows = [Row.of(run) for run in runs]
    ids = {run.id for run in runs}
    others = [Row.of(run) for run in calibration if run.id not in ids]
    whole = fit([*rows, *others])
    by_cell = leave_out(rows, others, lambda row: row.run.cell, whole)
    by_type = leave_out(rows, others, lambda row: row.run.gpu_type, whole)
    alone = leave_out(rows, [], lambda row: row.run.cell, fit(rows)) if others else by_cell
    known_cells = {run.cell for run in calibration}
    shipped = [shipped_error(run) for run in runs if run.cell not in known_cells]
    return {
        **report(by_cell, rows),
        "skipped": [{"id": row.id, "reason": row.reason} for row in skipped],
        "leave_one_gpu_out": report(by_type, rows),
        "file_only": {"overall": summary(list(alone.values()))},
        "as_shipped": {"overall": summary(shipped) if shipped else None},
        "memory": memory,
        "rows": [
            {
                "id": row.run.id,
                "actual": row.run.tokens_per_second,
                "predicted": math.exp(row.log_actual + by_cell[row.run.id]),
                "error": math.expm1(by_cell[row.run.id]),
                "gpu_out_error": math.expm1(by_type[row.run.id]),
            }
            for row in rows
        ],
    }


def _line(name: str, figures: dict[str, Any] | None) -> str:
    if figures is None:
        return f"{name:<34} {'no such rows':>26}"
    return f"{name:<34} {figures['n']:>4} {figures['median']:>7.1%} {figures['mean']:>7.1%} {figures['p90']:>7.1%}"


def lines(result: dict[str, Any]) -> list[str]:
    """The same figures as text."""
    text = [f"{'|predicted / actual - 1|':<34} {'n':>4} {'median':>7} {'mean':>7} {'p90':>7}"]
    text.append(_line("leave one (GPU, size) cell out", result["overall"]))
    text.append(_line("leave one type of GPU out", result["leave_one_gpu_out"]["overall"]))
    text.append(_line("cell out, this file's rows alone", result["file_only"]["overall"]))
    text.append(_line("constants as shipped, new cells", result["as_shipped"]["overall"]))
    text.append(_line("peak memory", result["memory"]["overall"]))
    text.append(f"rows that ran but are called impossible: {', '.join(result['memory']['impossible']) or 'none'}")
    for title, key in (("group", "by_group"), ("GPU", "by_gpu")):
        text += ["", f"by {title}, cell out"]
        text += [_line(f"  {name}", figures) for name, figures in result[key].items()]
    if result["skipped"]:
        text += ["", f"skipped {len(result['skipped'])}"]
        text += [f"  {row['id']}: {row['reason']}" for row in result["skipped"]]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 where the file is not one of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="CSV with the columns of cost/data/calibration_runs.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON document, errors as fractions")
    chosen = parser.parse_args(arguments)
    try:
        runs, skipped = read_runs(chosen.file)
        if not runs:
            reasons = "; ".join(sorted({row.reason for row in skipped})) or "it has no rows"
            raise UserError(f"no row of {chosen.file} can be used ({reasons}); each needs tokens/s, a GPU and a shape.")
        calibration, _ = read_runs(CALIBRATION_RUNS)
        result = accuracy(runs, skipped, calibration, memory_report(read_rows(chosen.file)[0]))
    except SlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=2) if chosen.json else "\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

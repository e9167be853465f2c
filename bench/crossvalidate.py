"""Leaves groups of runs out of a fit and predicts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from throughput_fit import Fit, Row, fit

Errors = dict[str, float]
"""Log of predicted over actual tokens per second, by run."""


def leave_out(targets: Sequence[Row], others: Sequence[Row], key: Callable[[Row], object], whole: Fit) -> Errors:
    """Predict every target from all rows of other groups; `others` only ever train. `whole` is a warm start."""
    errors: Errors = {}
    for group in sorted({key(row) for row in targets}, key=str):
        training = [row for row in (*targets, *others) if key(row) != group]
        fitted = fit(training, start=whole)
        for row in targets:
            if key(row) == group:
                errors[row.run.id] = fitted.log_tokens_per_second(row) - row.log_actual
    return errors


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(errors: Sequence[float]) -> dict[str, float | int]:
    """Absolute percentage errors as fractions."""
    absolute = [abs(math.expm1(error)) for error in errors]
    return {
        "n": len(absolute),
        "median": quantile(absolute, 0.5),
        "mean": fmean(absolute),
        "p90": quantile(absolute, 0.9),
    }


def by(errors: Errors, label: Mapping[str, str]) -> dict[str, dict[str, float | int]]:
    """One summary per label."""
    names = sorted({label[run] for run in errors})
    return {name: summary([error for run, error in errors.items() if label[run] == name]) for name in names}

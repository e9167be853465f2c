"""Benchmark scores: a band from similar published runs and their number; "unknown" where none is similar.

HellaSwag is compared by compute (parameters times tokens), CORE by held-out bits per byte on the same corpus: the
quantity that its sources state. Invariant: no band without a published row, and none far from its rows.
Rows with sources: cost/data/scores.csv.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cost.outcome.scaling_law import Prediction
from cost.performance.workload import Workload
from cost.tables import table_rows

COMPUTE_RATIO = 4.0
"""A run counts as similar if its compute is at most this many times more or less."""
BITS_PER_BYTE_BEYOND = 0.01
"""How far outside its rows a line through them is still used."""
CORE_NOISE = 0.01
"""Half-width where rows agree better than that: repeated nanochat runs differ by about so much; assumed."""
Z_OF_95_PERCENT = 1.96


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One published row. Scores are shares of 1."""

    benchmark: str
    row_id: str
    corpus: str
    params: float | None
    num_tokens: float | None
    bits_per_byte: float | None
    score: float
    num_items: int | None
    source: str


@dataclass(frozen=True, slots=True)
class ScoreBand:
    """A range and the number of rows behind it; low and high are None where it is unknown, and `basis` says why."""

    benchmark: str
    low: float | None
    high: float | None
    num_rows: int
    basis: str

    @property
    def known(self) -> bool:
        """Whether there is a band at all."""
        return self.low is not None


@cache
def published_scores() -> tuple[PublishedScore, ...]:
    """All rows."""
    return tuple(
        PublishedScore(
            benchmark=row["benchmark"],
            row_id=row["id"],
            corpus=row["corpus"],
            params=_number(row["params"]),
            num_tokens=_number(row["num_tokens"]),
            bits_per_byte=_number(row["bits_per_byte"]),
            score=float(row["score"]),
            num_items=int(row["num_items"]) if row["num_items"] else None,
            source=row["source"],
        )
        for row in table_rows("scores.csv")
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


def score_bands(workload: Workload, predicted: Prediction, corpus: str | None) -> tuple[ScoreBand, ...]:
    """HellaSwag and CORE for a model trained on `corpus` (None: unknown)."""
    return (hellaswag_band(workload, corpus), core_band(predicted, corpus))


def hellaswag_band(workload: Workload, corpus: str | None) -> ScoreBand:
    """From runs of similar compute: those on the same corpus if there are at least two, else all of them."""
    compute = float(workload.active_params) * workload.num_tokens
    near = [
        row
        for row in published_scores()
        if row.benchmark == "HellaSwag"
        and row.params is not None
        and row.num_tokens is not None
        and abs(math.log(row.params * row.num_tokens / compute)) <= math.log(COMPUTE_RATIO)
    ]
    same = [row for row in near if row.corpus == corpus]
    chosen = same if len(same) > 1 else near
    if not chosen:
        return ScoreBand(
            "HellaSwag",
            None,
            None,
            0,
            f"no published run has between 1/{COMPUTE_RATIO:g} and {COMPUTE_RATIO:g} times its compute",
        )
    place = f"on {corpus}" if len(same) > 1 else "on any corpus"
    basis = f"runs {place} within {COMPUTE_RATIO:g}x of its compute: {_names(chosen)}"
    low, high = min(_edge(row, -1) for row in chosen), max(_edge(row, 1) for row in chosen)
    return ScoreBand("HellaSwag", low, high, len(chosen), basis)


def _edge(row: PublishedScore, sign: int) -> float:
    """The score and its sampling error: a 95 % binomial interval over the items."""
    assert row.num_items is not None, row.row_id
    return row.score + sign * Z_OF_95_PERCENT * math.sqrt(row.score * (1 - row.score) / row.num_items)


def core_band(predicted: Prediction, corpus: str | None) -> ScoreBand:
    """A line through the rows of the same corpus, at both ends of the predicted bits per byte."""
    rows = [row for row in published_scores() if row.benchmark == "CORE" and row.corpus == corpus]
    if not rows:
        return ScoreBand("CORE", None, None, 0, f"no published run on {corpus or 'an unknown corpus'}")
    if predicted.bits_per_byte is None:
        return ScoreBand("CORE", None, None, len(rows), "bits per byte are unknown for this tokenizer")
    measured = [(row.bits_per_byte, row.score) for row in rows if row.bits_per_byte is not None]
    best, worst = min(bits for bits, _ in measured), max(bits for bits, _ in measured)
    if not best - BITS_PER_BYTE_BEYOND <= predicted.bits_per_byte <= worst + BITS_PER_BYTE_BEYOND:
        basis = f"{predicted.bits_per_byte:.3f} bits per byte lie outside {best:.3f} to {worst:.3f} of {_names(rows)}"
        return ScoreBand("CORE", None, None, len(rows), basis)
    slope, intercept = _line(measured)
    miss = max(CORE_NOISE, *(abs(score - intercept - slope * bits) for bits, score in measured))
    assert predicted.low_bits_per_byte is not None
    assert predicted.high_bits_per_byte is not None
    return ScoreBand(
        "CORE",
        intercept + slope * min(predicted.high_bits_per_byte, worst) - miss,
        intercept + slope * max(predicted.low_bits_per_byte, best) + miss,
        len(rows),
        f"a line through {_names(rows)}, within the bits per byte that they span",
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def _names(rows: Sequence[PublishedScore]) -> str:
    return ", ".join(row.row_id for row in rows)

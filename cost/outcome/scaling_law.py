"""Scaling law: the loss that a model of N matrix parameters reaches after D tokens, with an interval.

The law is L = E + A/N^alpha + B/(k·D)^beta. Exponents are Besiroglu's refit of Chinchilla everywhere; what changes
with the corpus, the tokenizer and the way of training is fitted to published points (cost/data/loss_points.csv):
an offset of E, a scale of the whole reducible part, or a data efficiency k. N counts the weights of all matrix
products, the output head included. Invariant: every law carries the spread of what it was fitted to; a corpus without
measurements gets the spread between corpora.
Source: Besiroglu et al. 2024 (arXiv:2404.10102), refit of Hoffmann et al. 2022 (arXiv:2203.15556).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from cost.performance.workload import FLOPS_PER_MATRIX_WEIGHT, Workload
from cost.tables import table_rows

EPOCHS_HALF_LIFE = 15.39
"""R*: how many repetitions it takes until a repeated token is worth 1/e of a new one.

Source: Muennighoff et al. 2023 (arXiv:2305.16264), equation 5 and table of fitted constants.
"""
SPREAD_BETWEEN_CORPORA_NATS = 0.55
"""Half the distance between the known offsets of E: +0.28 (llm.c on FineWeb) and -0.81 (Cerebras on the Pile)."""
SPREAD_OF_A_FITTED_CORPUS_NATS = 0.06
"""Largest miss of the fitted laws on rows of the same corpus that they were not fitted to, rounded up."""
SPREAD_OF_ONE_POINT_NATS = 0.15
"""Assumed where a corpus has one point: between the two values above."""
Z_OF_80_PERCENT = 1.2816
"""Half-width of an 80 % interval in standard deviations of a normal distribution."""


@dataclass(frozen=True, slots=True)
class LossLaw:
    """Loss in nats per token. `sigma_nats` is the standard deviation of its prediction for this corpus."""

    name: str
    source: str
    irreducible: float
    params_scale: float
    data_scale: float
    params_exponent: float
    data_exponent: float
    sigma_nats: float
    data_efficiency: float = 1.0
    """k: tokens of the base law that one token of this preset is worth."""
    bytes_per_token: float | None = None
    flops_per_param_token: float = FLOPS_PER_MATRIX_WEIGHT
    """FLOPs per matrix weight and token that `optimum` spends: above 6 where attention is counted too."""

    def nats_per_token(self, matrix_params: float, num_tokens: float) -> float:
        """The law itself."""
        params_term = self.params_scale / matrix_params**self.params_exponent
        return float(self.irreducible + params_term + self._data_term(num_tokens))

    def _data_term(self, num_tokens: float) -> float:
        return float(self.data_scale / (self.data_efficiency * num_tokens) ** self.data_exponent)

    def bits_per_byte(self, nats: float) -> float | None:
        """Independent of the tokenizer; None where the bytes per token of this corpus are unknown."""
        return None if self.bytes_per_token is None else nats / (math.log(2) * self.bytes_per_token)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Matrix parameters and tokens with the lowest loss for a number of FLOPs.

        Source: Hoffmann et al. 2022 (arXiv:2203.15556), equation 4.
        """
        alpha, beta = self.params_exponent, self.data_exponent
        data_scale = self.data_scale / self.data_efficiency**beta
        balance = (alpha * self.params_scale / (beta * data_scale)) ** (1 / (alpha + beta))
        product = flops / self.flops_per_param_token
        num_params = balance * product ** (beta / (alpha + beta))
        return num_params, product / num_params

    def predict(self, matrix_params: float, num_tokens: float, unique_tokens: float | None = None) -> Prediction:
        """Loss with its 80 % interval; tokens beyond `unique_tokens` are repeats and count less."""
        useful = num_tokens if unique_tokens is None else effective_tokens(num_tokens, unique_tokens)
        nats = self.nats_per_token(matrix_params, useful)
        half = Z_OF_80_PERCENT * self.sigma_nats
        return Prediction(
            nats_per_token=nats,
            low_nats=nats - half,
            high_nats=nats + half,
            bits_per_byte=self.bits_per_byte(nats),
            low_bits_per_byte=self.bits_per_byte(nats - half),
            high_bits_per_byte=self.bits_per_byte(nats + half),
            effective_tokens=useful,
            law=self.name,
            source=self.source,
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted held-out loss with its 80 % interval. Bits per byte are None where the tokenizer is unknown."""

    nats_per_token: float
    low_nats: float
    high_nats: float
    bits_per_byte: float | None
    low_bits_per_byte: float | None
    high_bits_per_byte: float | None
    effective_tokens: float
    law: str
    source: str


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One published run: what it was trained on, for how long, and what it reached."""

    point_id: str
    corpus: str
    tokenizer: str
    preset: str
    matrix_params: float
    num_tokens: float
    nats_per_token: float
    bytes_per_token: float | None
    flops: float | None
    source: str


CHINCHILLA = LossLaw(
    name="chinchilla",
    source="Besiroglu et al. 2024 (arXiv:2404.10102); corpus unknown, so the interval spans known corpora",
    irreducible=1.8172,
    params_scale=482.01,
    data_scale=2085.43,
    params_exponent=0.3478,
    data_exponent=0.3658,
    sigma_nats=SPREAD_BETWEEN_CORPORA_NATS,
)


def effective_tokens(num_tokens: float, unique_tokens: float) -> float:
    """How many new tokens a run over repeated data is worth; equals `num_tokens` up to one epoch.

    Source: Muennighoff et al. 2023 (arXiv:2305.16264), equation 5.
    """
    if num_tokens <= unique_tokens:
        return num_tokens
    repetitions = num_tokens / unique_tokens - 1
    return unique_tokens * (1 + EPOCHS_HALF_LIFE * -math.expm1(-repetitions / EPOCHS_HALF_LIFE))


@cache
def loss_points() -> tuple[LossPoint, ...]:
    """The published points that the laws are fitted to."""
    return tuple(_point(row) for row in table_rows("loss_points.csv"))


def _point(row: dict[str, str]) -> LossPoint:
    bytes_per_token = float(row["bytes_per_token"]) if row["bytes_per_token"] else None
    if row["nats_per_token"]:
        nats = float(row["nats_per_token"])
    else:
        assert bytes_per_token is not None, f"{row['id']}: bits per byte need bytes per token"
        nats = float(row["bits_per_byte"]) * math.log(2) * bytes_per_token
    return LossPoint(
        point_id=row["id"],
        corpus=row["corpus"],
        tokenizer=row["tokenizer"],
        preset=row["preset"],
        matrix_params=float(row["matrix_params"]),
        num_tokens=float(row["num_tokens"]),
        nats_per_token=nats,
        bytes_per_token=bytes_per_token,
        flops=float(row["flops"]) if row["flops"] else None,
        source=row["source"],
    )


def fit_compute_optimal(points: Sequence[LossPoint], base: LossLaw = CHINCHILLA) -> LossLaw:
    """Fit E, A and B to the minima of at least two isoFLOP curves, keeping the exponents.

    At a minimum along constant FLOPs alpha·A/N^alpha = beta·B/D^beta, which gives A/B (its geometric mean over the
    points); E and B then follow from the losses by least squares.
    """
    alpha, beta = base.params_exponent, base.data_exponent
    logs = [math.log(beta / alpha) + alpha * math.log(p.matrix_params) - beta * math.log(p.num_tokens) for p in points]
    ratio = math.exp(sum(logs) / len(logs))
    terms = [ratio * p.matrix_params**-alpha + p.num_tokens**-beta for p in points]
    slope, intercept = _line(terms, [p.nats_per_token for p in points])
    per_weight = [p.flops / (p.matrix_params * p.num_tokens) for p in points if p.flops]
    first = points[0]
    return replace(
        base,
        name=f"{first.corpus}/{first.preset}",
        source=f"fitted to {', '.join(p.point_id for p in points)}; exponents: {CHINCHILLA.source.split(';')[0]}",
        irreducible=intercept,
        params_scale=slope * ratio,
        data_scale=slope,
        sigma_nats=SPREAD_OF_A_FITTED_CORPUS_NATS,
        bytes_per_token=first.bytes_per_token,
        flops_per_param_token=sum(per_weight) / len(per_weight) if per_weight else base.flops_per_param_token,
    )


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope /= sum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x


def fit_offset(points: Sequence[LossPoint], base: LossLaw = CHINCHILLA) -> LossLaw:
    """Fit E to points of one corpus, keeping everything else."""
    misses = [p.nats_per_token - base.nats_per_token(p.matrix_params, p.num_tokens) for p in points]
    offset = sum(misses) / len(misses)
    first = points[0]
    spread = max((abs(miss - offset) for miss in misses), default=0.0)
    return replace(
        base,
        name=f"{first.corpus}/{first.preset}",
        source=f"offset {offset:+.3f} nats fitted to {', '.join(p.point_id for p in points)}; {CHINCHILLA.source}",
        irreducible=base.irreducible + offset,
        sigma_nats=max(SPREAD_OF_ONE_POINT_NATS, spread),
        bytes_per_token=first.bytes_per_token,
    )


def fit_data_efficiency(point: LossPoint, base: LossLaw) -> LossLaw:
    """Fit k, so that another way of training the same corpus reaches the point's loss."""
    rest = point.nats_per_token - base.nats_per_token(point.matrix_params, math.inf)
    worth = (base.data_scale / rest) ** (1 / base.data_exponent)
    efficiency = worth / point.num_tokens
    return replace(
        base,
        name=f"{point.corpus}/{point.preset}",
        source=f"data efficiency {efficiency:.2f} fitted to {point.point_id} over {base.name}; {base.source}",
        data_efficiency=efficiency,
    )


@cache
def laws() -> dict[str, LossLaw]:
    """Every fitted law by 'corpus/preset', and 'chinchilla' for a corpus without points."""
    by_key: dict[str, list[LossPoint]] = {}
    for point in loss_points():
        by_key.setdefault(f"{point.corpus}/{point.preset}", []).append(point)
    fitted = {"chinchilla": CHINCHILLA, "fineweb-edu/nanochat": fit_compute_optimal(by_key["fineweb-edu/nanochat"])}
    for corpus in ("fineweb", "pile"):
        fitted[f"{corpus}/adamw"] = fit_offset(by_key[f"{corpus}/adamw"])
    for preset in ("muon", "speedrun"):
        fitted[f"fineweb/{preset}"] = fit_data_efficiency(by_key[f"fineweb/{preset}"][0], fitted["fineweb/adamw"])
    return fitted


def law_for(corpus: str | None, preset: str = "adamw") -> LossLaw:
    """The law fitted to this corpus and way of training.

    A preset that was not measured on the corpus keeps its data efficiency from FineWeb; a corpus without points
    gets the unshifted law and the spread between corpora.
    """
    known = laws()
    if corpus is not None and f"{corpus}/{preset}" in known:
        return known[f"{corpus}/{preset}"]
    efficiency = known[f"fineweb/{preset}"].data_efficiency if f"fineweb/{preset}" in known else 1.0
    base = known.get(f"{corpus}/adamw", CHINCHILLA)
    return replace(base, name=f"{base.name}+{preset}", data_efficiency=efficiency)


def predict(work: Workload, law: LossLaw, unique_tokens: float | None = None) -> Prediction:
    """The law at the effective size: for a mixture the geometric mean of its total and active matrix weights.

    That mean is a rule of thumb, not a measurement, so the interval of a mixture reaches from what a dense model of all
    its weights would get to what one of its active weights would.
    """
    total, active = float(work.matrix_params), float(work.active_matrix_params)
    middle = law.predict(math.sqrt(total * active), work.num_tokens, unique_tokens)
    if work.num_experts == 1:
        return middle
    low = law.predict(total, work.num_tokens, unique_tokens)
    high = law.predict(active, work.num_tokens, unique_tokens)
    return replace(
        middle,
        low_nats=low.low_nats,
        high_nats=high.high_nats,
        low_bits_per_byte=low.low_bits_per_byte,
        high_bits_per_byte=high.high_bits_per_byte,
        source=f"{middle.source}; a mixture counts as the geometric mean of total and active weights (assumed)",
    )

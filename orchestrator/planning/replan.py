"""The order of the offers that are left, corrected by the speed that the run itself measured.

An accelerator that trains slower than modelled costs more per token in every offer, so all of its offers move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from cost.ledger.accounts import LeaseAccount
from cost.ledger.recovery import Candidate
from orchestrator.planning.history import UNREADABLE, settled_speed, training_lease
from trainer.run_store.base import Store

LEAST_RATIO, MOST_RATIO = 0.1, 10.0
"""A speed further than this from the model's is more likely a broken clock than an accelerator."""


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """Measured speed of an accelerator in this run, as a share of the planned speed."""

    accelerator: str
    ratio: float


def measured_ratio(
    store: Store, accounts: Iterable[LeaseAccount], planned_per_device: Mapping[str, float]
) -> SpeedRatio | None:
    """From the newest settled progress, if any. `planned_per_device`: tokens per second by offer_id."""
    try:
        speed = settled_speed(store.read)
        if speed is None:
            return None
        offers = {account.lease.lease_id: account.lease.offer for account in accounts}
        offer = offers[training_lease(store.read, speed)]
        ratio = speed.per_device / planned_per_device[offer.offer_id]
    except UNREADABLE:
        return None
    is_credible = math.isfinite(ratio) and LEAST_RATIO <= ratio <= MOST_RATIO
    return SpeedRatio(offer.accelerator, ratio) if is_credible else None


def replanned(candidates: Sequence[Candidate], measured: Iterable[SpeedRatio]) -> list[Candidate]:
    """The same candidates with corrected costs, cheapest first within each number of nodes; unknown costs stay last."""
    ratios = {speed.accelerator: speed.ratio for speed in measured}
    if not ratios:
        return list(candidates)

    def corrected(candidate: Candidate) -> Candidate:
        ratio = ratios.get(candidate.offer.accelerator)
        if ratio is None or candidate.expected_usd is None:
            return candidate
        return replace(candidate, expected_usd=candidate.expected_usd / Decimal(ratio))

    found = [corrected(candidate) for candidate in candidates]
    counts = list(dict.fromkeys(candidate.num_nodes for candidate in candidates))

    def order(candidate: Candidate) -> tuple[int, bool, Decimal]:
        return counts.index(candidate.num_nodes), candidate.expected_usd is None, candidate.expected_usd or Decimal(0)

    return sorted(found, key=order)

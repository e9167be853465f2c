"""What a run's own speed says about the offers that are left: the plan's order, corrected by what was measured.

A GPU that trains slower than modelled costs more per token everywhere it is offered; so all offers of it move.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from cost.ledger.accounts import LeaseAccount
from cost.ledger.recovery import Candidate
from orchestrator.planning.measured import SETTLED_STEPS
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError, StoreKeyMissing

UNREADABLE = (StoreError, StoreKeyMissing, ValueError, KeyError, TypeError, AttributeError)
LEAST, MOST = 0.1, 10.0
"""A speed further than this from the model's is rather a broken clock than a GPU."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast an accelerator trains in this run, as a share of what the plan said."""

    accelerator: str
    ratio: float


def measured(
    store: Store, accounts: Iterable[LeaseAccount], planned_per_device: Mapping[str, float]
) -> Measured | None:
    """From the newest settled progress; `planned_per_device`: tokens per second by offer_id. None: nothing is known."""
    try:
        newest = json.loads(store.read(keys.PROGRESS))
        began = json.loads(store.read(keys.incarnation(newest["epoch"])))
        offers = {account.lease.lease_id: account.lease.offer for account in accounts}
        offer = offers[began["lease_id"]]
        speed = float(newest["tokens_per_second"]) / int(newest["world_size"])
        ratio = speed / planned_per_device[offer.offer_id]
    except (*UNREADABLE, ZeroDivisionError):
        return None
    settled = newest["step"] >= SETTLED_STEPS and math.isfinite(ratio) and LEAST <= ratio <= MOST
    return Measured(offer.accelerator, ratio) if settled else None


def replanned(candidates: Sequence[Candidate], seen: Iterable[Measured]) -> list[Candidate]:
    """The same candidates with corrected costs, cheapest first within each number of nodes; unknown costs stay last."""
    ratios = {entry.accelerator: entry.ratio for entry in seen}
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

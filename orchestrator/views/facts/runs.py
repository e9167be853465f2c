"""Facts of runs and of the ledger for `--json`. Amounts are dollars; times of the ledger are billed time."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cost.ledger.leases import usd

if TYPE_CHECKING:
    from orchestrator.runs.status import LedgerView, RunStatus, RunSummary

RUN_KEYS = {
    "tokens": "num_tokens",
    "held_usd": "reserved_usd",
    "preemptions": "num_preemptions",
    "failures": "num_failures",
    "offer": "offer_id",
}
"""Names of fields of `RunStatus` whose JSON key says more."""


def run_facts(run: RunStatus) -> dict[str, Any]:
    """The status of one run."""
    return {RUN_KEYS.get(field.name, field.name): getattr(run, field.name) for field in dataclasses.fields(run)}


def summary_facts(ended: RunSummary) -> dict[str, Any]:
    """How a run ended, with its events: what `slm launch --json` and `slm resume --json` print."""
    return {
        "run": run_facts(ended.status),
        "result": ended.result,
        "wall_seconds": ended.wall_seconds,
        "billed_node_seconds": ended.billed_seconds,
        "goodput": ended.goodput,
        "events": ended.events,
    }


def ledger_facts(view: LedgerView) -> dict[str, Any]:
    """The ledger of one run: what `slm ledger --json` prints."""
    balance = view.balance
    entries = [
        {
            "seq": entry.seq,
            "billed_at": billed_time(entry.at_ms),
            "stage": entry.stage,
            "lease_id": entry.lease_id,
            "kind": entry.kind,
            "spent_usd": usd(entry.spent_micro_usd),
            "reserved_usd": usd(entry.held_micro_usd),
            "note": entry.note,
        }
        for entry in view.entries
    ]
    leases = [
        {
            "lease_id": account.lease.lease_id,
            "stage": account.lease.stage,
            "state": account.state,
            "offer_id": account.lease.offer.offer_id,
            "num_nodes": account.lease.num_nodes,
            "outcome": account.outcome,
            "spent_usd": usd(account.spent_micro_usd),
            "reserved_usd": usd(account.held_micro_usd),
            "started_at": billed_time(account.started_ms),
            "ended_at": None if account.ended_ms is None else billed_time(account.ended_ms),
        }
        for account in view.leases
    ]
    return {
        "run_id": view.run_id,
        "cap_usd": balance.cap_usd,
        "spent_usd": balance.spent_usd,
        "reserved_usd": balance.held_usd,
        "free_usd": balance.free_usd,
        "leases": leases,
        "entries": entries,
    }


def billed_time(at_ms: int) -> datetime:
    """A time in the ledger; with the local backend's time scale, billed time runs faster than real time."""
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC)

"""A home in which a run on a cloud happened: a real ledger, written through the ledger, and a real run store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from cost.ledger.database import connect
from cost.ledger.ledger import Ledger
from cost.market.offers import Offer
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Run, Runs
from orchestrator.settings import Home
from tasks.recipe.load import load_recipe
from tasks.recipe.schema import Recipe
from tests.support.builders import make_lease
from trainer.run_store.base import DirectoryStore

HOUR_MS = 3_600_000
START_MS = 1_800_000_000_000
SPEED = 9_000.0


def ran_on(
    home: Home,
    offer: Offer,
    *,
    recipe: Recipe | None = None,
    backend: str = "sky",
    outcomes: Sequence[str] = ("preempted", "finished"),
    hours_each: int = 2,
    num_nodes: int = 1,
    **progress: Any,
) -> Run:
    """One lease for each outcome, the last of which trained what `progress` says."""
    trained = recipe or load_recipe("gpt2-124m", ["backend=sky"])
    db = connect(home.create().database)
    runs = Runs(db)
    created = runs.create(
        recipe_name=trained.name,
        recipe_digest=trained.digest(),
        recipe_json=trained.model_dump_json(),
        options=RunOptions(backend),
        cap_usd=Decimal(10_000),
    )
    run = runs.take_over(created.run_id)
    ledger = Ledger(db, run.run_id, fencing_token=run.fencing_token)
    now, lease_id = START_MS, ""
    for attempt, outcome in enumerate(outcomes, start=1):
        lease_id = f"slm-abc123-{run.run_id}-{attempt}"
        lease = make_lease(
            offer,
            lease_id=lease_id,
            run_id=run.run_id,
            attempt=attempt,
            num_nodes=num_nodes,
            worst_usd_per_hour=offer.usd_per_hour,
            fencing_token=run.fencing_token,
        )
        end = now + hours_each * HOUR_MS
        ledger.reserve(lease, expires_ms=end, latency_ms=0, at_ms=now)
        ledger.settle(lease_id, ended_ms=end, at_ms=end, outcome=outcome)
        now = end
    db.close()
    store = DirectoryStore(home.store_dir(run.run_id))
    world_size = num_nodes * offer.gpus_per_node
    newest = {
        "step": 100,
        "world_size": world_size,
        "incarnation": 1,
        "tokens_per_second": SPEED * world_size,
        **progress,
    }
    store.write("incarnations/1.json", json.dumps({"incarnation": 1, "lease_id": lease_id}).encode())
    store.write("progress/latest.json", json.dumps(newest).encode())
    return run

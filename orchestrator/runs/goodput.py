"""Which part of the time that was paid for is left in the weights.

Goodput is the seconds of all steps that were kept, over the seconds for which a cluster was billed. A step that was
done again after a loss counts once, with its newest time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cost.ledger.accounts import LeaseAccount
from tasks import run_store_keys as keys
from trainer.run_store.base import Store


def goodput(store: Store, accounts: Sequence[LeaseAccount], *, time_scale: float) -> float | None:
    """Between 0 and 1; None where nothing was billed. `time_scale` is billed seconds per real one."""
    billed = sum(account.accrued_until_ms - account.started_ms for account in accounts) / 1000
    return kept_seconds(store) * time_scale / billed if billed > 0 else None


def kept_seconds(store: Store) -> float:
    """Real seconds of the steps that the weights have seen, by the trainer's own clock."""
    newest: dict[int, tuple[int, float]] = {}
    for key in store.list(keys.METRICS):
        incarnation = keys.incarnation_of_metrics(key)
        if incarnation is None:
            continue
        for line in store.read(key).splitlines():
            record = json.loads(line)
            mine = (incarnation, float(record["seconds"]))
            newest[record["step"]] = max(newest.get(record["step"], mine), mine)
    return sum(seconds for _, seconds in newest.values())

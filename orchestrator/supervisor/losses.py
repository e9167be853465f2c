"""What the trainer is told of losses and restarts, so that it can choose when to save.

The plan's belief goes into the run's options; each new lease adds what this run has seen itself. Rates leave here in
real time, as the trainer's clock counts; the ledger counts billed time.
"""

from __future__ import annotations

from collections.abc import Iterable

from cost.ledger.accounts import LeaseAccount
from cost.market.preemption import SECONDS_PER_HOUR, Hazard
from cost.plan.plans import Estimate
from orchestrator.runs.options import LossBelief
from tasks.spec import Losses

MS_PER_HOUR = 1000 * SECONDS_PER_HOUR


def believed(best: Estimate, hazard: Hazard, *, time_scale: float) -> LossBelief:
    """What the plan believes of the offer that it chose."""
    return LossBelief(
        losses=hazard.losses,
        node_hours=hazard.node_hours,
        saved_at_notice=best.bill.pace.saved_at_notice,
        restart_seconds=best.bill.pace.recovery_seconds / time_scale,
        time_scale=time_scale,
    )


def learned(belief: LossBelief | None, accounts: Iterable[LeaseAccount], preemptions: int) -> Losses | None:
    """That belief after what this run has seen; None for a run that was launched without one."""
    if belief is None:
        return None
    node_ms = sum(account.num_nodes * max(0, account.accrued_until_ms - account.started_ms) for account in accounts)
    prior = Hazard(belief.losses, belief.node_hours, "the plan")
    return Losses(
        per_node_hour=prior.updated(preemptions, node_ms / MS_PER_HOUR).per_node_hour * belief.time_scale,
        saved_at_notice=belief.saved_at_notice,
        restart_seconds=belief.restart_seconds,
    )

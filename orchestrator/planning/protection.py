"""How the best offer's nodes would end without us: its terminators, and the time before they are armed."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from cost.market.preemption import SECONDS_PER_HOUR
from cost.market.providers import Armed, Provider, Terminator, TerminatorKind, balance_refusal, provider
from orchestrator.figures import dollars, duration
from orchestrator.planning.recipe_plan import guard_refusal

if TYPE_CHECKING:
    from cost.plan.plans import Estimate, Plan


def provider_profile(plan: Plan, estimate: Estimate) -> Provider:
    """The local cloud's for a simulated plan, else that of the offer's cloud."""
    return provider(estimate.offer.cloud if plan.emulation is None else "local")


def unguarded_usd(profile: Provider, estimate: Estimate) -> Decimal:
    """What the cluster costs at its highest price until the provider's own limit is armed."""
    return estimate.bill.worst_usd_per_hour * Decimal(profile.arm_seconds) / Decimal(SECONDS_PER_HOUR)


def guard_lines(plan: Plan, estimate: Estimate) -> list[str]:
    """Sentences for a person."""
    profile = provider_profile(plan, estimate)
    counted = [terminator for terminator in profile.terminators if terminator.kind is not TerminatorKind.SKY]
    lines = [f"ends a node without us at {profile.name}: {', '.join(terminator.name for terminator in counted)}"]
    late = [
        terminator.name
        for terminator in counted
        if terminator.kind is TerminatorKind.PROVIDER and armed_later(terminator)
    ]
    if late:
        lines.append(
            f"{', '.join(late)} is armed up to {duration(profile.arm_seconds)} after a node's start: a node that "
            f"hangs before then can exceed the cap; {duration(profile.arm_seconds)} cost at most "
            f"{dollars(unguarded_usd(profile, estimate))}"
        )
    reason = None if plan.emulation is not None else guard_refusal(estimate.offer)
    balance = balance_refusal(profile, balance_usd=None, free_usd=plan.budget_usd)
    return [*lines, *(text for text in (reason, balance) if text is not None)]


def cheaper_unguarded(plan: Plan, best: Estimate) -> Estimate | None:
    """The best offer that was refused because no terminator ends a hung node there, if it costs less."""
    first = next(iter(plan.unguarded), None)
    return first if first is not None and first.total_usd < best.total_usd else None


def armed_later(terminator: Terminator) -> bool:
    """Whether a node runs without it for a while after its start."""
    return terminator.armed is Armed.AFTER_CREATE

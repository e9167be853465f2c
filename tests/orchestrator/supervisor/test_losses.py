"""What a run has seen of losses, joined with what the plan believed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.runs.options import LossBelief
from orchestrator.supervisor.losses import learned

BELIEF = LossBelief(losses=2.0, node_hours=10.0, saved_at_notice=0.9, restart_seconds=30.0, time_scale=1.0)


def account(*, num_nodes: int, hours: float) -> Any:
    return SimpleNamespace(num_nodes=num_nodes, started_ms=0, accrued_until_ms=int(hours * 3_600_000))


def test_before_anything_was_seen_the_plan_is_believed() -> None:
    losses = learned(BELIEF, [], 0)
    assert losses is not None
    assert (losses.per_node_hour, losses.saved_at_notice, losses.restart_seconds) == (0.2, 0.9, 30.0)


def test_what_was_seen_counts_by_its_node_hours() -> None:
    losses = learned(BELIEF, [account(num_nodes=2, hours=4), account(num_nodes=1, hours=2)], 4)
    assert losses is not None
    assert losses.per_node_hour == pytest.approx((2 + 4) / (10 + 10))


def test_the_trainer_counts_real_hours() -> None:
    losses = learned(replace(BELIEF, time_scale=60.0), [], 0)
    assert losses is not None
    assert losses.per_node_hour == pytest.approx(12.0)


def test_a_run_that_was_launched_without_a_belief_has_none() -> None:
    assert learned(None, [], 3) is None

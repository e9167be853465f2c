"""Hazards, the checkpoint interval and the waste, with numbers to check by hand."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from cost.market.offers import Offer
from cost.market.preemption import (
    Hazard,
    Hazards,
    Sighting,
    checkpoint_interval_seconds,
    expected_waste,
    prior,
    save_at_notice,
)
from tests.support.builders import make_offer


def offer(*, cloud: str = "aws", accelerator: str = "V100", gpus: int = 1, spot: bool = True) -> Offer:
    price = Decimal(1)
    return make_offer(
        cloud=cloud,
        instance_type=None,
        accelerator=accelerator,
        gpus_per_node=gpus,
        gpu_memory_gib=16.0,
        spot=spot,
        usd_per_hour=price,
    )


def test_young_and_daly_by_hand() -> None:
    # C = 2 s, one loss per hour, nothing saved at notice: sqrt(2 * 2 * 3600) = 120 s.
    assert checkpoint_interval_seconds(2.0, 1.0, 0.0, 1.0) == pytest.approx(120.0)
    # A notice that saves three of four times doubles it.
    assert checkpoint_interval_seconds(2.0, 1.0, 0.75, 1.0) == pytest.approx(240.0)
    assert checkpoint_interval_seconds(2.0, 1.0, 0.0, 300.0) == 300.0
    assert checkpoint_interval_seconds(2.0, 0.0, 0.0, 1.0) == math.inf
    # Daly's R: with M = 3600 s and R = 900 s it is sqrt(2 x 2 x 4500).
    assert checkpoint_interval_seconds(2.0, 1.0, 0.0, 1.0, restart_seconds=900.0) == pytest.approx(math.sqrt(18_000))


def test_waste_by_hand() -> None:
    # Per useful hour: 2/120 h saving; 1 loss/h x 60 s x (1 + 1/60) redone; 360 s for each loss while up.
    waste = expected_waste(
        interval_seconds=120.0, stall_seconds=2.0, losses_per_hour=1.0, saved_at_notice=0.0, recovery_seconds=360.0
    )
    assert waste.checkpoints == pytest.approx(1 / 60)
    assert waste.lost_work == pytest.approx(61 / 3600)
    up = 1 + 1 / 60 + 61 / 3600
    assert waste.recoveries == pytest.approx(0.1 * up)
    assert waste.losses == pytest.approx(up)
    assert waste.share == pytest.approx(waste.total / (1 + waste.total))


def test_the_chosen_interval_wastes_least() -> None:
    def total(interval: float) -> float:
        return expected_waste(
            interval_seconds=interval,
            stall_seconds=2.0,
            losses_per_hour=1.0,
            saved_at_notice=0.0,
            recovery_seconds=0.0,
        ).total

    assert total(120.0) < min(total(60.0), total(240.0))


def test_a_save_that_does_not_fit_into_the_notice_saves_nothing() -> None:
    assert save_at_notice(120.0, 60.0) > 0.5
    assert save_at_notice(30.0, 26.0) == 0.0
    assert save_at_notice(0.0, 0.0) == 0.0


def test_priors_come_from_the_traces() -> None:
    # Pooled mean up-time of the nine zones: 3.35 h.
    assert 1 / prior("aws", "V100", 1).per_node_hour == pytest.approx(3.35)
    assert prior("gcp", "A100-40GB", 1).per_node_hour == pytest.approx(0.099, rel=0.01)
    # The same card in another node size, then anything at all.
    assert prior("gcp", "A100-40GB", 8) == prior("gcp", "A100-40GB", 1)
    assert prior("vast", "RTX4090", 2).per_node_hour == pytest.approx((0.299 * 0.099 * 0.314) ** (1 / 3), rel=0.02)


def test_own_runs_move_the_rate_and_make_it_surer() -> None:
    before = Hazard(2, 10.0, "prior")
    after = before.updated(0, 10.0)
    assert (after.per_node_hour, before.per_node_hour) == (0.1, 0.2)
    assert after.standard_deviation < before.standard_deviation
    assert "0 in 10.0 node-hours" in after.source
    seen = Hazards((Sighting("aws", "V100", 1, 3, 1.0), Sighting("aws", "V100", 1, 1, 2.3)))
    assert seen.for_offer(offer()).per_node_hour == pytest.approx(6 / 10)
    assert seen.for_offer(offer(accelerator="T4")) == prior("aws", "T4", 1)


def test_on_demand_nodes_only_fail() -> None:
    # 419 failures in 54 days of 16,384 GPUs: one per 50,600 GPU-hours.
    rate = Hazards().for_offer(offer(spot=False, gpus=8)).per_node_hour
    assert 8 / rate == pytest.approx(50_680, rel=0.01)
    assert Hazards(fixed_per_node_hour=0.5).for_offer(offer(spot=False, gpus=8)).per_node_hour == rate
    assert Hazards(fixed_per_node_hour=0.5).for_offer(offer()).per_node_hour == 0.5
    assert Hazards(fixed_per_node_hour=0.0).for_offer(offer()).per_node_hour == 0.0

"""When the next save is due, by numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from tests.support.configs import changed
from trainer.checkpoints.interval import Pace
from trainer.config import TrainConfig

TOLD = changed(TrainConfig(), checkpoint_interval_seconds=15.0, losses_per_worker_hour=0.5)


def paced(config: TrainConfig, world_size: int, saves: list[tuple[float, float]]) -> float:
    pace = Pace(config, world_size)
    for stall, seconds in saves:
        pace.saved(stall_seconds=stall, save_seconds=seconds)
    return pace.interval_seconds


def test_the_planned_interval_holds_until_a_save_was_measured() -> None:
    assert paced(TOLD, 2, []) == 15.0


def test_an_interval_that_was_fixed_stays() -> None:
    assert paced(changed(TOLD, losses_per_worker_hour=None), 2, [(2.0, 3.0)]) == 15.0


def test_the_interval_is_that_of_young_and_daly_for_the_whole_group() -> None:
    # Two workers lose one node per hour together: sqrt(2 x 2 s x 3600 s) = 120 s.
    assert paced(TOLD, 2, [(2.0, 3.0)]) == pytest.approx(120.0)
    assert paced(TOLD, 8, [(2.0, 3.0)]) == pytest.approx(60.0)
    assert paced(changed(TOLD, saved_at_notice=0.75), 2, [(2.0, 3.0)]) == pytest.approx(240.0)


def test_a_restart_that_takes_long_makes_it_longer() -> None:
    assert paced(changed(TOLD, restart_seconds=900.0), 2, [(2.0, 3.0)]) == pytest.approx((4 * 4500) ** 0.5)
    pace = Pace(changed(TOLD, restart_seconds=900.0), 2)
    pace.saved(stall_seconds=2.0, save_seconds=3.0)
    pace.started(1200.0)  # longer than was known
    assert pace.interval_seconds == pytest.approx((4 * 4800) ** 0.5)


def test_the_first_save_and_one_slow_one_do_not_count() -> None:
    assert paced(TOLD, 2, [(50.0, 60.0), (2.0, 3.0), (2.0, 3.0), (9.0, 3.0), (2.0, 3.0)]) == pytest.approx(120.0)


def test_it_is_never_shorter_than_two_saves_and_never_longer_than_a_quarter_of_an_hour() -> None:
    assert paced(TOLD, 2, [(2.0, 300.0)]) == 600.0
    assert paced(changed(TOLD, losses_per_worker_hour=0.0), 2, [(2.0, 3.0)]) == 900.0

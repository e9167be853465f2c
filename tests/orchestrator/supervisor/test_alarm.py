"""How much of the cap is spent is reported once for each threshold."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from tests.support.supervised_run import World


def test_half_of_the_cap_is_reported_once_even_when_it_passes_between_steps(tmp_path: Path) -> None:
    world = World(tmp_path, cap=Decimal("2.30"), num_steps=100)
    world.clock.after(20.0, lambda: world.backend.take(world.backend.starts[-1].lease_id))
    world.supervisor().run()
    told = [event.data["percent"] for event in world.events if event.kind == "warning" and "percent" in event.data]
    assert told == sorted(set(told)) and told[0] == 50 and told[-1] >= 80

"""When a process counts as hung."""

from __future__ import annotations

from pathlib import Path

from tasks.guard.files import HUNG_TICKS, Pulse, beat


def test_a_process_hangs_if_it_did_not_move_for_so_many_looks(tmp_path: Path) -> None:
    pulse = Pulse(str(tmp_path / "beat"))
    assert all(pulse.beats() for _ in range(2 * HUNG_TICKS))  # nothing there: nothing to judge by
    beat(pulse.path)
    looks = [pulse.beats() for _ in range(HUNG_TICKS + 1)]
    assert looks == [True] * HUNG_TICKS + [False]
    beat(pulse.path)
    assert pulse.beats()
    pulse.forget()
    assert not Path(pulse.path).exists()

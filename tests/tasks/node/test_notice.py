"""A checkpoint is begun at a notice only where it is expected to end in time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.node.notice import LEAVE_SECONDS, MARGIN_SECONDS, SAVE_SAFETY, Plan, plan


@pytest.mark.parametrize(
    ("left", "save", "step", "expected"),
    [
        # AWS's two minutes, a save of 10 s, steps of 1 s: at once, and again 1.5 x 10 + 1 + 2 s before the end.
        (120.0, 10.0, 1.0, Plan(save_now=True, leave_in_seconds=102.0)),
        # 30 s: the last save needs 18 of them, and the one before it would not be done in the 12 s before.
        (30.0, 10.0, 1.0, Plan(save_now=False, leave_in_seconds=12.0)),
        (18.0, 10.0, 1.0, Plan(save_now=False, leave_in_seconds=0.0)),
        (17.9, 10.0, 1.0, Plan(save_now=False, leave_in_seconds=None)),
        # A quick save still leaves the node some seconds before its end, where there are any.
        (30.0, 0.1, 0.1, Plan(save_now=True, leave_in_seconds=25.0)),
        (4.0, 0.1, 0.1, Plan(save_now=False, leave_in_seconds=0.0)),
        # Nothing measured yet.
        (30.0, 0.0, 0.0, Plan(save_now=True, leave_in_seconds=25.0)),
        (-3.0, 0.0, 0.0, Plan(save_now=False, leave_in_seconds=None)),
    ],
)
def test_what_a_notice_leaves_time_for(left: float, save: float, step: float, expected: Plan) -> None:
    assert plan(left, save, step) == expected


@given(left=st.floats(-10, 1000), save=st.floats(0, 500), step=st.floats(0, 60))
def test_no_save_is_begun_that_is_not_expected_to_end_in_time(left: float, save: float, step: float) -> None:
    decided = plan(left, save, step)
    item = SAVE_SAFETY * save + step
    if decided.leave_in_seconds is None:
        assert left < item + MARGIN_SECONDS
        assert not decided.save_now
    else:
        assert decided.leave_in_seconds + item + MARGIN_SECONDS <= left + 1e-9
        assert not decided.save_now or item <= decided.leave_in_seconds
        assert left - decided.leave_in_seconds <= max(LEAVE_SECONDS, item + MARGIN_SECONDS) + 1e-9

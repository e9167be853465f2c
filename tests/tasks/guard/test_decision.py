"""When a node ends: the pure decisions of guard and watchdog."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.guard.decision import (
    END_NODE,
    RESTART,
    STOP_COMMAND,
    WAIT,
    Answer,
    State,
    decide,
    decide_watchdog,
    issue,
    parse_answer,
    why_ignored,
)


def asked(*moments: float, deadline: float) -> State:
    """A guard that sent request 1 at the first moment, 2 at the second, and so on."""
    state = State(deadline=deadline)
    for moment in moments:
        state, _ = issue(state, moment, 1)
    return state


def test_a_grant_counts_from_the_moment_of_its_request() -> None:
    state, action = decide(asked(100.0, 102.0, deadline=110.0), 109.0, Answer(1, 1, 30.0), term_seconds=1.0)
    assert (state.deadline, action) == (130.0, WAIT)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(2, 3, 60.0),  # a request that was never sent
        Answer(2, 1, 60.0),  # older than what was accepted
        Answer(1, 2, 60.0),  # from a supervisor that was replaced
    ],
)
def test_stale_answers_are_ignored(answer: Answer) -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(2, 2, 20.0))
    state, _ = decide(accepted, 104.0, answer)
    assert state.deadline == 122.0


def test_a_new_supervisor_may_answer_an_older_request() -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(1, 2, 20.0))
    state, _ = decide(accepted, 104.0, Answer(2, 1, 15.0))
    assert (state.deadline, state.fencing_token) == (115.0, 2)


def test_a_newer_grant_may_shorten() -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(1, 1, 60.0))
    state, action = decide(accepted, 104.0, Answer(1, 2, 1.0))
    assert (state.deadline, action) == (103.0, END_NODE)


def test_the_command_is_asked_to_end_before_it_is_killed_and_then_no_answer_helps() -> None:
    state = asked(100.0, deadline=110.0)
    assert decide(state, 108.9, None, term_seconds=1.0)[1] == WAIT
    ending, action = decide(state, 109.0, None, term_seconds=1.0)
    assert action == STOP_COMMAND
    still, action = decide(ending, 109.5, Answer(1, 1, 600.0), term_seconds=1.0)
    assert (still.deadline, action) == (110.0, STOP_COMMAND)
    assert decide(ending, 110.0, Answer(1, 1, 600.0))[1] == END_NODE


def test_an_answer_that_is_read_after_the_deadline_comes_too_late() -> None:
    assert decide(asked(100.0, deadline=110.0), 110.0, Answer(1, 1, 600.0))[1] == END_NODE


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.builds(Answer, st.integers(0, 3), st.integers(0, 12), st.floats(0, 50)),
        ),
        max_size=12,
    )
)
def test_a_node_never_lives_longer_than_the_longest_valid_grant(answers: list[Answer | None]) -> None:
    state, paid = State(deadline=10.0), 10.0
    for moment, answer in enumerate(answers):
        state, number = issue(state, float(moment), 1)
        assert number == moment + 1
        if answer is not None and 1 <= answer.number <= number:
            paid = max(paid, answer.number - 1 + answer.duration_seconds)
        state, action = decide(state, moment + 0.5, answer)
        assert state.deadline <= paid
        assert (action == END_NODE) == (moment + 0.5 >= state.deadline)
        if action == END_NODE:
            return


def test_request_numbers_only_rise() -> None:
    state, first = issue(State(deadline=1.0), 0.0, 1000)
    state, second = issue(state, 1.0, 5)
    assert (first, second) == (1000, 1001)
    assert issue(State(deadline=1.0, accepted=2000), 0.0, 1)[1] == 2001


@pytest.mark.parametrize(
    ("now", "guard_alive", "action"),
    [(9.0, True, WAIT), (9.0, False, RESTART), (11.9, True, WAIT), (12.0, True, END_NODE), (12.0, False, END_NODE)],
)
def test_the_watchdog_restarts_a_dead_guard_and_ends_the_node_of_a_hung_one(
    now: float, guard_alive: bool, action: str
) -> None:
    assert decide_watchdog(10.0, now, guard_alive, margin_seconds=2.0) == action


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1]",
        b"null",
        b'{"fencing_token": 1, "number": 1}',
        b'{"fencing_token": 1, "number": 1, "duration_seconds": NaN}',
        b'{"fencing_token": 1, "number": 1, "duration_seconds": Infinity}',
        b'{"fencing_token": 1, "number": 1, "duration_seconds": -1}',
        b'{"fencing_token": 1, "number": 1, "duration_seconds": "9"}',
        b'{"fencing_token": 1, "number": true, "duration_seconds": 9}',
    ],
)
def test_invalid_bytes_grant_nothing(data: bytes) -> None:
    assert parse_answer(data) is None


def test_a_grant_is_read() -> None:
    assert parse_answer(b'{"fencing_token": 2, "number": 7, "duration_seconds": 9}') == Answer(2, 7, 9.0)


def test_why_an_answer_was_ignored_is_told_in_words() -> None:
    state = {"fencing_token": 2, "accepted": 7, "ending": False}
    asked = {"number": 9}
    assert (
        why_ignored(Answer(1, 8, 1.0), state, asked)
        == "a newer supervisor, with fencing token 2, has answered this node"
    )
    assert why_ignored(Answer(2, 6, 1.0), state, asked) == "request 7 was answered already"
    assert why_ignored(Answer(2, 8, 1.0), {**state, "ending": True}, asked) == "the node is ending"
    assert why_ignored(Answer(2, 12, 1.0), state, asked).endswith("the newest is 9")

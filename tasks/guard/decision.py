"""When the node ends: pure functions over numbers, which the guard, the watchdog and the simulation share.

Invariant: the node is alive only until `State.deadline`. That is the guard's start + the first grant, and later the
moment of one of our requests + the duration that the newest answer granted. No contact means no renewal, and no renewal
means the end.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Tuple

MAX_ISSUED = 256
"""How many of our latest requests can still be answered."""
TERM_SECONDS = 1.0
"""How long before the deadline the node's command is asked to stop by itself."""
WATCHDOG_MARGIN_SECONDS = 1.5
"""How long after the deadline the watchdog leaves the end of the node to the guard."""
WAIT, STOP_COMMAND, END_NODE, RESTART = "wait", "stop command", "end node", "restart"


@dataclass(frozen=True)
class Answer:
    """What the supervisor granted: `duration_seconds` from the moment of request `number`.

    `fencing_token` is the supervisor's: a supervisor that takes the run over has a higher one.
    """

    fencing_token: int
    number: int
    duration_seconds: float


@dataclass(frozen=True)
class State:
    """All that decides when the node ends. `issued` holds (number, boottime) of our latest requests."""

    deadline: float
    issued: Tuple[Tuple[int, float], ...] = ()
    fencing_token: int = 0
    accepted: int = 0
    ending: bool = False


def issue(state: State, now: float, at_least: int) -> Tuple[State, int]:
    """A new request at `now`; its number is above all before it and not below `at_least`."""
    newest = state.issued[-1][0] if state.issued else 0
    number = max(at_least, state.accepted + 1, newest + 1)
    return replace(state, issued=(*state.issued, (number, now))[-MAX_ISSUED:]), number


def decide(state: State, now: float, answer: Optional[Answer], term_seconds: float = TERM_SECONDS) -> Tuple[State, str]:
    """Take a valid answer into account, then say WAIT, STOP_COMMAND (ask it to stop by itself) or END_NODE.

    An answer is valid if it names a request that we sent, comes from no older supervisor than the newest that answered,
    and names no older request than the newest accepted. It may also shorten: the supervisor has paid for the longest
    grant that it ever gave. After STOP_COMMAND, or past the deadline, every answer is ignored.
    """
    if now >= state.deadline:
        return replace(state, ending=True), END_NODE
    if answer is not None and not state.ending:
        asked = next((moment for number, moment in reversed(state.issued) if number == answer.number), None)
        newer = (answer.fencing_token, answer.number) >= (state.fencing_token, state.accepted)
        if newer and asked is not None:
            deadline = asked + answer.duration_seconds
            state = replace(state, deadline=deadline, fencing_token=answer.fencing_token, accepted=answer.number)
    if now >= state.deadline:
        return replace(state, ending=True), END_NODE
    if now >= state.deadline - term_seconds:
        return replace(state, ending=True), STOP_COMMAND
    return state, WAIT


def decide_watchdog(
    deadline: float, now: float, guard_alive: bool, margin_seconds: float = WATCHDOG_MARGIN_SECONDS
) -> str:
    """What the watchdog does: END_NODE where the guard should have, RESTART a dead guard, or WAIT."""
    if now >= deadline + margin_seconds:
        return END_NODE
    return WAIT if guard_alive else RESTART


def parse_answer(data: bytes) -> Optional[Answer]:
    """The grant in a file of the store; None for anything that is not exactly one."""
    try:
        fields = json.loads(data)
        fencing_token, number, duration = fields["fencing_token"], fields["number"], fields["duration_seconds"]
    except (ValueError, KeyError, TypeError):
        return None
    if type(fencing_token) is not int or type(number) is not int or type(duration) not in (int, float):
        return None
    return Answer(fencing_token, number, float(duration)) if math.isfinite(duration) and duration >= 0 else None


def why_ignored(answer: Answer, state: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """The reason in words why `decide` ignored an answer."""
    if state.get("ending"):
        return "the node is ending"
    if answer.fencing_token < state.get("fencing_token", 0):
        return f"a newer supervisor, with fencing token {state['fencing_token']}, has answered this node"
    if answer.fencing_token == state.get("fencing_token") and answer.number < state.get("accepted", 0):
        return f"request {state['accepted']} was answered already"
    return f"request {answer.number} was never sent, or too long ago; the newest is {request.get('number')}"

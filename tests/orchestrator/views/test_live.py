"""A run as it happens, on a screen and in lines."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from rich.console import Console

from orchestrator.events import Event
from orchestrator.supervisor.lease.stopping import StopSwitch
from orchestrator.views import live
from orchestrator.views.live import LiveScreen, PlainLines, RunView

START = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def event(kind: str, message: str = "", *, after_seconds: float = 0, **data: Any) -> Event:
    return Event(kind, message, START + timedelta(seconds=after_seconds), data)


def progress(step: int, *, after_seconds: float = 0, spent: str = "12.30") -> Event:
    figures: dict[str, Any] = {"step": step, "num_steps": 400, "tokens": step * 4096, "loss": 4.2, "heldout_loss": None}
    figures["tokens_per_second"] = 20480.0
    money: dict[str, Any] = {"spent_usd": Decimal(spent), "held_usd": Decimal(3), "cap_usd": Decimal(100)}
    return event("progress", after_seconds=after_seconds, progress=figures, num_nodes=2, **money)


def lines_of(*events: Event) -> list[str]:
    """What a pipe gets, without the time of day."""
    stream = io.StringIO()
    with PlainLines(Console(file=stream, width=100), "demo-1") as lines:
        for event in events:
            lines(event)
    return [line.partition("  ")[2] for line in stream.getvalue().splitlines()]


def test_events_become_figures() -> None:
    view = RunView("demo-1")
    for item in (event("state", "running", state="RUNNING"), progress(100), event("grown", num_nodes=3)):
        view.take(item)
    assert (view.state, view.step, view.tokens, view.num_nodes) == ("running", 100, 409_600, 3)
    assert view.share_done == 0.25
    assert view.eta_seconds == pytest.approx(300 * 4096 / 20480)


def test_a_figure_that_an_event_does_not_know_stays_what_it_was() -> None:
    view = RunView("demo-1", heldout_loss=5.0)
    view.take(progress(1))
    assert view.heldout_loss == 5.0


def test_without_progress_there_is_no_guess() -> None:
    view = RunView("demo-1")
    assert view.share_done == 0
    assert view.eta_seconds is None


def test_lost_nodes_and_lost_leases_are_preemptions() -> None:
    view = RunView("demo-1")
    view.take(event("lost", ranks=[1, 2]))
    view.take(event("settled", cause="preempted"))
    view.take(event("settled", cause="asked"))
    assert view.preemptions == 3
    view.take(event("progress", preemptions=5))
    assert view.preemptions == 5


def test_the_run_is_named_once_it_is_known() -> None:
    view = RunView("demo")
    view.take(event("state", "launching", run_id="demo-1"))
    assert view.run_id == "demo-1"


def test_a_pipe_gets_one_line_per_event() -> None:
    shown = lines_of(event("start", "renting 2 x [a]"), event("lost", "node 1 is gone", ranks=[1]))
    assert shown == ["start      renting 2 x [a]", "lost       node 1 is gone"]


def test_a_pipe_gets_progress_now_and_then_and_the_last() -> None:
    shown = lines_of(*[progress(step, after_seconds=step) for step in range(1, 25)])
    assert [line.split()[2] for line in shown] == ["1/400", "11/400", "21/400", "24/400"]
    assert shown[0] == (
        "progress   step 1/400  loss 4.200  held-out -  20.5K tokens/s  $12.30 of $100.00  2 nodes  0 preemptions  "
        "ETA 1 min 20 s"
    )


def test_held_back_progress_comes_before_the_next_event() -> None:
    shown = lines_of(progress(1), progress(2, after_seconds=1), event("lost", "gone", after_seconds=2, ranks=[1]))
    assert [line.split()[0] for line in shown] == ["progress", "progress", "lost"]
    assert "0 preemptions" in shown[1]


def test_a_screen_shows_figures_below_the_events() -> None:
    stream = io.StringIO()
    switch = StopSwitch()
    console = Console(file=stream, width=110, force_terminal=True, color_system=None, legacy_windows=False)
    with LiveScreen(console, "demo-1", switch) as screen:
        screen(event("state", "running", state="RUNNING"))
        screen(event("lost", "node 1 is gone", ranks=[1]))
        screen(progress(100, spent="80.00"))
    text = stream.getvalue()
    assert "lost       node 1 is gone" in text
    last = text[text.rindex("demo-1") :]
    assert "step 100/400, 410K tokens, 1 min 00 s left" in last
    assert "$80.00 of $100.00, $3.00 reserved" in last
    assert "loss 4.200, held-out -" in last
    assert "20.5K tokens/s, 1 preemption" in last
    assert "Ctrl-C: save a checkpoint and stop" in last


def test_a_screen_says_what_ctrl_c_has_done() -> None:
    shown = []
    for level in range(4):
        stream = io.StringIO()
        console = Console(file=stream, width=110, force_terminal=True, color_system=None)
        with LiveScreen(console, "demo-1", StopSwitch(level)):
            pass
        shown.append(stream.getvalue())
    assert "saving a checkpoint; press Ctrl-C again to terminate the nodes at once" in shown[1]
    assert "terminating the nodes at once" in shown[2]
    assert "terminating the nodes at once" in shown[3]


def test_the_watcher_suits_the_console() -> None:
    pipe, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(live.watcher(pipe, "demo", StopSwitch()), PlainLines)
    assert isinstance(live.watcher(terminal, "demo", StopSwitch()), LiveScreen)

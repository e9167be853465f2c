"""A run as it happens: events in, one screen or one line each out.

`RunView` folds events into figures and draws nothing; `LiveScreen` and `PlainLines` draw them. Both are callables that
take an event, so a run does not know who watches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orchestrator.figures import bar, count, dollars, duration, nats, plural

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from orchestrator.events import Event
    from orchestrator.supervisor.lease.stopping import StopSwitch

PLAIN_PROGRESS_SECONDS = 10.0
"""Least time between two progress lines where no screen can be redrawn."""
BAR_WIDTH = 30
REFRESH_PER_SECOND = 4
WARN_SHARE = 0.8
"""Share of the cap from which the spending bar is red."""
STOPPING = (
    "Ctrl-C: save a checkpoint and stop",
    "stopping: saving a checkpoint; press Ctrl-C again to terminate the nodes at once",
    "terminating the nodes at once",
)
"""The foot of the screen, by how often a stop was asked for."""
STYLES: Mapping[str, str] = {
    "start": "cyan",
    "grown": "green",
    "recovered": "green",
    "done": "bold green",
    "lost": "yellow",
    "notice": "yellow",
    "preempted": "yellow",
    "relaunch": "yellow",
    "warning": "yellow",
}
"""By kind of event; all others are drawn plain."""


@dataclass(slots=True)
class RunView:
    """What the events so far say about a run. A figure that none gave stays None."""

    run_id: str
    state: str = "planned"
    step: int | None = None
    num_steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    heldout_loss: float | None = None
    tokens_per_second: float | None = None
    spent_usd: Decimal | None = None
    held_usd: Decimal | None = None
    cap_usd: Decimal | None = None
    num_nodes: int | None = None
    preemptions: int = 0
    notes: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Fold one event in."""
        data = event.data
        if event.kind == "state":
            self.state = str(data.get("state", event.message)).lower().replace("_", " ")
        elif event.kind == "lost":
            self.preemptions += len(data.get("ranks", ())) or 1
        elif event.kind == "settled" and data.get("cause") == "preempted":
            self.preemptions += 1
        for name, value in {**data, **data.get("progress", {})}.items():
            if name in FIGURES and value is not None:
                setattr(self, name, value)

    @property
    def share_done(self) -> float:
        """0 before the first step, 1 at the end."""
        return self.step / self.num_steps if self.step is not None and self.num_steps else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Real seconds to the last step at the measured speed; None while that is unknown."""
        if not self.step or not self.num_steps or not self.tokens or not self.tokens_per_second:
            return None
        return (self.num_steps - self.step) * (self.tokens / self.step) / self.tokens_per_second


FIGURES = frozenset(
    {
        "run_id",
        "step",
        "num_steps",
        "tokens",
        "loss",
        "heldout_loss",
        "tokens_per_second",
        "spent_usd",
        "held_usd",
        "cap_usd",
        "num_nodes",
        "preemptions",
    }
)


def progress_line(view: RunView) -> str:
    """All figures in one line."""
    parts = [
        f"step {_fraction(view.step, view.num_steps)}",
        f"loss {nats(view.loss)}",
        f"held-out {nats(view.heldout_loss)}",
        f"{count(view.tokens_per_second)} tokens/s",
        f"{dollars(view.spent_usd)} of {dollars(view.cap_usd)}",
        plural(view.num_nodes or 0, "node"),
        plural(view.preemptions, "preemption"),
        f"ETA {duration(view.eta_seconds)}",
    ]
    return "  ".join(parts)


def event_line(event: Event, message: str) -> str:
    """Local time of day, kind, message."""
    return f"{event.at.astimezone():%H:%M:%S}  {event.kind:<9}  {message}"


def figures(view: RunView) -> RenderableType:
    """The block of figures at the foot of the screen."""
    from rich.table import Table
    from rich.text import Text

    spent = float(view.spent_usd / view.cap_usd) if view.spent_usd is not None and view.cap_usd else 0.0
    held = f", {dollars(view.held_usd)} reserved" if view.held_usd else ""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(view.run_id, style="bold"),
        Text(bar(view.share_done, BAR_WIDTH), style="cyan"),
        f"step {_fraction(view.step, view.num_steps)}, {count(view.tokens)} tokens, {duration(view.eta_seconds)} left",
    )
    grid.add_row(
        Text(view.state),
        Text(bar(spent, BAR_WIDTH), style="yellow" if spent < WARN_SHARE else "red"),
        f"{dollars(view.spent_usd)} of {dollars(view.cap_usd)}{held}",
    )
    grid.add_row(
        Text(plural(view.num_nodes or 0, "node")),
        Text(f"loss {nats(view.loss)}, held-out {nats(view.heldout_loss)}"),
        f"{count(view.tokens_per_second)} tokens/s, {plural(view.preemptions, 'preemption')}",
    )
    return grid


class PlainLines:
    """One line per event, for pipes and log files; progress at most every PLAIN_PROGRESS_SECONDS, and the last."""

    def __init__(self, console: Console, run_id: str) -> None:
        self.view = RunView(run_id)
        self._console = console
        self._shown_at: datetime | None = None
        self._pending: Event | None = None

    def __call__(self, event: Event) -> None:
        if event.kind != "progress":
            self._flush()
            self.view.take(event)
            self._print(event, event.message)
            return
        self.view.take(event)
        first = self._shown_at is None
        if first or (event.at - (self._shown_at or event.at)).total_seconds() >= PLAIN_PROGRESS_SECONDS:
            self._show_progress(event)
        else:
            self._pending = event

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            self._show_progress(self._pending)

    def _show_progress(self, event: Event) -> None:
        self._shown_at, self._pending = event.at, None
        self._print(event, progress_line(self.view))

    def _print(self, event: Event, message: str) -> None:
        self._console.print(event_line(event, message), markup=False, highlight=False, soft_wrap=True)


class LiveScreen:
    """Figures that redraw themselves at the foot of a terminal; events scroll by above them."""

    def __init__(self, console: Console, run_id: str, switch: StopSwitch) -> None:
        from rich.live import Live

        self.view = RunView(run_id)
        self._switch = switch
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=REFRESH_PER_SECOND)

    def __call__(self, event: Event) -> None:
        from rich.text import Text

        self.view.take(event)
        if event.kind != "progress":
            self._live.console.print(Text(event_line(event, event.message), style=STYLES.get(event.kind, "")))

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        text = STOPPING[min(self._switch.level, len(STOPPING) - 1)]
        return Group("", figures(self.view), Text(text, style="yellow"))


def watcher(console: Console, run_id: str, switch: StopSwitch) -> LiveScreen | PlainLines:
    """What suits the console: a screen on a terminal, else lines."""
    return LiveScreen(console, run_id, switch) if console.is_terminal else PlainLines(console, run_id)


def _fraction(step: Any, num_steps: Any) -> str:
    return f"{'-' if step is None else step}/{'-' if num_steps is None else num_steps}"

"""When the spot market preempts nodes, and how many it has: pure, so that a replay gives the same.

A market is named by a string: `calm`, `hazard:PER_HOUR` or `trace:FILE`, each with options behind commas:
- `notice=P`: share of the preemptions that are announced before, `notice_seconds=S`: how long before;
- `times=N` (trace): one instance of the trace stands for N of ours.

Two clocks run from the run's first instance on: `real` seconds, and `billed` seconds (real x time scale). Hazards and
foreign traces live in billed time; notices, and the events of our own traces, in real time.
"""

from __future__ import annotations

import bisect
import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from cost.errors import UserError
from tasks.recipe.load import RECIPE_FOLDER

SECONDS_PER_HOUR = 3600.0
NOTICE_SHARE = 0.5
NOTICE_SECONDS = 15.0
SHIPPED_TRACES = RECIPE_FOLDER / "markets"


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds since the run's first instance was started."""

    real: float
    billed: float


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the market sees it; `ordinal` counts the nodes that had this rank, from 1."""

    instance_id: str
    rank: int
    ordinal: int
    started: Moment


@dataclass(frozen=True, slots=True)
class Strike:
    """Preempt this node `notice_seconds` from now, announced if that is more than zero.

    No key strikes twice. The rank cannot be rented for `back_seconds` after.
    """

    instance_id: str
    key: str
    notice_seconds: float = 0.0
    back_seconds: float = 0.0


class Spot(Protocol):
    def capacity(self, now: Moment, /) -> int | None:
        """How many nodes can exist now; None without limit."""
        ...

    def strikes(self, now: Moment, nodes: Sequence[NodeView]) -> list[Strike]:
        """The nodes to preempt now out of `nodes`, which holds only those that are not being preempted yet.

        The same strike may be returned again: the caller executes every key once.
        """
        ...


@dataclass(frozen=True, slots=True)
class Hazard:
    """Exponential lifetimes, drawn anew for the n-th node of each rank: the same for the same seed."""

    per_hour: float
    seed: int
    time_scale: float
    notice_share: float = NOTICE_SHARE
    notice_seconds: float = NOTICE_SECONDS

    def fate(self, rank: int, ordinal: int) -> tuple[float, float]:
        """Billed seconds that the node lives, and real seconds of notice."""
        draw = random.Random(f"{self.seed}:{rank}:{ordinal}")
        lifetime = draw.expovariate(self.per_hour) * SECONDS_PER_HOUR if self.per_hour > 0 else float("inf")
        return lifetime, self.notice_seconds if draw.random() < self.notice_share else 0.0

    def capacity(self, _now: Moment, /) -> int | None:
        return None

    def strikes(self, now: Moment, nodes: Sequence[NodeView]) -> list[Strike]:
        found = []
        for node in nodes:
            lifetime, notice = self.fate(node.rank, node.ordinal)
            left = (lifetime - (now.billed - node.started.billed)) / self.time_scale
            if left <= notice:
                found.append(Strike(node.instance_id, f"hazard:{node.instance_id}", max(0.0, left)))
        return found


@dataclass(frozen=True, slots=True)
class CapacityTrace:
    """How many nodes there are changes at `starts` (billed seconds); begins again when it is over.

    Nodes that no longer fit are preempted, chosen by seed.
    """

    starts: tuple[float, ...]
    counts: tuple[int, ...]
    length: float
    seed: int
    times: int = 1
    notice_share: float = NOTICE_SHARE
    notice_seconds: float = NOTICE_SECONDS

    def capacity(self, now: Moment, /) -> int | None:
        index = bisect.bisect_right(self.starts, now.billed % self.length) - 1
        return self.counts[index] * self.times

    def strikes(self, now: Moment, nodes: Sequence[NodeView]) -> list[Strike]:
        excess = len(nodes) - (self.capacity(now) or 0)
        if excess <= 0:
            return []
        found = []
        for node in sorted(nodes, key=self._order)[:excess]:
            announced = self._draw(node).random() < self.notice_share
            notice = self.notice_seconds if announced else 0.0
            found.append(Strike(node.instance_id, f"capacity:{node.instance_id}", notice))
        return found

    def _order(self, node: NodeView) -> float:
        return self._draw(node).random()

    def _draw(self, node: NodeView) -> random.Random:
        return random.Random(f"{self.seed}:{node.rank}:{node.ordinal}")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of our own trace. `at_seconds` are real.

    kill, notice: takes `rank` (with `notice_seconds`) once it is `min_age_seconds` old, and later if there is no such
    node at that moment; it cannot be rented again for `back_seconds`. capacity: from now on at most `capacity` nodes
    can be started; those that exist stay.
    """

    at_seconds: float
    action: str
    rank: int = 0
    notice_seconds: float = 0.0
    min_age_seconds: float = 0.0
    back_seconds: float = 0.0
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.action not in ("kill", "notice", "capacity"):
            raise ValueError(f"action {self.action!r} is none of kill, notice, capacity")
        if self.action == "capacity" and self.capacity is None:
            raise ValueError("an event with action capacity needs the field capacity")
        if self.action == "notice" and self.notice_seconds <= 0:
            raise ValueError("an event with action notice needs notice_seconds above 0")


@dataclass(frozen=True, slots=True)
class Script:
    """Our own trace: exactly these events."""

    events: tuple[Event, ...]

    def capacity(self, now: Moment, /) -> int | None:
        past = [event for event in self.events if event.action == "capacity" and event.at_seconds <= now.real]
        return past[-1].capacity if past else None

    def strikes(self, now: Moment, nodes: Sequence[NodeView]) -> list[Strike]:
        found = []
        for index, event in enumerate(self.events):
            if event.action == "capacity" or event.at_seconds > now.real:
                continue
            notice = event.notice_seconds if event.action == "notice" else 0.0
            for node in nodes:
                if node.rank == event.rank and now.real - node.started.real >= event.min_age_seconds:
                    found.append(Strike(node.instance_id, f"event:{index}", notice, event.back_seconds))
        return found


# -- reading ------------------------------------------------------------------------------------------


def resolve(market: str) -> str:
    """The same market with its file's absolute path, or the path of the trace that is shipped under that name."""
    kind, argument, options = _parts(market)
    if kind != "trace" or not argument:
        return market
    shipped = SHIPPED_TRACES / f"{argument}.yaml"
    path = shipped if not Path(argument).exists() and shipped.exists() else Path(argument).absolute()
    return ",".join([f"trace:{path}", *(f"{name}={value:g}" for name, value in options.items())])


def load(market: str, *, seed: int, time_scale: float) -> Spot:
    """The market that a string names.

    Raises:
        UserError: No such market, option or file, or the file cannot be understood.
    """
    kind, argument, options = _parts(resolve(market))
    notice = options.get("notice", NOTICE_SHARE), options.get("notice_seconds", NOTICE_SECONDS)
    if kind == "calm" and not argument:
        return Hazard(0.0, seed, time_scale)
    if kind == "hazard":
        try:
            per_hour = float(argument)
        except ValueError:
            per_hour = -1.0
        if per_hour >= 0:
            return Hazard(per_hour, seed, time_scale, *notice)
    if kind == "trace" and argument:
        return _trace(Path(argument), seed, int(options.get("times", 1)), notice)
    raise UserError(f"no market {market!r}; write calm, hazard:PER_HOUR (such as hazard:0.5) or trace:FILE.")


def _parts(market: str) -> tuple[str, str, dict[str, float]]:
    """Kind, argument and options of a market's name."""
    parts = market.split(",")
    options: dict[str, float] = {}
    while len(parts) > 1 and "=" in parts[-1]:
        name, _, value = parts.pop().partition("=")
        try:
            options[name] = float(value)
        except ValueError:
            raise UserError(f"market option {name}={value}: {value!r} is no number.") from None
        if name not in ("notice", "notice_seconds", "times"):
            raise UserError(f"no market option {name!r}; there are notice, notice_seconds and times.")
    kind, _, argument = ",".join(parts).partition(":")
    return kind, argument, options


def _trace(path: Path, seed: int, times: int, notice: tuple[float, float]) -> Spot:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read the market trace {path}: {error.strerror}.") from error
    try:
        if path.suffix == ".csv":
            starts, counts, length = _counts_of_csv(text)
        else:
            content = _parse(path, text)
            if not isinstance(content, Mapping) or "data" not in content:
                return Script(_events(content))
            gap = float(content["metadata"]["gap_seconds"])
            counts = tuple(int(count) for count in content["data"])
            starts, length = tuple(index * gap for index in range(len(counts))), gap * len(counts)
        if not counts or length <= 0:
            raise ValueError("it is empty")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"cannot understand the market trace {path}: {error}; known are a list of events (at_seconds, action, "
            'rank, ...), {"metadata": {"gap_seconds": g}, "data": [n, ...]} and lines of ms,add|remove,node.'
        ) from error
    return CapacityTrace(starts, counts, length, seed, times, *notice)


def _parse(path: Path, text: str) -> object:
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _events(content: object) -> tuple[Event, ...]:
    if isinstance(content, Mapping):
        content = content["events"]
    if not isinstance(content, list):
        raise TypeError("it is no list of events")
    known = {field.name for field in fields(Event)}
    for row in content:
        unknown = set(row) - known
        if unknown:
            raise ValueError(f"an event has no field {min(unknown)!r}, it has {', '.join(sorted(known))}")
    return tuple(sorted((Event(**row) for row in content), key=lambda event: event.at_seconds))


def _counts_of_csv(text: str) -> tuple[tuple[float, ...], tuple[int, ...], float]:
    """Number of nodes over time out of lines `ms,add|remove,node`; begins with the first line."""
    rows = sorted(((float(row[0]) / 1000, row[1], row[2]) for row in csv.reader(text.splitlines()) if row), key=_when)
    present: set[str] = set()
    counts: dict[float, int] = {}
    for moment, action, node in rows:
        if action not in ("add", "remove"):
            raise ValueError(f"{action!r} is neither add nor remove")
        (present.add if action == "add" else present.discard)(node)
        counts[moment - rows[0][0]] = len(present)
    starts = tuple(counts)
    return starts, tuple(counts.values()), max(starts, default=0.0) + 1.0


def _when(row: tuple[float, str, str]) -> float:
    return row[0]

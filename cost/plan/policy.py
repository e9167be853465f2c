"""Policies: when to hold a spot node and in which zone, when to pay for on-demand, when to wait at no cost.

A policy sees at each decision which zones have capacity now and what it has seen since it started; it never sees the
future. `run` charges it on a trace: every held hour is billed, start-up trains nothing, a preemption takes back the
work since the last checkpoint. Invariant: dollars never pass the budget and hours never pass the deadline.
Sources: the problem, its traces and the two rules "stay while you have it" and "do not switch for a short window" are
those of Can't Be Late (Wu et al., NSDI 2024); here the budget is fixed and the work is what it buys.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cost.errors import UserError

ON_DEMAND = "on-demand"
DECISION_HOURS = 0.05
DECISIONS = 2000
"""How often a policy that holds no spot node is asked again while capacity does not change: every `DECISION_HOURS`,
and at most this often before a long deadline."""
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Traces:
    """Capacity of several zones over the same time, as stretches in which nothing changes; then they begin anew."""

    zones: tuple[str, ...]
    tick_hours: float
    """Of the source; random starts are whole ticks."""
    stretches: tuple[tuple[float, tuple[str, ...]], ...]
    """Hours, and the zones with capacity in the order of `zones`."""

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """Hour at which each stretch ends."""
        return tuple(itertools.accumulate(hours for hours, _ in self.stretches))

    @property
    def hours(self) -> float:
        """Length of the whole trace."""
        return self.ends[-1]

    def window(self, start_hour: float, hours: float) -> Iterator[tuple[float, tuple[str, ...]]]:
        """Stretches from one moment on, the first and the last cut to fit."""
        offset = start_hour % self.hours
        index = bisect.bisect_right(self.ends, offset)
        length = self.ends[index] - offset
        while hours > 1e-12:
            yield min(length, hours), self.stretches[index][1]
            hours -= length
            index = (index + 1) % len(self.stretches)
            length = self.stretches[index][0]

    def only(self, zone: str) -> Traces:
        """The same time with one zone."""
        mine = ((hours, (zone,) if zone in up else ()) for hours, up in self.stretches)
        return Traces((zone,), self.tick_hours, joined(mine))


def joined(stretches: Iterable[tuple[float, tuple[str, ...]]]) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """Merge neighbouring stretches with the same capacity."""
    groups = itertools.groupby(stretches, key=lambda stretch: stretch[1])
    return tuple((sum(hours for hours, _ in group), up) for up, group in groups)


def read_traces(folder: Path, *, num_nodes: int = 1) -> Traces:
    """All .json traces of a folder: `{"metadata": {"gap_seconds": g}, "data": [instances obtainable, ...]}`.

    A zone has capacity in a tick in which it has `num_nodes` instances. The shortest trace ends all of them.

    Raises:
        UserError: There is no trace, a file is not a trace, or traces have different gaps.
    """
    documents = {file.stem: _read_trace(file) for file in sorted(folder.glob("*.json"))}
    if not documents:
        raise UserError(f"there are no .json traces in {folder}; give a folder of availability traces.")
    gaps = {gap for gap, _ in documents.values()}
    if len(gaps) > 1:
        found = ", ".join(f"{gap:g} s" for gap in sorted(gaps))
        raise UserError(
            f"the traces in {folder} have different gaps between samples ({found}); put them into different folders."
        )
    zones, tick_hours = tuple(documents), gaps.pop() / SECONDS_PER_HOUR
    ticks = zip(*(data for _, data in documents.values()), strict=False)
    up = (tuple(zone for zone, count in zip(zones, now, strict=True) if count >= num_nodes) for now in ticks)
    return Traces(zones, tick_hours, joined((tick_hours, here) for here in up))


def _read_trace(file: Path) -> tuple[float, Sequence[float]]:
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
        gap, data = float(document["metadata"]["gap_seconds"]), [float(count) for count in document["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not an availability trace ({error!r}); docs/guide.md shows the format.") from error
    if gap <= 0 or not data:
        raise UserError(f"{file} has no samples; an availability trace needs gap_seconds > 0 and some data.")
    return gap, data


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run may spend and what holding nodes costs; prices are per hour of the whole cluster."""

    budget_usd: float
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float | None
    """None where there is none to be had."""
    deadline_hours: float
    startup_hours: float
    """Billed time from a start to the first new step."""
    lost_hours: float
    """Work taken back by a preemption, at most what the node had done."""
    work_hours: float = math.inf
    """Useful hours after which the run is finished."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one simulated run."""

    useful_hours: float
    usd: float
    hours: float
    """From the start until the work, the money or the time was at an end."""
    held_hours: float
    preemptions: int
    finished: bool


@dataclass(slots=True)
class View:
    """What a policy may know. Histories begin with the run."""

    terms: Terms
    hour: float = 0.0
    remaining_usd: float = 0.0
    useful_hours: float = 0.0
    holding: str | None = None
    up: tuple[str, ...] = ()
    hours_up: dict[str, float] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    hours_any_up: float = 0.0
    hours_none_up: float = 0.0
    """Length of the outage of all zones that lasts now; 0 while one has capacity."""

    @property
    def hours_left(self) -> float:
        """Until the deadline."""
        return self.terms.deadline_hours - self.hour

    def mean_hours_between_losses(self, zone: str) -> float:
        """Mean rate so far, with a prior of one loss in `PRIOR_HOURS` (the posterior of a Gamma prior)."""
        return (PRIOR_HOURS + self.hours_up.get(zone, 0.0)) / (1 + self.losses.get(zone, 0))

    def steadiest(self) -> str:
        """Of the zones with capacity, the zone that was lost least often; the first among equals."""
        return max(self.up, key=self.mean_hours_between_losses)


class Policy(Protocol):
    """Decides what to hold: a zone with capacity, `ON_DEMAND`, or nothing."""

    def __call__(self, view: View) -> str | None: ...


PRIOR_HOURS = 3.0
"""Mean up-time before anything was seen: the pooled 3.35 h of cost/data/hazards.csv, rounded down."""
PRIOR_AVAILABILITY = 0.5
PRIOR_AVAILABILITY_HOURS = 4.0
"""Weight of the prior share of time in which some zone has capacity."""
PATIENCE_HOURS = 1.0
"""Outages shorter than this are waited out: the mean outage of the nine zones is 1.7 h, most are far shorter."""
RESERVE_HOURS = 6.0
"""On-demand begins once this many hours of it are to spare, so that it runs in few long pieces."""
WORTH_SWITCHING_HOURS = 0.75
"""From on-demand back to a zone that lasts longer than this on average: start-up and lost work eat a shorter one."""


def default_policy(view: View) -> str | None:
    """Spot while there is any, in the steadiest zone; on-demand in long outages, paid from what spot will not need.

    Money that spot is expected to need until the deadline, at the availability seen so far, is kept for it. The rest
    buys on-demand, but not for outages shorter than `PATIENCE_HOURS`, and not in scraps: each start costs start-up.
    """
    if view.holding in view.up:
        return view.holding
    terms = view.terms
    seen = view.hour + PRIOR_AVAILABILITY_HOURS
    availability = (view.hours_any_up + PRIOR_AVAILABILITY * PRIOR_AVAILABILITY_HOURS) / seen
    spare_usd = view.remaining_usd - terms.spot_usd_per_hour * availability * view.hours_left
    if view.up:
        zone = view.steadiest()
        short = view.mean_hours_between_losses(zone) <= WORTH_SWITCHING_HOURS
        return ON_DEMAND if view.holding == ON_DEMAND and short and spare_usd > 0 else zone
    if terms.on_demand_usd_per_hour is None:
        return None
    if view.holding == ON_DEMAND:
        return ON_DEMAND if spare_usd > 0 else None
    everything = spare_usd >= terms.on_demand_usd_per_hour * view.hours_left
    enough = spare_usd > terms.on_demand_usd_per_hour * RESERVE_HOURS
    return ON_DEMAND if everything or (enough and view.hours_none_up >= PATIENCE_HOURS) else None


def spot_only(view: View) -> str | None:
    """Any zone with capacity, else wait."""
    if view.holding in view.up:
        return view.holding
    return view.up[0] if view.up else None


def steady_spot_only(view: View) -> str | None:
    """The zone that was lost least often, else wait."""
    if view.holding in view.up:
        return view.holding
    return view.steadiest() if view.up else None


def on_demand_only(view: View) -> str | None:
    """Never preempted, at the full price."""
    return None if view.terms.on_demand_usd_per_hour is None else ON_DEMAND


def spot_then_on_demand(view: View) -> str | None:
    """On-demand as soon as spot is gone, spot as soon as it is back: the usual fallback."""
    if view.holding in view.up:
        return view.holding
    return view.up[0] if view.up else on_demand_only(view)


POLICIES: Mapping[str, Policy] = {
    "default": default_policy,
    "spot": spot_only,
    "steady_spot": steady_spot_only,
    "spot_then_on_demand": spot_then_on_demand,
    "on_demand": on_demand_only,
}
DEFAULT = "default"


def run(policy: Policy, traces: Traces, terms: Terms, *, start_hour: float = 0.0) -> Outcome:
    """Follow a policy from one moment until the work, the money or the time is at an end."""
    progress = _Progress(View(terms, remaining_usd=terms.budget_usd))
    pause = max(DECISION_HOURS, terms.deadline_hours / DECISIONS)
    was_up: tuple[str, ...] = ()
    for hours, up in traces.window(start_hour, terms.deadline_hours):
        progress.begin_stretch(up, was_up)
        was_up = up
        left = hours
        while left > 1e-12:
            progress.hold(policy(progress.view))
            step = left if progress.view.holding in up else min(left, pause)
            if not progress.spend(step):
                return progress.outcome()
            left -= step
    return progress.outcome()


class _Progress:
    """Time, money and work of one run."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.startup_left = 0.0
        self.gained = 0.0
        """Work of the node that is held, all of which a preemption may take back."""
        self.held = 0.0
        self.preemptions = 0
        self.finished = False

    def begin_stretch(self, up: tuple[str, ...], was_up: tuple[str, ...]) -> None:
        """Capacity has changed: what is held may be gone."""
        view = self.view
        view.up = up
        if view.holding not in (None, ON_DEMAND) and view.holding not in up:
            self.preemptions += 1
            view.useful_hours -= min(view.terms.lost_hours, self.gained)
            view.holding = None
        for zone in was_up:
            if zone not in up:
                view.losses[zone] = view.losses.get(zone, 0) + 1
        if up:
            view.hours_none_up = 0.0

    def hold(self, wanted: str | None) -> None:
        """A node that was held is released after a checkpoint; a new node has to start up."""
        if wanted != self.view.holding:
            self.view.holding, self.gained, self.startup_left = wanted, 0.0, self.view.terms.startup_hours

    def spend(self, step: float) -> bool:
        """Let time pass; False where the work is done or the money is spent."""
        view, terms = self.view, self.view.terms
        price = 0.0
        if view.holding is not None:
            price = terms.on_demand_usd_per_hour if view.holding == ON_DEMAND else terms.spot_usd_per_hour  # type: ignore[assignment]
        to_finish = self.startup_left + terms.work_hours - view.useful_hours if price else math.inf
        affordable = view.remaining_usd / price if price else math.inf
        time = min(step, to_finish, affordable)
        if price:
            worked = max(0.0, time - self.startup_left)
            self.startup_left = max(0.0, self.startup_left - time)
            view.useful_hours += worked
            self.gained += worked
            self.held += time
            view.remaining_usd -= time * price
        self._observe(time)
        self.finished = time >= to_finish
        return time >= step and not self.finished

    def _observe(self, time: float) -> None:
        view = self.view
        view.hour += time
        for zone in view.up:
            view.hours_up[zone] = view.hours_up.get(zone, 0.0) + time
        if view.up:
            view.hours_any_up += time
        else:
            view.hours_none_up += time

    def outcome(self) -> Outcome:
        view = self.view
        usd = view.terms.budget_usd - view.remaining_usd
        return Outcome(view.useful_hours, usd, view.hour, self.held, self.preemptions, self.finished)


def offline_bound(traces: Traces, terms: Terms, *, start_hour: float = 0.0) -> float:
    """Upper bound of useful hours, for a policy that knows the whole trace and pays nothing for start-up or losses.

    x_s = min(A, B/p_s) hours of spot, A hours in which some zone has capacity, and
    x_o = min((B - p_s x_s)/p_o, T - x_s) hours of on-demand.
    """
    available = sum(hours for hours, up in traces.window(start_hour, terms.deadline_hours) if up)
    spot = min(available, terms.budget_usd / terms.spot_usd_per_hour)
    if terms.on_demand_usd_per_hour is None:
        return spot
    rest = (terms.budget_usd - terms.spot_usd_per_hour * spot) / terms.on_demand_usd_per_hour
    return spot + max(0.0, min(rest, terms.deadline_hours - spot))


@dataclass(frozen=True, slots=True)
class Score:
    """Means over starts. The fraction is the mean of useful hours over the bound of the same start."""

    fraction_of_bound: float
    useful_hours: float
    usd: float
    preemptions: float


def score(policy: Policy, traces: Traces, terms: Terms, start_hours: Sequence[float]) -> Score:
    """Run a policy from each start; starts at which the bound is zero count nothing."""
    bounds = [offline_bound(traces, terms, start_hour=start) for start in start_hours]
    outcomes = [run(policy, traces, terms, start_hour=start) for start in start_hours]
    shares = [outcome.useful_hours / bound for outcome, bound in zip(outcomes, bounds, strict=True) if bound > 0]
    return Score(
        fraction_of_bound=_mean(shares, lambda share: share),
        useful_hours=_mean(outcomes, lambda outcome: outcome.useful_hours),
        usd=_mean(outcomes, lambda outcome: outcome.usd),
        preemptions=_mean(outcomes, lambda outcome: outcome.preemptions),
    )


T = TypeVar("T")


def _mean(items: Sequence[T], value: Callable[[T], float]) -> float:
    return sum(value(item) for item in items) / len(items) if items else 0.0

"""The market's files, in a folder of its own: its state, its bill and its events.

The state is replaced in one step; a node is in it before it is started. Bill and events are lines that are only
appended: the end of a node is billed before the state shows it, and a line that a kill prevented is added at the next
start. Of two lines for one end the first counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from cost.errors import SlmError
from orchestrator.backends.local.schedule import Moment
from tasks.guard import clock
from tasks.guard.files import write_json

STATE_FILE = "instances.json"
BILL_FILE = "bill.jsonl"
EVENTS_FILE = "events.jsonl"
NOT_ENDED = ("starting", "alive", "stopping", "ending")


class MarketBroken(SlmError):
    """The market's own folder cannot be read."""


@dataclass(slots=True)
class Node:
    """One instance. `ttl_at`, `kill_at` and `stop_at` are boottimes; `guard` is the pid and start time of its guard.

    state: starting (recorded, may not exist yet), alive, stopping (its command got SIGTERM), ending (being killed,
    not yet confirmed), ended.
    """

    instance_id: str
    lease_id: str
    run_id: str
    rank: int
    ordinal: int
    usd_per_hour: str
    node_dir: str
    tmp_dir: str
    started: tuple[float, float]
    started_at: str
    ttl_at: float
    state: str = "starting"
    guard: tuple[int, str] | None = None
    kill_at: float | None = None
    stop_at: float | None = None
    told: bool = False
    reason: str = ""
    exit_code: int | None = None
    ended: tuple[float, float] | None = None

    @property
    def is_there(self) -> bool:
        return self.state in NOT_ENDED

    def path(self, name: str) -> Path:
        """A file of the node's own folder."""
        return Path(self.node_dir) / name


@dataclass(frozen=True, slots=True)
class Anchor:
    """A moment of the market's clocks at a boottime; the clocks run on from it at `scale`."""

    boot_id: str
    boottime: float
    real: float
    billed: float
    scale: float

    def at(self, boottime: float) -> Moment:
        elapsed = boottime - self.boottime
        return Moment(self.real + elapsed, self.billed + elapsed * self.scale)


@dataclass(slots=True)
class State:
    """Everything that outlives the market's process."""

    anchor: Anchor | None = None
    market: str = "calm"
    seed: int = 0
    port: int = 0
    lease_ports: dict[str, int] = field(default_factory=dict)
    ordinals: dict[str, int] = field(default_factory=dict)
    struck: list[str] = field(default_factory=list)
    outages: dict[str, float] = field(default_factory=dict)
    """Rank -> real moment until which it cannot be rented."""
    nodes: list[Node] = field(default_factory=list)

    def there(self, lease_id: str | None = None) -> list[Node]:
        """Nodes that exist and cost money."""
        return [node for node in self.nodes if node.is_there and lease_id in (None, node.lease_id)]

    def describe(self, lease_id: str) -> list[dict[str, Any]]:
        """The newest node of each rank, ended or not, as clients get it."""
        newest = {node.rank: node for node in self.nodes if node.lease_id == lease_id}
        return [
            {
                "rank": node.rank,
                "is_there": node.is_there,
                "booted": node.path("deadline.json").exists(),
                "exit_code": node.exit_code,
                "usd_per_hour": node.usd_per_hour,
                "reason": node.reason,
            }
            for node in newest.values()
        ]


def load_state(folder: Path) -> State:
    """The state as last written; a new one where there is none."""
    path = folder / STATE_FILE
    if not path.exists():
        return State()
    try:
        content = json.loads(path.read_text())
        anchor = content.pop("anchor")
        nodes = [_node(fields) for fields in content.pop("nodes")]
        return State(anchor=None if anchor is None else Anchor(**anchor), nodes=nodes, **content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MarketBroken(
            f"the local cloud's state {path} cannot be read: {error}; running nodes end by themselves when their "
            f"grant expires, then delete {folder}."
        ) from error


def save_state(folder: Path, state: State) -> None:
    write_json(str(folder / STATE_FILE), asdict(state))


def _node(content: dict[str, Any]) -> Node:
    node = Node(**content)
    node.started = (node.started[0], node.started[1])
    node.guard = None if node.guard is None else (node.guard[0], node.guard[1])
    node.ended = None if node.ended is None else (node.ended[0], node.ended[1])
    return node


class Journal:
    """Lines that are kept until they can be written: a full disk must not stop the market from ending nodes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []

    def add(self, **facts: object) -> None:
        self._pending.append(json.dumps({"at": datetime.now(UTC).isoformat(), **facts}) + "\n")

    def flush(self) -> None:
        """Write what is pending; raises OSError and keeps it when that fails."""
        if self._pending:
            with self.path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                whole = file.read() in (b"", b"\n")
                file.write((("" if whole else "\n") + "".join(self._pending)).encode())  # a cut line stays alone
            self._pending.clear()

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a journal; the last may have been cut off by a kill."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def true_bill(folder: Path, *, boottime: float | None = None) -> Decimal:
    """Dollars that this cloud charges up to now: its own lines, which no ledger reads."""
    anchor = load_state(folder).anchor
    now = anchor.at(clock.boottime() if boottime is None else boottime).billed if anchor else 0.0
    starts: dict[str, dict[str, Any]] = {}
    ends: dict[str, float] = {}
    for line in read_lines(folder / BILL_FILE):
        if line["event"] == "start":
            starts.setdefault(line["instance_id"], line)
        else:
            ends.setdefault(line["instance_id"], line["billed_seconds"])
    return sum(
        (
            Decimal(line["usd_per_hour"]) * Decimal(ends.get(name, now) - line["billed_seconds"]) / 3600
            for name, line in starts.items()
        ),
        Decimal(0),
    )

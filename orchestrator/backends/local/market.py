"""Rents, watches, preempts and terminates nodes on this machine: the provider's side of the local cloud.

Invariants: a node is recorded before its first process exists, and is billed until none of its processes is left, as
found by its mark and never by a pid alone; `turn` never blocks, so that no node delays the end of another.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cost.errors import SlmError
from orchestrator.backends.local.records import BILL_FILE, EVENTS_FILE, Anchor, Journal, Node, load_state, save_state
from orchestrator.backends.local.schedule import Moment, NodeView, Strike, load
from orchestrator.backends.local.spawn import STOP_SECONDS, Order, free_port, short_folder, spawn, store_root
from tasks.guard.clock import boot_id, boottime
from tasks.guard.files import read_json, recorded
from tasks.guard.processes import Identity, alive, family, kill_family, send, start_time

FAMILY_SECONDS = 5.0


class Refused(SlmError):
    """The market refused a request; nothing was rented. `kind` decides which error the client raises."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Cloud:
    """One run's nodes. Not thread-safe: the server holds a lock around every call."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = boottime) -> None:
        self.folder = folder
        self._clock = clock
        self._state = load_state(folder)
        self._spot = load("calm", seed=0, time_scale=1.0)
        self._bill = Journal(folder / BILL_FILE)
        self._events = Journal(folder / EVENTS_FILE)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._known: dict[str, set[Identity]] = {}
        self._family_at: dict[str, float] = {}
        self._quiet: dict[str, int] = {}
        self._unsaved = False
        self.metadata_url = ""
        self._adopt()

    @property
    def port(self) -> int:
        return self._state.port

    def listen(self, port: int) -> None:
        """Set the port where guards ask for a preemption notice."""
        self.metadata_url = f"http://127.0.0.1:{port}/metadata"
        self._state.port = port
        self._save()

    @property
    def is_written(self) -> bool:
        """Whether the folder holds all that is known."""
        return not self._unsaved

    @property
    def is_ending(self) -> bool:
        return any(node.state in ("stopping", "ending") for node in self._state.there())

    # -- requests of clients --------------------------------------------------------------------

    def start(self, order: Order) -> list[str]:
        """Rent what is missing of a lease; the new instances' names."""
        self._configure(order)
        alive = {node.rank for node in self._state.there(order.lease_id)}
        missing = [rank for rank in range(order.num_nodes) if rank not in alive]
        if not missing:
            return []
        now = self._now()
        self._check_capacity(order, missing, now)
        store = store_root(order)
        if not alive:
            self._state.lease_ports[order.lease_id] = free_port()
        return [self._rent(order, rank, store, now).instance_id for rank in missing]

    def describe(self, lease_id: str) -> list[dict[str, Any]]:
        """The newest node of each rank of one lease."""
        return self._state.describe(lease_id)

    def extend(self, lease_id: str, seconds: float) -> None:
        """Move the time limit of a lease's nodes."""
        for node in self._state.there(lease_id):
            if node.state in ("starting", "alive"):
                node.ttl_at = self._clock() + seconds
        self._save()

    def stop(self, lease_id: str) -> None:
        """Begin to end a lease: its commands get SIGTERM, then `turn` kills them."""
        for node in self._state.there(lease_id):
            if node.state in ("starting", "alive"):
                node.state, node.stop_at, node.reason = "stopping", self._clock() + STOP_SECONDS, "stopped"
                self._tell("stop", node)
                self._ask_to_end(node)
        self._save()

    def there(self, lease_id: str | None = None) -> list[Node]:
        return self._state.there(lease_id)

    def notice_seconds(self, instance_id: str) -> float | None:
        """For the metadata service: seconds until this node is preempted, None while that is not planned."""
        for node in self._state.there():
            if node.instance_id == instance_id and node.kill_at is not None:
                return max(0.0, node.kill_at - self._clock())
        return None

    # -- turns ------------------------------------------------------------------

    def turn(self) -> None:
        """Check every node once, and do what is due."""
        self._processes = [process for process in self._processes if process.poll() is None]
        now = self._clock()
        for node in self._state.there():
            self._check_node(node, now)
        self._strike()
        for node in self._state.there():
            if node.state == "ending":
                self._kill(node)
        self._flush()

    def _check_node(self, node: Node, now: float) -> None:
        self._read_exit(node)
        if node.state == "ending":
            return
        if not self._is_alive(node, now):
            self._end(node, "power_off", node.reason or "powered itself off")
        elif now >= node.ttl_at:
            self._end(node, "ttl", "reached its time limit")
        elif node.kill_at is not None and now >= node.kill_at:
            self._end(node, "kill", "preempted")
        elif node.state == "stopping" and (now >= (node.stop_at or 0.0) or not self._ask_to_end(node)):
            self._end(node, "", node.reason)

    def _ask_to_end(self, node: Node) -> bool:
        """SIGTERM to the node's command, once; False when it has ended. Without a record it may just begin."""
        command = recorded(str(node.path("command.json")))
        if command is None:
            return True
        if not alive(command):
            return False
        if not node.told:
            node.told = self._unsaved = True
            send(command[0], signal.SIGTERM, group=True)
        return True

    def _read_exit(self, node: Node) -> None:
        if node.exit_code is None:
            code = read_json(str(node.path("exit.json"))).get("exit_code")
            if code is not None:
                node.exit_code, self._unsaved = int(code), True

    def _is_alive(self, node: Node, now: float) -> bool:
        """Whether any process of the node is left; one of its two watchers is enough to know."""
        if now >= self._family_at.get(node.instance_id, 0.0):
            self._family_at[node.instance_id] = now + FAMILY_SECONDS
            self._known[node.instance_id] = family(node.instance_id, self._known.get(node.instance_id, ()))
        watchers = [
            node.guard,
            *(recorded(str(node.path(name))) for name in ("deadline.json", "watchdog.json")),
        ]
        return any(alive(watcher) for watcher in watchers) or bool(
            family(node.instance_id, self._known[node.instance_id])
        )

    def _strike(self) -> None:
        if self._state.anchor is None:
            return
        now = self._now()
        free = [node for node in self._state.there() if node.kill_at is None and node.state == "alive"]
        views = [NodeView(node.instance_id, node.rank, node.ordinal, Moment(*node.started)) for node in free]
        hit: set[str] = set()
        for strike in self._spot.strikes(now, views):
            if strike.key not in self._state.struck and strike.instance_id not in hit:
                hit.add(strike.instance_id)
                self._take(next(node for node in free if node.instance_id == strike.instance_id), strike, now)

    def _take(self, node: Node, strike: Strike, now: Moment) -> None:
        self._state.struck.append(strike.key)
        if strike.back_seconds:
            self._state.outages[str(node.rank)] = now.real + strike.notice_seconds + strike.back_seconds
        node.kill_at = self._clock() + strike.notice_seconds
        if strike.notice_seconds > 0:
            self._tell("notice", node, seconds=strike.notice_seconds)
        else:
            self._end(node, "kill", "preempted")
        self._unsaved = True

    def _end(self, node: Node, event: str, reason: str) -> None:
        """From now on the node is killed until none of its processes is left."""
        node.state, node.reason = "ending", reason
        if event:
            self._tell(event, node)
        self._save()
        self._kill(node)

    def _kill(self, node: Node) -> None:
        """One pass; the node has ended when two passes in a row found no process."""
        found = kill_family(node.instance_id, self._known.get(node.instance_id, ()))
        self._quiet[node.instance_id] = 0 if found else self._quiet.get(node.instance_id, 0) + 1
        if self._quiet[node.instance_id] < 2:
            return
        self._read_exit(node)
        for folder in (node.node_dir, node.tmp_dir):  # before it counts as ended, or a kill of ours would leave them
            shutil.rmtree(folder, ignore_errors=True)
        now = self._now()
        node.state, node.ended = "ended", (now.real, now.billed)
        self._bill.add(event="end", instance_id=node.instance_id, billed_seconds=now.billed, reason=node.reason)
        self._tell("ended", node, reason=node.reason, exit_code=node.exit_code)
        self._save()

    # -- renting ---------------------------------------------------------------------------------

    def _configure(self, order: Order) -> None:
        """Take the order's market and time scale; the clocks begin with the first order of the run."""
        spot = load(order.market, seed=order.seed, time_scale=order.time_scale)
        state, boottime = self._state, self._clock()
        if (order.market, order.seed) != (state.market, state.seed):
            state.market, state.seed, state.struck, state.outages = order.market, order.seed, [], {}
        if state.anchor is None:
            state.anchor = Anchor(boot_id(), boottime, 0.0, 0.0, order.time_scale)
        elif state.anchor.scale != order.time_scale:
            now = self._now()
            state.anchor = Anchor(boot_id(), boottime, now.real, now.billed, order.time_scale)
        self._spot = spot

    def _check_capacity(self, order: Order, missing: Sequence[int], now: Moment) -> None:
        capacity, alive = self._spot.capacity(now), len(self._state.there())
        blocked = [rank for rank in missing if self._state.outages.get(str(rank), 0.0) > now.real]
        if capacity is not None and alive + len(missing) > capacity:
            fact = f"{max(0, capacity - alive)} more nodes available, {len(missing)} requested"
        elif blocked:
            fact = f"node {blocked[0]} was preempted and is not available again yet"
        else:
            return
        self._events.add(event="no_capacity", real_seconds=now.real, lease_id=order.lease_id, detail=fact)
        raise Refused("no_capacity", f"the local spot market has no capacity: {fact}")

    def _rent(self, order: Order, rank: int, store: Path, now: Moment) -> Node:
        """Record the node, then start it."""
        name = f"{order.lease_id}-{rank}-{secrets.token_hex(4)}"
        key = str(rank)
        self._state.ordinals[key] = self._state.ordinals.get(key, 0) + 1
        node = Node(
            instance_id=name,
            lease_id=order.lease_id,
            run_id=order.run_id,
            rank=rank,
            ordinal=self._state.ordinals[key],
            usd_per_hour=order.usd_per_hour,
            node_dir=str(self.folder / "nodes" / name),
            tmp_dir=str(short_folder() / f"slm-{secrets.token_hex(4)}"),
            started=(now.real, now.billed),
            started_at=datetime.now(UTC).isoformat(),
            ttl_at=self._clock() + order.ttl_seconds,
        )
        self._state.nodes.append(node)
        try:
            save_state(self.folder, self._state)
        except OSError as error:
            self._state.nodes.remove(node)
            raise Refused("error", f"the local cloud cannot write to {self.folder}: {error.strerror}") from error
        self._open_bill(node)
        try:
            process = spawn(order, node, store, self._state.lease_ports[order.lease_id], self.metadata_url)
        except OSError as error:
            self._end(node, "", "could not be started")
            raise Refused("error", f"the local cloud could not start a node: {error}") from error
        self._processes.append(process)
        node.guard = (process.pid, start_time(process.pid) or "")
        node.state = "alive"
        self._tell("start", node)
        self._save()
        return node

    # -- files -----------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Continue from the state of an earlier market: its nodes still run, or are found to have ended."""
        state, anchor = self._state, self._state.anchor
        if anchor is None:
            return
        if anchor.boot_id != boot_id():  # after a reboot nothing runs, and the clocks continue where they stopped
            last = max((node.started for node in state.nodes), default=(anchor.real, anchor.billed))
            last = max(last, *(node.ended for node in state.nodes if node.ended), (anchor.real, anchor.billed))
            state.anchor = Anchor(boot_id(), self._clock(), last[0], last[1], anchor.scale)
        try:
            self._spot = load(state.market, seed=state.seed, time_scale=anchor.scale)
        except SlmError as error:  # its trace is gone: the nodes are still watched
            self._events.add(event="market_is_calm", detail=str(error))
        billed = {(line["event"], line["instance_id"]) for line in self._bill.lines()}
        for node in state.nodes:
            if ("start", node.instance_id) not in billed:
                self._open_bill(node)
            if node.ended is not None and ("end", node.instance_id) not in billed:
                self._bill.add(event="end", instance_id=node.instance_id, billed_seconds=node.ended[1])
            if node.state == "starting":
                node.state = "alive"  # if it was never started, the first check finds no process and ends it
        if state.there():
            self._events.add(event="market_restarted", real_seconds=self._now().real, nodes=len(state.there()))
        self._save()

    def _open_bill(self, node: Node) -> None:
        self._bill.add(
            event="start",
            instance_id=node.instance_id,
            lease_id=node.lease_id,
            rank=node.rank,
            usd_per_hour=node.usd_per_hour,
            billed_seconds=node.started[1],
        )

    def _now(self) -> Moment:
        anchor = self._state.anchor
        return anchor.at(self._clock()) if anchor is not None else Moment(0.0, 0.0)

    def _tell(self, event: str, node: Node, **facts: object) -> None:
        now = self._now()
        times = {"real_seconds": round(now.real, 3), "billed_seconds": round(now.billed, 3)}
        place = {"instance_id": node.instance_id, "lease_id": node.lease_id, "rank": node.rank}
        self._events.add(event=event, **times, **place, **facts)

    def _save(self) -> None:
        self._unsaved = True
        self._flush()

    def _flush(self) -> None:
        """Write everything; what a full disk refuses is written at the next turn."""
        with suppress(OSError):
            self._bill.flush()  # before the state, so that a node that has ended is always billed
            self._events.flush()
            if self._unsaved:
                save_state(self.folder, self._state)
            self._unsaved = False

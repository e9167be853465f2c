"""The local cloud with real processes: a market, guards and watchdogs, and scripts instead of Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cost.errors import UserError
from cost.ledger.leases import Lease
from orchestrator.backends.base import BackendError, LeasePhase
from orchestrator.backends.local import client, server
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.backends.local.market import Cloud
from orchestrator.backends.local.records import read_lines, true_bill
from orchestrator.backends.local.schedule import Hazard
from tasks.guard.files import read_json, recorded, write_json
from tasks.guard.processes import Identity, alive, family, kill_family, start_time
from tests.support.backend_contract import OFFER, PRICE, BackendContract, lease_of

# Node 0 ends with the code in $SLM_STORE/end-LEASE, once that is there.
WAIT_FOR_END = """
import os, pathlib, sys, time
end = pathlib.Path(os.environ["SLM_STORE"]) / ("end-" + os.environ["SLM_LEASE"])
while os.environ["SLM_RANK"] != "0" or not end.exists():
    time.sleep(0.02)
sys.exit(int(end.read_text()))
"""


def end_all(mark: str) -> None:
    """SIGKILL until nobody is left: one pass can miss a process that is just being started."""
    while kill_family(mark):
        time.sleep(0.02)


class LocalRig:
    """A market of its own below `root`, and a store beside it."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.home, self.store, self.trace = root / "market", root / "store", root / "trace.json"
        self.store.mkdir(parents=True)
        self.trace.write_text("[]")
        self.command: Sequence[str] = [sys.executable, "-S", "-c", WAIT_FOR_END]
        self.options = {
            "store_uri": str(self.store),
            "market": f"trace:{self.trace}",
            "time_scale": 3600.0,
            "seed": 0,
            "offers": [OFFER],
            "on_notice": [],
            "guard_period_seconds": 0.1,
            **options,
        }
        self.backend = self.another()

    def another(self, **options: Any) -> LocalBackend:
        """A backend as the next supervisor would make it."""
        return LocalBackend(self.home, "test", **{**self.options, **options})

    def until(self, fact: Callable[[], Any], seconds: float = 20.0) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = fact()
            if value:
                return value
            time.sleep(0.03)
        raise AssertionError(f"not true within {seconds} s; market: {self.log()}")

    def log(self) -> str:
        path = self.home / "market.log"
        return path.read_text() if path.exists() else ""

    def take(self, lease: Lease, rank: int) -> None:
        end_all(self.mark(lease, rank))

    def mark(self, lease: Lease, rank: int) -> str:
        return next(
            node.instance_id
            for node in self.backend.list_alive()
            if (node.lease_id, node.rank) == (lease.lease_id, rank)
        )

    def end_command(self, lease: Lease, exit_code: int) -> None:
        (self.store / f"end-{lease.lease_id}.new").write_text(str(exit_code))
        (self.store / f"end-{lease.lease_id}.new").rename(self.store / f"end-{lease.lease_id}")

    def limit(self, num_nodes: int) -> None:
        self.script({"at_seconds": 0, "action": "capacity", "capacity": num_nodes})

    def script(self, *events: dict[str, Any]) -> None:
        self.trace.write_text(json.dumps(events))

    def keep(self, lease: Lease, seconds: float) -> None:
        for rank in range(lease.num_nodes):
            request = self.store / f"guard/{lease.lease_id}/{rank}/request.json"
            number = self.until(partial(_number_of, request))
            grant = self.store / f"grants/{lease.lease_id}/{rank}.json"
            grant.parent.mkdir(parents=True, exist_ok=True)
            write_json(str(grant), {"fencing_token": 1, "number": number, "duration_seconds": seconds})

    def pass_seconds(self, seconds: float) -> None:
        time.sleep(seconds)

    def market(self) -> Identity | None:
        return recorded(str(self.home / server.ADDRESS_FILE))

    def node_file(self, lease: Lease, rank: int, name: str) -> str:
        return str(self.home / "nodes" / self.mark(lease, rank) / name)

    def start(self, lease: Lease, command: Sequence[str] | None = None) -> None:
        self.backend.start(lease, self.command if command is None else command)
        self.until(lambda: self.backend.poll(lease).phase is LeasePhase.RUNNING)

    def events(self) -> list[str]:
        return [line["event"] for line in read_lines(self.home / "events.jsonl")]

    def close(self) -> None:
        """End everything, however the test went."""
        for node in self.backend.list_alive():
            end_all(node.instance_id)
            self.backend.stop(lease_of(node.lease_id))
        market = self.market()
        if market is not None and market[0] != os.getpid() and alive(market):
            os.kill(market[0], signal.SIGKILL)


def _number_of(request: Path) -> int:
    return int(read_json(str(request)).get("number", 0))


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[..., LocalRig]]:
    made: list[LocalRig] = []

    def make(name: str = "rig", **options: Any) -> LocalRig:
        made.append(LocalRig(tmp_path / name, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(rigs: Callable[..., LocalRig]) -> LocalRig:
    return rigs()


class TestLocalBackend(BackendContract):
    """The common contract."""


PRINT_ENVIRONMENT = "import json, os, time; print(json.dumps(dict(os.environ)), flush=True); time.sleep(600)"


def test_a_node_is_told_what_it_is_and_nothing_of_other_clusters(
    rig: LocalRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("SLM_NODE_MARK", "of-another-node")
    monkeypatch.setenv("FROM_OUTSIDE", "kept")
    lease = lease_of()
    rig.backend = rig.another(env={"EXTRA": "1"})
    rig.start(lease, [sys.executable, "-S", "-c", PRINT_ENVIRONMENT])
    logs = [rig.store / f"logs/slm-test-1-{rank}.log" for rank in (0, 1)]
    head, other = (json.loads(rig.until(log.read_text)) for log in logs)
    node_dir = str(rig.home / "nodes" / rig.mark(lease, 1))
    expected = {
        "SLM_SPEC": str(rig.store / "spec.json"),
        "SLM_STORE": str(rig.store),
        "SLM_LEASE": "slm-test-1",
        "SLM_RANK": "1",
        "SLM_NUM_NODES": "2",
        "SLM_NODE_IP": "127.0.0.1",
        "SLM_HEAD_IP": "127.0.0.1",
        "SLM_HEAD_PORT": head["SLM_HEAD_PORT"],
        "SLM_NODE_DIR": node_dir,
        "SLM_NODE_MARK": rig.mark(lease, 1),
        "SLM_NOTICE_FILE": f"{node_dir}/notice.json",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "SPT_NOENV": "1",
        "EXTRA": "1",
        "FROM_OUTSIDE": "kept",
    }
    assert {name: other.get(name) for name in expected} == expected
    assert "RAY_ADDRESS" not in other
    assert len(other["TMPDIR"]) < 40 and Path(other["TMPDIR"]).is_dir()
    rig.backend.stop(lease)
    assert not Path(other["TMPDIR"]).exists() and not Path(node_dir).exists()


def test_without_a_supervisor_nodes_end_and_then_the_market(rig: LocalRig) -> None:
    lease = lease_of(first_grant_seconds=2.0)
    rig.start(lease)
    marks, market = [rig.mark(lease, 0), rig.mark(lease, 1)], rig.market()
    assert alive(market)
    rig.until(lambda: not alive(market), seconds=2.0 + 2.0 + server.IDLE_SECONDS + 5.0)
    assert not any(family(mark) for mark in marks)
    assert rig.market() is None
    state = rig.another().poll(lease)
    assert state.phase is LeasePhase.GONE
    assert "powered itself off" in state.detail
    assert rig.market() is None  # it was not started to answer that


def test_a_killed_market_is_restarted_and_knows_its_nodes_and_its_bill(rig: LocalRig) -> None:
    lease = lease_of()
    rig.start(lease)
    marks = {rig.mark(lease, 0), rig.mark(lease, 1)}
    first = rig.market()
    assert first is not None
    os.kill(first[0], signal.SIGKILL)
    rig.until(lambda: not alive(first))
    rig.take(lease, 1)  # while nobody looks
    rig.until(lambda: rig.backend.poll(lease).alive_ranks == (0,))
    assert {rig.mark(lease, 0)} < marks
    assert rig.market() != first
    rig.backend.stop(lease)
    bill = read_lines(rig.home / "bill.jsonl")
    assert sorted((line["event"], line["instance_id"] in marks) for line in bill) == [
        ("end", True),
        ("end", True),
        ("start", True),
        ("start", True),
    ]
    billed = {name: [line["billed_seconds"] for line in bill if line["instance_id"] == name] for name in marks}
    hours = sum(Decimal(end - start) / 3600 for start, end in billed.values())
    assert true_bill(rig.home) == pytest.approx(PRICE * hours)
    assert hours > 0


def test_a_market_killed_between_writing_down_and_starting_bills_nothing_for_long(rig: LocalRig) -> None:
    lease = lease_of(num_nodes=1)
    rig.start(lease)
    rig.backend.stop(lease)
    market = rig.market()
    assert market is not None
    os.kill(market[0], signal.SIGKILL)
    state = read_json(str(rig.home / "instances.json"))
    lost = {**state["nodes"][0], "instance_id": "never-came", "state": "starting", "guard": None, "ended": None}
    lost["node_dir"] = str(rig.home / "nodes/never-came")
    write_json(str(rig.home / "instances.json"), {**state, "nodes": [*state["nodes"], lost]})
    rig.until(lambda: not rig.backend.list_alive())
    bill = [line["event"] for line in read_lines(rig.home / "bill.jsonl") if line["instance_id"] == "never-came"]
    assert bill == ["start", "end"]


def test_the_provider_ends_a_node_whose_guard_and_watchdog_are_hung(rig: LocalRig) -> None:
    lease = lease_of(num_nodes=1, first_grant_seconds=2.5)
    rig.start(lease)
    mark = rig.mark(lease, 0)
    for name in ("watchdog.json", "deadline.json"):
        hung = rig.until(partial(recorded, rig.node_file(lease, 0, name)))
        os.kill(hung[0], signal.SIGSTOP)
    rig.until(lambda: not family(mark), seconds=2.5 + lease.kill_latency_seconds + 2.0)
    rig.until(lambda: "ended" in rig.events())
    assert "ttl" in rig.events()


def test_a_fixed_limit_cannot_be_moved(rigs: Callable[..., LocalRig]) -> None:
    rig = rigs(ttl="fixed", ttl_seconds=2.0)
    lease = lease_of(num_nodes=1)
    rig.start(lease)
    rig.backend.extend(lease, 600.0)
    rig.until(lambda: rig.backend.poll(lease).phase is LeasePhase.GONE)
    assert "ttl" in rig.events()


IGNORE = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
OBEY = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""


def test_stop_lets_a_command_end_and_kills_one_that_does_not(rig: LocalRig, tmp_path: Path) -> None:
    willing, deaf = lease_of("slm-test-1", num_nodes=1), lease_of("slm-test-2", num_nodes=1)
    rig.start(willing, [sys.executable, "-S", "-c", OBEY, str(tmp_path / "saved")])
    rig.start(deaf, [sys.executable, "-S", "-c", IGNORE])
    for lease in (willing, deaf):
        log = rig.store / f"logs/{lease.lease_id}-0.log"
        rig.until(log.read_text)
        mark = rig.mark(lease, 0)
        rig.backend.stop(lease)
        assert not family(mark)
    assert (tmp_path / "saved").read_text() == "saved"


def test_only_our_own_processes_are_ended(rigs: Callable[..., LocalRig]) -> None:
    ours, theirs = rigs("ours"), rigs("theirs")
    lease = lease_of(num_nodes=1)
    ours.start(lease)
    theirs.start(lease)  # another run of the same user, even with the same lease's name
    foreign = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)", ours.mark(lease, 0)])
    try:
        ours.backend.stop(lease)
        assert not ours.backend.list_alive()
        assert theirs.backend.poll(lease).phase is LeasePhase.RUNNING
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_the_market_takes_a_node_with_notice_and_gives_it_back_later(
    rigs: Callable[..., LocalRig], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    rig = rigs(on_notice=["/bin/sh", "-c", f"echo $SLM_RANK {{seconds}} >> {told}"])
    rig.script(
        {"at_seconds": 0.5, "action": "kill", "rank": 1, "min_age_seconds": 0.5, "back_seconds": 1.0},
        {"at_seconds": 1.0, "action": "notice", "rank": 0, "notice_seconds": 3.0},
    )
    lease = lease_of()
    rig.start(lease)
    rig.until(lambda: rig.backend.poll(lease).alive_ranks == (0,))
    assert rig.backend.poll(lease).detail == "node 1: preempted"
    with pytest.raises(BackendError, match="node 1 was preempted and is not available again yet"):
        rig.backend.start(lease, rig.command)
    rig.until(lambda: told.exists() and told.read_text())
    assert told.read_text() in ("0 2\n", "0 3\n")
    rig.until(lambda: rig.backend.poll(lease).phase is LeasePhase.GONE)
    rig.start(lease)
    events = [(line["event"], line.get("rank")) for line in read_lines(rig.home / "events.jsonl")]
    kept = [event for event in events if event[0] in ("start", "notice", "kill")]
    assert kept == [("start", 0), ("start", 1), ("kill", 1), ("notice", 0), ("kill", 0), ("start", 0), ("start", 1)]


def test_a_hazard_takes_nodes_at_its_own_hour(rigs: Callable[..., LocalRig]) -> None:
    rig = rigs(market="hazard:0.5,notice=0")  # one billed hour per second: about two seconds
    lease = lease_of(num_nodes=1)
    rig.start(lease)
    rig.until(lambda: rig.backend.poll(lease).phase is LeasePhase.GONE)
    ((start, end),) = [[line["billed_seconds"] for line in read_lines(rig.home / "bill.jsonl")]]
    lifetime, _ = Hazard(0.5, 0, 3600.0).fate(0, 1)
    assert lifetime <= end - start < lifetime + 3600.0


def test_a_vanished_store_is_told_and_nothing_is_rented(rig: LocalRig) -> None:
    rig.store.rename(rig.store.with_name("elsewhere"))
    with pytest.raises(BackendError, match=r"the run store .* is gone"):
        rig.backend.start(lease_of(), rig.command)
    assert not rig.backend.list_alive()
    assert true_bill(rig.home) == 0


def test_a_store_that_is_no_folder_is_refused(rigs: Callable[..., LocalRig]) -> None:
    rig = rigs(store_uri="s3://bucket/run")
    with pytest.raises(BackendError, match="s3://bucket/run"):
        rig.backend.start(lease_of(), rig.command)


def test_a_market_that_does_not_exist_is_refused_at_once(rigs: Callable[..., LocalRig]) -> None:
    with pytest.raises(UserError, match="no market 'wild'"):
        rigs(market="wild")


def test_a_state_that_cannot_be_read_is_told(rig: LocalRig) -> None:
    rig.home.mkdir()
    (rig.home / "instances.json").write_text("{")
    with pytest.raises(BackendError, match=r"instances.json cannot be read: .* then delete"):
        rig.backend.poll(lease_of())
    (rig.home / "instances.json").unlink()


def test_a_market_that_cannot_start_says_why(rig: LocalRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "START_SECONDS", 1.0)
    broken = rig.another(python="/bin/false")
    with pytest.raises(BackendError, match=r"the local cloud does not start: its log is empty \(see .*market.log\)"):
        broken.start(lease_of(), rig.command)


def test_a_hung_market_is_told(rig: LocalRig, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = lease_of(num_nodes=1)
    rig.start(lease)
    market = rig.market()
    assert market is not None
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    os.kill(market[0], signal.SIGSTOP)
    try:
        with pytest.raises(BackendError, match=rf"\(pid {market[0]}\) did not answer within 0 s; if it was stopped"):
            rig.backend.poll(lease)
    finally:
        os.kill(market[0], signal.SIGCONT)
    monkeypatch.undo()
    assert rig.backend.poll(lease).phase is LeasePhase.RUNNING


def test_what_the_market_does_not_know_is_refused(rig: LocalRig) -> None:
    asking = client.MarketClient(rig.home, sys.executable)
    with pytest.raises(BackendError, match="the market knows no request 'destroy'"):
        asking.call("destroy")
    with pytest.raises(BackendError, match=r"a bug in the local cloud: KeyError\('lease_id'\)"):
        asking.call("poll")
    address = read_json(str(rig.home / server.ADDRESS_FILE))
    assert (rig.home / server.ADDRESS_FILE).stat().st_mode & 0o077 == 0
    request = urllib.request.Request(f"http://127.0.0.1:{address['port']}/list", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


@pytest.fixture
def idle_market(rig: LocalRig) -> Iterator[Cloud]:
    """A market in this process that never takes a turn: it does what it is asked, but ends nothing."""
    rig.home.mkdir()
    cloud = Cloud(rig.home)
    serving = server.Server(cloud, 0)
    me = {"pid": os.getpid(), "start": start_time(os.getpid())}
    address = {"port": serving.server_port, "token": serving.token, **me}
    write_json(str(rig.home / server.ADDRESS_FILE), address)
    cloud.listen(serving.server_port)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield cloud
    rig.home.mkdir(exist_ok=True)
    (rig.home / server.ADDRESS_FILE).unlink(missing_ok=True)
    serving.shutdown()
    serving.server_close()
    for node in cloud.there():
        end_all(node.instance_id)
    while cloud.there():
        cloud.turn()


def test_a_node_that_cannot_be_ended_is_told(
    rig: LocalRig, idle_market: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "END_SECONDS", 0.1)
    lease = lease_of(num_nodes=1)
    rig.backend.start(lease, rig.command)
    with pytest.raises(BackendError, match=r"could not yet end slm-test-1-0-.*; it keeps trying"):
        rig.backend.stop(lease)
    assert [node.state for node in idle_market.there()] == ["stopping"]


def test_a_node_that_cannot_be_started_is_billed_to_its_end(rig: LocalRig, idle_market: Cloud) -> None:
    (rig.store / "logs").write_text("in the way")
    with pytest.raises(BackendError, match=r"the local cloud could not start a node: .*logs"):
        rig.backend.start(lease_of(num_nodes=1), rig.command)
    idle_market.turn()
    assert idle_market.there() == []
    assert [line["event"] for line in read_lines(rig.home / "bill.jsonl")] == ["start", "end"]


def test_nothing_is_rented_that_cannot_be_written_down(rig: LocalRig, idle_market: Cloud) -> None:
    (rig.home / "instances.json").unlink()
    (rig.home / "instances.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(BackendError, match=r"the local cloud cannot write to .*: Is a directory"):
        rig.backend.start(lease_of(num_nodes=1), rig.command)
    assert idle_market.there() == []
    (rig.home / "instances.json").rmdir()


def test_two_supervisors_at_once_find_one_market(rig: LocalRig) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.backends.local.client import MarketClient; "
        "print(MarketClient(Path(sys.argv[1]), sys.executable).call('list'))"
    )
    asking = [subprocess.Popen([sys.executable, "-c", script, str(rig.home)], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=30)[0] for process in asking] == [b"{'nodes': []}\n"] * 3
    assert alive(rig.market())
    assert rig.log() == ""

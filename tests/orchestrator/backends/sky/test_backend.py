"""Renting through SkyPilot, with a worker that rents from a file in the place of the one that imports SkyPilot."""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.ledger.leases import Lease
from orchestrator.backends.base import Backend, BackendError, LeasePhase, NoCapacity
from orchestrator.backends.sky import backend as sky
from orchestrator.backends.sky.backend import SkyBackend, SkySettings, alive_ranks, staged
from orchestrator.backends.sky.client import SkyClient, SkyRefusal
from tests.support.backend_contract import OFFER, BackendContract, lease_of
from trainer.run_store.base import DirectoryStore

STAND_IN = Path(__file__).resolve().parents[3] / "support" / "sky_stand_in.py"
SECRET = "[default]\naws_secret_access_key = not-to-be-seen\n"


class FileSupport:
    """The stand-in's own time limit."""

    terminators = frozenset({"file-limit"})
    reads_prices = False

    def __init__(self, rig: SkyRig) -> None:
        self.rig = rig

    def limit(self, record: Mapping[str, Any], lease: Lease, seconds: float) -> None:
        if record:
            self.rig.change(lambda node: node.update(until=time.time() + seconds), lease)

    def usd_per_hour(self, record: Mapping[str, Any], lease: Lease) -> Decimal | None:
        return None

    def refusal(self, lease: Lease) -> str | None:
        return self.rig.state.get("refusal")

    def why_gone(self, record: Mapping[str, Any], lease: Lease) -> str:
        return "the file took it back" if record else ""

    def release(self, record: Mapping[str, Any], lease: Lease) -> None:
        self.rig.set(released=lease.lease_id)


class SkyRig:
    """The stand-in's provider side."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.cloud = folder / "cloud.json"
        self.cloud.write_text(json.dumps({"capacity": 100, "clusters": {}, "calls": [], "made": 0}))
        self.store = DirectoryStore(folder / "store")
        self.folder = folder / "sky"
        self.told: list[str] = []
        command = (sys.executable, str(STAND_IN), str(self.cloud), str(self.store.root))
        self.client = SkyClient(self.folder / "sky.log", command)
        self._backend = SkyBackend(
            self.folder,
            self.store,
            offers=[OFFER],
            client=self.client,
            settings=SkySettings(**{"allow_unguarded": True, **settings}),
            supports={"example": FileSupport(self)},
            credentials=lambda: SECRET,
            tell=self.told.append,
        )

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def command(self) -> Sequence[str]:
        return ["train"]

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.cloud.read_text()))

    def set(self, **facts: Any) -> None:
        self.cloud.write_text(json.dumps({**self.state, **facts}))

    def change(self, what: Callable[[dict[str, Any]], Any], lease: Lease, rank: int | None = None) -> None:
        state, record = self.state, self._backend._record(lease)
        order = [entry for entry, _ in record.get("instances", ())]
        for name, node in state["clusters"].get(record["cluster"], {}).items():
            if rank is None or name == order[rank]:
                what(node)
        self.cloud.write_text(json.dumps(state))

    def until(self, fact: Callable[[], Any]) -> Any:
        for _ in range(200):
            if value := fact():
                return value
            time.sleep(0.05)
        return fact()

    def take(self, lease: Lease, rank: int) -> None:
        self.change(lambda node: node.update(alive=False), lease, rank)

    def end_command(self, lease: Lease, exit_code: int) -> None:
        request = {"number": 2, "state": "exited", "exit_code": exit_code}
        self.store.write(f"guard/{lease.lease_id}/0/request.json", json.dumps(request).encode())

    def limit(self, num_nodes: int) -> None:
        self.set(capacity=num_nodes)

    def keep(self, lease: Lease, seconds: float) -> None:
        """No guard ends a node of this file."""

    def pass_seconds(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[SkyRig]:
    rig = SkyRig(tmp_path)
    yield rig
    rig.client.close()


class TestSkyBackend(BackendContract):
    """Held to the same text as the others."""


def test_nodes_that_live_keep_their_ranks_when_one_is_rented_again(rig: SkyRig) -> None:
    lease = lease_of()
    rig.backend.start(lease, rig.command)
    first = rig.state["clusters"]["slm-test-1"]
    head = next(name for name, node in first.items() if node["ip"] == "10.0.0.198")  # the lower address is rank 0
    rig.take(lease, 1)
    rig.backend.start(lease, rig.command)
    assert rig.state["facts"]["ranks"] == {"10.0.0.198": 0}
    assert [node.instance_id for node in rig.backend.list_alive() if node.rank == 0] == [head]


def test_what_another_machine_needs_stands_in_the_run_store(rig: SkyRig) -> None:
    rig.backend.start(lease_of(), rig.command)
    record = json.loads(rig.store.read("clusters/slm-test-1.json"))
    assert (record["provider"], record["name_on_cloud"], record["run_id"]) == (
        "example",
        "slm-test-1-0123abcd",
        "test",
    )
    assert len(record["instances"]) == 2
    other = SkyBackend(rig.folder, rig.store, client=rig.client)
    assert other.poll(lease_of()).phase is LeasePhase.RUNNING
    other.stop(lease_of())
    assert other.poll(lease_of()).phase is LeasePhase.GONE


def test_the_intent_is_written_before_anything_is_asked_for(rig: SkyRig) -> None:
    rig.set(die="launch")
    with pytest.raises(BackendError, match="SkyPilot's process ended"):
        rig.backend.start(lease_of(), rig.command)
    assert json.loads(rig.store.read("clusters/slm-test-1.json"))["state"] == "asked"


def test_a_worker_that_hangs_is_ended_and_the_next_call_gets_another(
    rig: SkyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.backend.start(lease_of(), rig.command)
    monkeypatch.setattr(sky, "CALL_SECONDS", 0.5)
    rig.set(hang="query")
    with pytest.raises(BackendError, match="SkyPilot did not answer 'query' within"):
        rig.backend.poll(lease_of())
    monkeypatch.setattr(sky, "CALL_SECONDS", 60.0)
    rig.set(hang="")
    assert rig.backend.poll(lease_of()).phase is LeasePhase.RUNNING


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("quota", "quota: none of these; ask the provider for a higher quota"),
        ("credentials", "credentials: none of these; find what is missing with: sky check"),
        ("setting", "setting: none of these; check SkyPilot's settings"),
    ],
)
def test_what_no_waiting_helps_against_is_refused_for_good(rig: SkyRig, trouble: str, words: str) -> None:
    rig.set(fail={"trouble": trouble, "message": "none of these"})
    with pytest.raises(SkyRefusal, match=words) as refused:
        rig.backend.start(lease_of(), rig.command)
    assert refused.value.for_good
    rig.set(fail={"trouble": "capacity", "message": "sold out"})
    with pytest.raises(NoCapacity, match="sold out") as passing:
        rig.backend.start(lease_of(), rig.command)
    assert not passing.value.for_good


def test_a_cloud_where_nothing_ends_a_hung_node_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    rig = SkyRig(tmp_path, allow_unguarded=False)
    with pytest.raises(SkyRefusal, match="nothing ends a node whose guest hangs"):
        rig.backend.start(lease_of(), rig.command)
    assert rig.state["calls"] == []
    assert rig.store.list("clusters/") == []


def test_the_provider_s_own_interface_refuses_tells_and_forgets(rig: SkyRig) -> None:
    rig.set(refusal="the quota is 0 vCPUs, 8 are needed")
    with pytest.raises(SkyRefusal, match="the quota is 0 vCPUs") as refused:
        rig.backend.start(lease_of(), rig.command)
    assert refused.value.for_good
    assert rig.state["calls"] == []
    rig.set(refusal=None)
    rig.backend.start(lease_of(), rig.command)
    rig.take(lease_of(), 0)
    rig.take(lease_of(), 1)
    assert rig.backend.poll(lease_of()).detail == "the file took it back"
    rig.backend.stop(lease_of())
    assert rig.state["released"] == "slm-test-1"


def test_a_price_that_the_provider_should_say_and_does_not_is_not_confirmed(rig: SkyRig) -> None:
    spot = replace(lease_of("slm-abcdef-demo-1-1"), offer=replace(OFFER, cloud="gcp"))
    record = {"usd_per_hour": "1.0"}  # SkyPilot's, from a catalog of some day
    assert rig._backend._price(spot, record) == Decimal("1.0")
    support = FileSupport(rig)
    rig._backend._supports = {"gcp": support}
    assert rig._backend._price(spot, record) == Decimal("1.0")
    support.reads_prices = True
    assert rig._backend._price(spot, record) is None


def test_without_credentials_for_the_cloud_nothing_is_asked_for(rig: SkyRig) -> None:
    rig.set(enabled=["gcp"])
    with pytest.raises(SkyRefusal, match=r"no credentials for example \(it has them for gcp\)"):
        rig.backend.start(lease_of(), rig.command)
    assert rig.state["calls"] == ["check"]
    assert rig.store.list("clusters/") == []


def test_a_skypilot_that_cannot_be_started_is_one_clear_message(tmp_path: Path) -> None:
    rig = SkyRig(tmp_path, server_pause_seconds=0.0)
    rig.set(broken=True)
    with pytest.raises(SkyRefusal, match=r"could not be started, so nothing was rented: .*address in use"):
        rig.backend.start(lease_of(), rig.command)
    rig.client.close()
    assert rig.state["calls"] == ["check"] * sky.SERVER_TRIES


def test_a_run_store_that_is_away_ends_no_lease(tmp_path: Path) -> None:
    rig = SkyRig(tmp_path, guard_seconds=0.0)
    rig.backend.start(lease_of(), rig.command)
    rig.store.root.rename(tmp_path / "elsewhere")
    state = rig.backend.poll(lease_of())
    rig.client.close()
    assert (state.phase, state.detail) == (LeasePhase.RUNNING, "the run store is away")


def test_what_is_left_after_an_end_is_told(rig: SkyRig) -> None:
    rig.backend.start(lease_of(), rig.command)
    rig.set(left=["i-1"])
    with pytest.raises(BackendError, match="still has 1 instances at the provider"):
        rig.backend.stop(lease_of())


def test_a_guard_that_never_speaks_ends_the_lease(tmp_path: Path) -> None:
    rig = SkyRig(tmp_path, guard_seconds=0.0)
    rig.set(guards=False)
    rig.backend.start(lease_of(), rig.command)
    state = rig.backend.poll(lease_of())
    rig.client.close()
    assert (state.phase, state.exit_code) == (LeasePhase.ENDED, 3)
    assert "its guard has not written for" in state.detail


def test_no_secret_is_in_the_task_the_facts_or_the_run_store(rig: SkyRig) -> None:
    rig.backend.start(lease_of(), rig.command)
    for key in rig.store.list():
        assert b"not-to-be-seen" not in rig.store.read(key)
    assert "not-to-be-seen" not in rig.cloud.read_text()
    assert list(rig.folder.rglob("credentials")) == []  # gone when SkyPilot has copied it


def test_only_the_owner_reads_the_credentials_beside_the_code(tmp_path: Path) -> None:
    with staged(tmp_path / "work", {"lease_id": "x"}, SECRET) as folder:
        assert stat.S_IMODE((folder / "credentials").stat().st_mode) == 0o600
        assert (folder / "guard.pyz").is_file()
        assert (folder / "constraints.txt").is_file()
        assert not (folder / "orchestrator").exists()
    assert not (tmp_path / "work").exists()


def test_clusters_of_other_people_s_leases_are_listed_under_their_own_names(rig: SkyRig) -> None:
    rig.backend.start(replace(lease_of("slm-123456-a-very-long-recipe-name-1-7"), num_nodes=1), rig.command)
    other = SkyBackend(rig.folder, None, client=rig.client)
    names = [node.lease_id for node in other.list_alive()]
    assert len(names) == 1
    assert names[0].startswith("slm-123456-")
    assert names[0].endswith("-7")
    knowing = SkyBackend(
        rig.folder, None, client=rig.client, known_leases=lambda: ["slm-123456-a-very-long-recipe-name-1-7"]
    )
    assert [node.lease_id for node in knowing.list_alive()] == ["slm-123456-a-very-long-recipe-name-1-7"]


def test_ranks_are_counted_while_skypilot_has_not_named_the_instances() -> None:
    named = [["i-b", "10.0.0.1"], ["i-a", "10.0.0.2"]]
    assert alive_ranks({"i-a"}, named, 2) == (1,)
    assert alive_ranks({"i-a", "i-b"}, named, 2) == (0, 1)
    assert alive_ranks({"i-a"}, (), 2) == (0,)
    assert alive_ranks({"j-1", "j-2"}, named, 2) == (0, 1)

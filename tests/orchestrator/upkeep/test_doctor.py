"""`slm doctor`: each check with a real thing that is well, and one that is not."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from cost.ledger.database import connect
from orchestrator import cli
from orchestrator.backends.sky.enabled_clouds import Enabled, enabled_clouds
from orchestrator.settings import Home
from orchestrator.upkeep import clock_skew, doctor
from orchestrator.upkeep.doctor import Finding, Level
from tests.orchestrator.upkeep.test_inventory import a_cloud, a_run, in_the_ledger
from trainer.run_store.base import DirectoryStore, Store


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def no_clouds() -> Enabled:
    return Enabled()


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def examined(home: Home, *names: str) -> dict[str, Finding]:
    return by_name(doctor.examine(home, [a_cloud(*names)], time_server=None, ask_skypilot=no_clouds))


def test_a_new_home_is_well(home: Home) -> None:
    found = examined(home)
    for name in ("home", "ledger", "cloud local", "store", "clock", "orphans"):
        assert found[name].level is Level.OK, found[name]
    assert not home.database.exists(), "looking makes no ledger"
    assert not [path for path in (home.root / "store").rglob("*") if path.is_file()], "nothing is left in the store"


def test_every_finding_that_is_not_well_has_a_fix(home: Home) -> None:
    found = by_name(
        doctor.examine(
            home,
            [a_cloud(f"slm-{home.owner_id()}-lost-1-1")],
            store_uri="nowhere://bucket",
            time_server=None,
            ask_skypilot=lambda: Enabled(("aws", "lambda", "runpod")),
        )
    )
    unwell = [entry for entry in found.values() if entry.level is not Level.OK]
    assert {"orphans", "store", "clock", "cloud lambda", "cloud runpod"} <= {item.name for item in unwell}
    assert all(item.fix for item in unwell)


def test_a_home_that_others_can_read_is_told(home: Home) -> None:
    home.root.chmod(0o755)
    assert examined(home)["home"].fix == f"chmod 700 {home.root}"


@pytest.mark.parametrize(("free", "level"), [(10.0, Level.OK), (9.9, Level.WARN), (1.0, Level.WARN), (0.9, Level.FAIL)])
def test_a_disk_that_is_nearly_full_is_told(free: float, level: Level) -> None:
    assert doctor.space("disk", Path("/data"), free).level is level


# ---------------------------------------------------------------- ledger


def test_a_ledger_that_adds_up_is_well(home: Home) -> None:
    run_id = a_run(home)
    in_the_ledger(home, run_id, f"slm-{home.owner_id()}-{run_id}-1")
    found = examined(home)["ledger"]
    assert found.level is Level.OK, found
    assert found.detail == "1 run, intact, every balance is the sum of its entries"


def test_an_entry_that_was_changed_behind_the_ledger_is_found(home: Home) -> None:
    run_id = a_run(home)
    in_the_ledger(home, run_id, f"slm-{home.owner_id()}-{run_id}-1", settled=True)
    db = connect(home.database)
    db.execute("DROP TRIGGER entries_never_change")
    db.execute("UPDATE entries SET spent_micro_usd = spent_micro_usd + 1 WHERE kind = 'accrue'")
    db.close()
    found = examined(home)["ledger"]
    assert found.level is Level.FAIL
    assert "the entries of run demo-1 add up to $0.000" in found.detail


def test_a_damaged_file_is_found_and_hides_no_other_finding(home: Home) -> None:
    a_run(home)
    content = bytearray(home.database.read_bytes())
    content[4096:] = b"x" * (len(content) - 4096)
    home.database.write_bytes(bytes(content))
    for leftover in home.root.glob("slm.db-*"):
        leftover.unlink()
    found = examined(home)
    assert found["ledger"].level is Level.FAIL
    assert "orphans" in found


# ---------------------------------------------------------------- clouds


def test_each_enabled_cloud_says_what_ends_a_node_there(home: Home) -> None:
    found = by_name(doctor.clouds(lambda: Enabled(("aws", "lambda", "vast"))))
    assert found["cloud aws"].level is Level.OK
    assert "eventbridge-terminate (provider, 2 min 00 s)" in found["cloud aws"].detail
    assert "armed up to 5 min 00 s after the start" in found["cloud aws"].detail
    assert found["cloud lambda"].level is Level.WARN
    assert "nothing ends a node whose guest hangs" in found["cloud lambda"].detail
    assert "automatic payment off" in found["cloud vast"].fix


def test_what_skypilot_cannot_say_is_a_finding() -> None:
    found = by_name(doctor.clouds(lambda: Enabled(problem="cannot say which clouds it has credentials for: broken")))
    assert found["skypilot"].level is Level.FAIL
    assert by_name(doctor.clouds(no_clouds))["skypilot"].fix == "sky check"


def test_a_child_that_answers_is_believed() -> None:
    assert enabled_clouds([sys.executable, "-c", 'print(\'{"version": "1", "enabled": ["aws"]}\')']) == Enabled(
        ("aws",)
    )


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    said = enabled_clouds([sys.executable, "-c", code], seconds=2.0)
    assert said.problem == "did not say within 2 s which clouds it has credentials for"
    assert not Path(f"/proc/{mark.read_text()}").exists()


@pytest.mark.parametrize(
    ("code", "said"), [("raise SystemExit('no module sky')", "no module sky"), ("print('hello')", "answered b'hello")]
)
def test_a_child_that_fails_is_quoted(code: str, said: str) -> None:
    assert said in str(enabled_clouds([sys.executable, "-c", code]).problem)


# ---------------------------------------------------------------- store


class Lax(DirectoryStore):
    """A store whose conditional write is none."""

    def create(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


class Forgetful(DirectoryStore):
    """A store that shows an old list."""

    def list(self, prefix: str = "") -> list[str]:
        return []


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_a_store_without_conditional_writes_fails(tmp_path: Path) -> None:
    found = only(doctor.probe(Lax(tmp_path)))
    assert found.level is Level.FAIL
    assert "a second create of one key is not refused" in found.detail and "--single-supervisor" in found.fix
    assert not list(tmp_path.glob("doctor/*"))


def test_a_store_that_lists_late_fails(tmp_path: Path) -> None:
    assert "a key that was just written is not listed yet" in only(doctor.probe(Forgetful(tmp_path))).detail


def test_a_store_that_vanishes_fails_with_its_own_words(tmp_path: Path) -> None:
    store: Store = DirectoryStore(tmp_path / "store")
    (tmp_path / "store").rmdir()
    found = only(doctor.probe(store))
    assert found.level is Level.FAIL
    assert "is gone" in found.detail


# ---------------------------------------------------------------- clock


@contextmanager
def time_server(ahead_seconds: float) -> Iterator[tuple[str, int]]:
    """An NTP server on this machine whose clock is ahead."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as serving:
        serving.bind(("127.0.0.1", 0))

        def answer() -> None:
            _, asker = serving.recvfrom(48)
            now = time.time() + ahead_seconds + clock_skew.NTP_EPOCH
            serving.sendto(40 * b"\0" + struct.pack("!II", int(now), int(now % 1 * 2**32)), asker)

        threading.Thread(target=answer, daemon=True).start()
        yield serving.getsockname()


@pytest.mark.parametrize(
    ("ahead", "level"), [(0.0, Level.OK), (20.0, Level.WARN), (-20.0, Level.WARN), (1000.0, Level.FAIL)]
)
def test_a_clock_that_is_off_is_told(tmp_path: Path, ahead: float, level: Level) -> None:
    with time_server(ahead) as address:
        found = doctor.clock(DirectoryStore(tmp_path), address)
    assert found.level is level, found
    assert f"{ahead:+.1f} s against 127.0.0.1 (NTP)" in found.detail or ahead == 0


def test_a_time_server_that_is_not_there_is_said_and_the_store_is_enough(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    found = doctor.clock(DirectoryStore(tmp_path), address)
    assert found.level is Level.OK
    assert found.detail.endswith("no time server is reachable (127.0.0.1)")


@contextmanager
def web_server(date: str | None, status: int) -> Iterator[str]:
    """Answers HEAD with this Date."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(status)
            if date is not None:
                self.send_header("Date", date)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 403])
def test_the_date_of_any_answer_tells_the_skew(status: int) -> None:
    with web_server(formatdate(time.time() - 3600, usegmt=True), status) as url:
        found = clock_skew.http_skew(url)
    assert isinstance(found, clock_skew.Skew)
    assert found.seconds == pytest.approx(-3600, abs=1.5)


def test_a_server_without_a_date_or_an_answer_is_said() -> None:
    with web_server(None, 200) as url:
        assert "does not say its time" in str(clock_skew.http_skew(url))
    assert "does not answer" in str(clock_skew.http_skew(url))


# ---------------------------------------------------------------- the command


def slm(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code if isinstance(end.value.code, int) else 0


def test_the_command_fails_when_a_finding_does(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(home.root))
    monkeypatch.setattr(clock_skew, "ANSWER_SECONDS", 0.2)
    file = tmp_path / "file"
    file.write_text("in the way")
    assert slm("doctor", "--store", str(file), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["num_failed"] == 1
    assert [entry["name"] for entry in found["findings"] if entry["level"] == "fail"] == ["store"]
    assert all(entry["fix"] for entry in found["findings"] if entry["level"] != "ok")

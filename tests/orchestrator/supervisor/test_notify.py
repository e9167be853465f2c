"""Warnings reach a real command and a real web server, and nothing that they do can hold a supervisor up."""

from __future__ import annotations

import http.server
import json
import stat
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cost.errors import UserError
from orchestrator import cli
from orchestrator.events import Event, EventLog, read_events
from orchestrator.runs.records import RunState
from orchestrator.settings import Home
from orchestrator.supervisor import notify
from orchestrator.supervisor.notify import Notifier, checked_target, keep, kept, notified, shown
from tests.orchestrator.commands.test_launching import FakeActions

WARNING = Event("warning", "80 % of the cap is spent: $80.00", datetime.now(UTC), {"spent_usd": Decimal(80)})
SECRET = "T0PSECRET"


class Web(http.server.ThreadingHTTPServer):
    """Keeps what it is sent; answers with `statuses` in turn, then 200, each after `delay` seconds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.statuses: list[int] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/{SECRET}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the test."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, json.loads(body)))
        time.sleep(self.server.delay)
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def told(target: str, *events: Event, **options: Any) -> list[Event]:
    """Every event that came through, after the notifier has ended."""
    seen: list[Event] = []
    notifier = Notifier(target, "demo-1", seen.append, **{"pauses_seconds": (0.01,), **options})
    for event in events:
        notifier(event)
    notifier.close()
    return seen


# ---------------------------------------------------------------- a webhook


def test_a_warning_is_posted_as_json(web: Web) -> None:
    assert told(web.url, WARNING) == [WARNING]
    ((path, body),) = web.received
    assert path == f"/hooks/{SECRET}"
    assert body["run_id"] == "demo-1"
    assert body["message"] == WARNING.message
    assert body["data"] == {"spent_usd": "80"}
    assert body["text"] == body["content"] == "slm demo-1: 80 % of the cap is spent: $80.00"


def test_only_warnings_and_the_end_of_a_run_are_told(web: Web) -> None:
    now = datetime.now(UTC)
    events = [
        Event("progress", "step 5", now, {"step": 5}),
        Event("state", "running", now, {"state": RunState.RUNNING}),
        Event("lost", "node 1 is gone", now),
        WARNING,
        Event("state", "out of budget: the drain threshold is reached", now, {"state": RunState.OUT_OF_BUDGET}),
    ]
    assert told(web.url, *events) == events, "every event goes on all the same"
    assert [body["kind"] for _, body in web.received] == ["warning", "state"]


def test_a_server_that_fails_for_a_moment_is_asked_again(web: Web) -> None:
    web.statuses = [500, 429]
    assert told(web.url, WARNING) == [WARNING]
    assert len(web.received) == 3


def test_a_server_that_goes_on_failing_is_given_up_and_said(web: Web) -> None:
    web.statuses = [503] * 9
    seen = told(web.url, WARNING)
    assert len(web.received) == notify.TRIES
    assert [entry.kind for entry in seen] == ["warning", "notify"]
    assert "http://127.0.0.1 could not be notified (status 503): slm demo-1: 80 %" in seen[1].message


def test_a_refusal_is_not_repeated(web: Web) -> None:
    web.statuses = [404] * 9
    seen = told(web.url, WARNING)
    assert len(web.received) == 1
    assert "(status 404)" in seen[1].message


def test_nothing_at_the_address_is_said(web: Web) -> None:
    web.shutdown()
    web.server_close()
    assert "could not be notified (Connection refused)" in told(web.url, WARNING)[1].message


def test_a_server_that_hangs_holds_nobody_up(web: Web) -> None:
    web.delay = 5.0
    seen: list[Event] = []
    notifier = Notifier(web.url, "demo-1", seen.append, answer_seconds=60.0, drain_seconds=0.3)
    began = time.monotonic()
    for _ in range(notify.MOST_WAITING + 10):
        notifier(WARNING)
    handed_on = time.monotonic() - began
    notifier.close()
    assert handed_on < web.delay, "handing an event on waits for no server"
    assert time.monotonic() - began < web.delay, "nor does the end of a supervisor, beyond its limit"
    assert sum(entry.kind == "warning" for entry in seen) == notify.MOST_WAITING + 10
    assert any("messages are waiting already" in entry.message for entry in seen)
    assert any("no time was left" in entry.message for entry in seen)


@pytest.mark.parametrize("status", [404, 503])
def test_what_may_be_a_secret_stands_in_no_event(web: Web, status: int) -> None:
    web.statuses = [status] * 9
    assert not [item for item in told(web.url, WARNING) if SECRET in item.message or SECRET in str(item.data)]


# ---------------------------------------------------------------- a command


def writes(path: Path, *, then: str = "") -> str:
    code = (
        "import json, os, sys, pathlib\n"
        f"pathlib.Path({str(path)!r}).write_text(json.dumps("
        "{'argument': sys.argv[-1], 'input': sys.stdin.read(), 'event': json.loads(os.environ['SLM_EVENT'])}))\n"
        f"{then}"
    )
    script = path.with_suffix(".py")
    script.write_text(code)
    return f"{sys.executable} '{script}' --key {SECRET}"


def test_a_command_gets_the_line_and_the_json(tmp_path: Path) -> None:
    out = tmp_path / "out with blank.json"
    assert told(writes(out), WARNING) == [WARNING]
    got = json.loads(out.read_text())
    assert got["argument"] == "slm demo-1: 80 % of the cap is spent: $80.00"
    assert got["input"] == got["argument"] + "\n"
    assert got["event"]["kind"] == "warning"
    assert got["event"]["data"] == {"spent_usd": "80"}


def test_a_command_that_fails_is_said_without_its_arguments(tmp_path: Path) -> None:
    seen = told(writes(tmp_path / "out.json", then="sys.exit(3)"), WARNING)
    assert "could not be notified (exit code 3)" in seen[1].message
    assert SECRET not in seen[1].message


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = tmp_path / "hang.py"
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    seen = told(f"{sys.executable} {script}", WARNING, command_seconds=2.0)
    assert "it did not end within 2 s" in seen[1].message
    assert not Path(f"/proc/{pid.read_text()}").exists()


# ---------------------------------------------------------------- the target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https:///path", "names no host"),
        ("no-such-program-of-ours now", "no-such-program-of-ours"),
        ("echo 'open", "cannot be read"),
        ("   ", "names nothing"),
    ],
)
def test_a_target_that_cannot_work_is_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked_target(text)


def test_only_host_or_program_is_ever_shown() -> None:
    assert shown(f"https://user:{SECRET}@hooks.example.org/{SECRET}") == "https://hooks.example.org"
    assert shown(f"/usr/local/bin/tell --key {SECRET}") == "tell"


def test_it_is_kept_for_later_supervisors_where_only_the_owner_can_read(tmp_path: Path) -> None:
    home = Home(tmp_path).create()
    assert kept(home, "demo-1") == ""
    keep(home, "demo-1", f"https://example.org/{SECRET}")
    keep(home, "demo-1", f"https://example.net/{SECRET}")
    assert kept(home, "demo-1") == f"https://example.net/{SECRET}"
    assert stat.S_IMODE((home.run_dir("demo-1") / "notify").stat().st_mode) == 0o600


def test_the_log_has_every_warning_and_what_was_not_told(tmp_path: Path, web: Web) -> None:
    home = Home(tmp_path).create()
    keep(home, "demo-1", web.url)
    web.statuses = [400]
    log = home.run_dir("demo-1") / "events.jsonl"
    with notified(home, "demo-1", EventLog(log, lambda _: None)) as emit:
        emit(WARNING)
    assert [line["kind"] for line in read_events(log)] == ["warning", "notify"]
    assert SECRET not in log.read_text()


def test_without_a_target_events_go_straight_on(tmp_path: Path) -> None:
    def emit(_: Event) -> None:
        pass

    with notified(Home(tmp_path).create(), "demo-1", emit) as given:
        assert given is emit


# ---------------------------------------------------------------- the command line


def slm(*arguments: str, actions: FakeActions) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments, actions=actions)
    return end.value.code if isinstance(end.value.code, int) else 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home")


@pytest.mark.parametrize("command", [("launch", "demo", "--market", "calm", "--yes"), ("resume", "demo-1")])
def test_launch_and_resume_pass_it_on(home: Home, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    actions = FakeActions()
    assert slm(*command, "--notify", "https://example.org/x", actions=actions) == 0
    assert actions.called["notify"] == "https://example.org/x"
    assert slm(*command, "--notify", "", actions=actions) == 0
    assert actions.called["notify"] == "", "nobody"
    assert slm(*command, actions=actions) == 0
    assert actions.called["notify"] is None, "as before"
    monkeypatch.setenv("SLM_NOTIFY", "https://example.org/y")
    assert slm(*command, actions=actions) == 0
    assert actions.called["notify"] == "https://example.org/y", "not on a command line that others can see"


def test_a_target_that_cannot_work_ends_the_command(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert slm("launch", "demo", "--yes", "--notify", "no-such-program-of-ours", actions=FakeActions()) == 2
    assert "no-such-program-of-ours" in capsys.readouterr().err

"""A cloud's notice, as each cloud's metadata service gives it, reaches the notice file and the drain command."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.guard.files import read_json
from tasks.guard.notices import seconds_of_azure_events, seconds_of_instance_action
from tests.support.guarded import SLEEPER, Node, node, until
from tests.support.small_server import Answer, Asked, aws_metadata, azure_metadata, gcp_metadata, small_server

__all__ = ["node"]

NOON = datetime(2026, 1, 1, 12, 0, tzinfo=UTC).timestamp()


def noticed(node: Node) -> dict[str, Any]:
    return read_json(str(node.dir / "notice.json"))


def test_an_instance_action_is_at_most_two_minutes_away() -> None:
    def seconds(at: str) -> float:
        return seconds_of_instance_action({"action": "terminate", "time": at}, NOON)

    assert seconds("2026-01-01T12:01:30Z") == 90.0
    assert seconds("2026-01-01T13:00:00Z") == 120.0  # a wall clock that is behind
    assert seconds("2026-01-01T11:00:00Z") == 0.0


def azure_event(kind: str, before: str, *machines: str) -> dict[str, Any]:
    return {
        "EventId": "A123BC45-1234-5678-AB90-ABCDEF123456",
        "EventStatus": "Scheduled" if before else "Started",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(machines),
        "NotBefore": before,
        "DurationInSeconds": -1,
        "EventSource": "Platform",
    }


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([], None),
        ([azure_event("Preempt", "Thu, 01 Jan 2026 12:00:30 GMT", "node-0")], 30.0),
        ([azure_event("Preempt", "", "node-0")], 0.0),  # it has started
        ([azure_event("Preempt", "Thu, 01 Jan 2026 12:00:30 GMT", "node-1")], None),  # a neighbour
        ([azure_event("Reboot", "Thu, 01 Jan 2026 12:00:30 GMT", "node-0")], None),
        (
            [
                azure_event("Terminate", "Thu, 01 Jan 2026 12:05:00 GMT", "node-0"),
                azure_event("Preempt", "Thu, 01 Jan 2026 12:00:30 GMT", "node-1", "node-0"),
            ],
            30.0,
        ),
    ],
)
def test_only_scheduled_events_that_end_this_machine_count(events: list[Any], seconds: float | None) -> None:
    document = {"DocumentIncarnation": 1, "Events": events}
    assert seconds_of_azure_events(document, "node-0", NOON) == seconds


def test_aws_tells_by_instance_action_and_a_rebalance_recommendation_is_none(node: Callable[..., Node]) -> None:
    routes = aws_metadata({"meta-data/events/recommendations/rebalance": {"noticeTime": "2026-01-01T00:00:00Z"}})
    with small_server(routes) as server:
        warned = node(
            SLEEPER, "--notice", "aws", "--notice-period", "0.1", "--metadata-base", server.url, first_grant=60.0
        )
        path = "/latest/meta-data/spot/instance-action"
        until(lambda: len(server.seen("GET", path)) >= 2)
        assert not noticed(warned)
        assert all(entry.headers["x-aws-ec2-metadata-token"] == "a-token" for entry in server.seen("GET", path))
        action = {"action": "terminate", "time": "2026-01-01T12:01:40Z"}
        server.routes.update(aws_metadata({"meta-data/spot/instance-action": lambda _: (200, json.dumps(action))}))
        notice = until(lambda: noticed(warned))
    # The server's own clock dates the reply, and it is later than 2026-01-01: nothing is left.
    assert notice["seconds"] == 0.0
    assert ("notice", "aws") in {(line["event"], line.get("source")) for line in until(lambda: told(warned))}


def told(node: Node) -> list[dict[str, Any]]:
    return [line for line in node.log_lines() if line["event"] == "notice"]


def test_gcp_tells_by_answering_a_question_that_waits_for_a_change(node: Callable[..., Node]) -> None:
    taken = []

    def preempted(asked: Asked) -> Answer:
        if asked.query.get("wait_for_change") == ["true"]:
            assert asked.query["last_etag"] == ["e1"]
            taken.append(until(lambda: (told_to_take.exists() and "TRUE") or "FALSE"))
            return (200, taken[-1], {"ETag": "e1"})
        return (200, "FALSE", {"ETag": "e1"})

    with small_server(gcp_metadata({"instance/preempted": preempted})) as server:
        warned = node(SLEEPER, "--notice", "gcp", "--metadata-base", server.url, first_grant=60.0)
        told_to_take = warned.dir / "take"
        until(lambda: taken)
        assert not noticed(warned)
        told_to_take.touch()
        assert until(lambda: noticed(warned))["seconds"] == 30.0
        first = server.seen("GET", "/computeMetadata/v1/instance/preempted")[0]
        assert first.query == {}  # what was set before the guard started is seen at once


def test_azure_tells_by_a_scheduled_event_that_names_the_machine(node: Callable[..., Node]) -> None:
    events: list[Any] = [azure_event("Preempt", "", "node-1")]
    routes = azure_metadata(
        {
            "instance": lambda _: (200, json.dumps({"compute": {"name": "node-0"}})),
            "scheduledevents": lambda _: (200, json.dumps({"DocumentIncarnation": 1, "Events": events})),
        }
    )
    with small_server(routes) as server:
        warned = node(
            SLEEPER, "--notice", "azure", "--notice-period", "0.1", "--metadata-base", server.url, first_grant=60.0
        )
        until(lambda: len(server.seen("GET", "/metadata/scheduledevents")) >= 3)
        assert not noticed(warned)
        events.append(azure_event("Preempt", "", "node-0"))
        assert until(lambda: noticed(warned))["seconds"] == 0.0
        assert server.seen("GET", "/metadata/scheduledevents")[0].query == {"api-version": ["2020-07-01"]}


def test_a_signal_to_the_guard_is_a_notice_and_does_not_end_it(node: Callable[..., Node], tmp_path: Path) -> None:
    drained = tmp_path / "drained"
    on_notice = f"/bin/sh -c 'echo {{seconds}} >> {drained}'"
    warned = node(SLEEPER, "--sigterm-notice", "20", "--on-notice", on_notice, first_grant=60.0)
    command, first = warned.pid_of("command"), warned.pid_of("deadline")
    watchdog = warned.pid_of("watchdog")
    for pid in (first, watchdog, first):
        os.kill(pid, signal.SIGTERM)
    assert until(lambda: noticed(warned))["seconds"] == 20.0
    until(lambda: drained.exists() and drained.read_text() == "20\n")
    until(lambda: warned.request().get("noticed"))
    now = [warned.pid_of(name) for name in ("command", "deadline", "watchdog")]
    assert now == [command, first, watchdog]


def test_a_metadata_service_that_is_not_there_is_said_once(node: Callable[..., Node]) -> None:
    with small_server({}) as server:
        gone = server.url
    alone = node(SLEEPER, "--notice", "aws", "--notice-period", "0.1", "--metadata-base", gone, first_grant=60.0)
    until(lambda: "notices cannot be read" in alone.events())
    seen = until(alone.request)["number"]
    until(lambda: alone.request()["number"] >= seen + 15)
    assert alone.events().count("notices cannot be read") == 1


def test_a_notice_is_written_down_and_its_command_run_once(node: Callable[..., Node], tmp_path: Path) -> None:
    answers: list[int | None] = [None, None]

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = answers.pop(0) if answers else 25
            self.send_response(404 if seconds is None else 200)
            self.end_headers()
            if seconds is not None:
                self.wfile.write(json.dumps({"seconds": seconds}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/preemption"
        told = tmp_path / "told"
        on_notice = f"/bin/sh -c 'echo {{seconds}} >> {told}'"
        warned = node(SLEEPER, "--notice", f"url:{url}", "--on-notice", on_notice, first_grant=30.0)
        until(lambda: told.exists() and told.read_text())
        os.kill(warned.pid_of("deadline"), signal.SIGKILL)
        warned.process.wait()
        number = warned.request()["number"]
        warned.pid_of("deadline")
        until(lambda: warned.request()["number"] > number)
        server.shutdown()
    notice = read_json(str(warned.dir / "notice.json"))
    assert notice["seconds"] == 25
    assert notice["deadline_boottime"] == pytest.approx(warned.started + 25, abs=10)
    assert told.read_text() == "25\n"

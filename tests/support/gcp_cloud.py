"""A GCP project on this machine for our own calls: an HTTP server with the parts of Compute Engine and Cloud Scheduler
that we ask, whose clock a test moves.

Google's client library is as it comes. Each request's body and query are held to Google's own description of the
service (the discovery documents inside the library), so that a field that does not exist fails here too.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.auth.credentials import AnonymousCredentials

from orchestrator.backends.gcp.account import GcpAccount

PROJECT = "my-project"
ZONE = "us-central1-a"
LEASE = "slm-abcdef-demo-1-1"
ACCOUNT = f"skypilot-v1@{PROJECT}.iam.gserviceaccount.com"
JOBS = f"/v1/projects/{PROJECT}/locations/us-central1/jobs"
COMPUTE = f"/compute/v1/projects/{PROJECT}"
Reply = tuple[int, dict[str, Any]]


def described(service: str) -> dict[str, Any]:
    """The service as Google describes it to programs."""
    folder = files("googleapiclient") / "discovery_cache" / "documents"
    found: dict[str, Any] = json.loads((folder / f"{service}.v1.json").read_text(encoding="utf-8"))
    return found


def unknown_fields(schemas: Mapping[str, Any], name: str, value: Mapping[str, Any]) -> list[str]:
    """Names in `value` that the schema has not, or not with that type or value."""
    wrong = []
    types = {"string": str, "integer": int, "boolean": bool, "object": dict}
    for key, setting in value.items():
        known = schemas[name]["properties"].get(key)
        if known is None or "Output only" in known.get("description", ""):
            wrong.append(f"{name}.{key}")
        elif "$ref" in known:
            wrong += unknown_fields(schemas, known["$ref"], setting)
        elif not isinstance(setting, types[known["type"]]) or setting not in known.get("enum", [setting]):
            wrong.append(f"{name}.{key}={setting!r}")
    return wrong


@dataclass
class GcpCloud:
    """`refuse`: path's beginning to what it is answered with; `quotas`: of every region, (metric, limit, usage)."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    quotas: list[tuple[str, float, float]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    refuse: dict[str, Reply] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """What was asked for and does not exist at Google."""
    url: str = ""

    def account(self) -> GcpAccount:
        return GcpAccount(AnonymousCredentials(), PROJECT, endpoint=self.url)  # type: ignore[no-untyped-call]

    def start(self, name: str, lease: str = LEASE, *, zone: str = ZONE, account: str = ACCOUNT) -> str:
        """A machine as SkyPilot starts it; its number."""
        number = str(7_000_000_000 + len(self.instances))
        self.instances[number] = {
            "id": number,
            "name": name,
            "zone": f"https://www.googleapis.com/compute/v1/projects/{PROJECT}/zones/{zone}",
            "status": "RUNNING",
            "labels": {"slm-lease": lease},
            "serviceAccounts": [{"email": account}] if account else [],
        }
        return number

    def preempt(self, number: str) -> None:
        """As GCP does it to a spot machine: stopped, not gone."""
        self.instances[number]["status"] = "TERMINATED"
        self.preempted.append(number)

    def pass_time(self, seconds: float) -> None:
        """Minute by minute, with what the jobs do in each."""
        end = self.now + timedelta(seconds=seconds)
        minute = self.now.replace(second=0) + timedelta(minutes=1)
        while minute <= end:
            for job in self.jobs.values():
                if job["state"] == "ENABLED" and minute == next_time(job["schedule"], minute - timedelta(minutes=1)):
                    self.act(job)
            minute += timedelta(minutes=1)
        self.now = end

    def act(self, job: Mapping[str, Any]) -> None:
        target = job["httpTarget"]
        assert target["oauthToken"]["serviceAccountEmail"] == ACCOUNT
        found = re.fullmatch(r"https://compute.googleapis.com/compute/v1/(.*)/instances/(\d+)", target["uri"])
        assert found is not None, target
        assert target["httpMethod"] == "DELETE"
        self.instances.pop(found[2], None)

    # -- what it answers ---------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: Mapping[str, str], body: dict[str, Any]) -> Reply:
        for start, reply in self.refuse.items():
            if path.startswith(start):
                return reply
        if path.startswith(JOBS):
            return self._job(method, path, query, body)
        if path == f"{COMPUTE}/aggregated/instances":
            wanted = re.fullmatch(r'labels\.slm-lease="([^"]*)"', query["filter"])
            assert wanted is not None, query
            found = [instance for instance in self.instances.values() if instance["labels"]["slm-lease"] == wanted[1]]
            # A page for each zone, as a large project is answered.
            zones = sorted({instance["zone"].rsplit("/", 1)[-1] for instance in self.instances.values()}) or [ZONE]
            at = int(query.get("pageToken", 0))
            there = [entry for entry in found if entry["zone"].endswith(f"/{zones[at]}")]
            items = {f"zones/{zones[at]}": {"instances": there}, "zones/elsewhere": {"warning": {"code": "NO_RESULTS"}}}
            more = {"nextPageToken": str(at + 1)} if at + 1 < len(zones) else {}
            return 200, {"items": items, **more}
        if path.startswith(f"{COMPUTE}/zones/") and path.endswith("/operations"):
            wanted = re.fullmatch(
                r'\(operationType="compute.instances.preempted"\) AND \(targetId=(\d+)\)', query["filter"]
            )
            assert wanted is not None, query
            return 200, {"items": [{"targetId": wanted[1]}] if wanted[1] in self.preempted else []}
        if path.startswith(f"{COMPUTE}/regions/"):
            return 200, {"quotas": [{"metric": name, "limit": most, "usage": used} for name, most, used in self.quotas]}
        return 404, refused(404, f"no such thing: {path}")

    def _job(self, method: str, path: str, query: Mapping[str, str], body: dict[str, Any]) -> Reply:
        self.wrong += unknown_fields(SCHEDULER["schemas"], "Job", {k: v for k, v in body.items() if k != "name"})
        if path == JOBS and method == "POST":
            name = body["name"]
            if name in self.jobs:
                return 409, refused(409, "exists")
            self.jobs[name] = {**body, "state": "ENABLED"}
            return 200, self._told(name)
        if path == JOBS:
            return 200, {"jobs": [self._told(name) for name in sorted(self.jobs)]}
        name, _, verb = path.removeprefix("/v1/").partition(":")
        if name not in self.jobs:
            return 404, refused(404, "Job not found.")
        if method == "DELETE":
            self.jobs.pop(name)
            return 200, {}
        if verb == "resume":
            self.jobs[name]["state"] = "ENABLED"
        else:
            fields = query["updateMask"].split(",")
            self.wrong += [
                each_field for each_field in fields if each_field not in SCHEDULER["schemas"]["Job"]["properties"]
            ]
            self.jobs[name].update({each_field: body[each_field] for each_field in fields})
        return 200, self._told(name)

    def _told(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        return {**job, "scheduleTime": f"{next_time(job['schedule'], self.now):%Y-%m-%dT%H:%M:%SZ}"}


SCHEDULER = described("cloudscheduler")


def next_time(schedule: str, after: datetime) -> datetime:
    """When a schedule of minute, hour, day and month acts next."""
    minute, hour, day, month = (int(item) for item in schedule.split()[:4])
    assert schedule.split()[4:] == ["*"]
    found = datetime(after.year, month, day, hour, minute, tzinfo=UTC)
    return found if found > after else found.replace(year=after.year + 1)


def refused(status: int, message: str, reason: str = "") -> dict[str, Any]:
    """An error as Google's services write it (google.rpc.Status)."""
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}] if reason else []
    return {"error": {"code": status, "message": message, "details": details}}


@contextmanager
def gcp_cloud() -> Iterator[GcpCloud]:
    """A project behind a real port."""
    cloud = GcpCloud()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            status, said = cloud.answer(self.command, unquote(parts.path), query, body)
            content = json.dumps(said).encode()
            self.send_response_only(status)
            self.send_header("Date", format_datetime(cloud.now, usegmt=True))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cloud.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)

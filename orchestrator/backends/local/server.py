"""The market's process: HTTP on the loop-back interface with a token, and the turns of the cloud in between.

It holds a lock for as long as it lives, so that a run has one market; it ends by itself when it has had no node for a
while. After a SIGKILL, the next market continues from its folder.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from cost.errors import SlmError
from orchestrator.backends.local.market import Cloud, Refused
from orchestrator.backends.local.spawn import HOST, Order
from tasks.guard.files import hold_lock, write_json
from tasks.guard.processes import start_time

ADDRESS_FILE = "address.json"
LOCK_FILE = "market.lock"
IDLE_SECONDS = 3.0
GIVE_UP_SECONDS = 30.0
"""An idle market whose folder cannot be written to ends after this time anyway."""
TURN_SECONDS = 0.2
BUSY_TURN_SECONDS = 0.05
LOCK_SECONDS = 3.0
END_SECONDS = 15.0
"""How long a request waits for nodes to be gone."""


class Server(ThreadingHTTPServer):
    """Answers for one cloud; `closing` is set when no further request will be served."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, cloud: Cloud, port: int) -> None:
        super().__init__((HOST, port), Handler)
        self.cloud = cloud
        self.token = secrets.token_hex(16)
        self.changed = threading.Condition()
        self.last_request = time.monotonic()
        self.closing = False

    def call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """One request of a client."""
        with self.changed:
            if self.closing:
                raise Refused("closing", "the market is just ending")
            self.last_request = time.monotonic()
            cloud = self.cloud
            match name:
                case "start":
                    order = Order(**request)
                    self._wait_for_end(order.lease_id, ending_only=True)
                    return {"started": cloud.start(order)}
                case "poll":
                    return {"nodes": cloud.describe(request["lease_id"])}
                case "extend":
                    cloud.extend(request["lease_id"], request["seconds"])
                case "stop":
                    cloud.stop(request["lease_id"])
                    self._wait_for_end(request["lease_id"], ending_only=False)
                    return {"left": [node.instance_id for node in cloud.there(request["lease_id"])]}
                case "list":
                    return {"nodes": [asdict(node) for node in cloud.there()]}
                case _:
                    raise Refused("error", f"the market knows no request {name!r}")
            return {}

    def _wait_for_end(self, lease_id: str, *, ending_only: bool) -> None:
        """Until nothing of a lease is left, or nothing that is ending; turns continue meanwhile."""
        states = ("stopping", "ending") if ending_only else ("starting", "alive", "stopping", "ending")
        self.changed.wait_for(
            lambda: not any(node.state in states for node in self.cloud.there(lease_id)), timeout=END_SECONDS
        )

    def turns(self) -> None:
        """Work until there has been nothing to do for a while."""
        while True:
            with self.changed:
                self.cloud.turn()
                self.changed.notify_all()
                idle = time.monotonic() - self.last_request
                if self.cloud.there():
                    self.last_request = time.monotonic()
                elif idle > (IDLE_SECONDS if self.cloud.is_written else GIVE_UP_SECONDS):
                    self.closing = True
                    return
                pause = BUSY_TURN_SECONDS if self.cloud.is_ending else TURN_SECONDS
            time.sleep(pause)


class Handler(BaseHTTPRequestHandler):
    """POST /NAME for clients, who show the token; GET /metadata/INSTANCE/preemption for the guards."""

    server: Server
    timeout: ClassVar[float] = 30.0

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        seconds = None
        if len(parts) == 3 and (parts[0], parts[2]) == ("metadata", "preemption"):
            with self.server.changed:
                seconds = self.server.cloud.notice_seconds(parts[1])
        if seconds is None:
            self._reply(404, {"error": "none"})
        else:
            self._reply(200, {"seconds": seconds})

    def do_POST(self) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {self.server.token}"):
            self._reply(403, {"error": "token"})
            return
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self._reply(200, self.server.call(self.path.strip("/"), json.loads(body)))
        except Refused as error:
            self._reply(409, {"error": error.kind, "message": str(error)})
        except SlmError as error:
            self._reply(409, {"error": "error", "message": str(error)})
        except Exception as error:
            self._reply(409, {"error": "error", "message": f"a bug in the local cloud: {error!r}"})
            raise  # to the log, with its place

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the events are."""

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        with suppress(OSError):  # the client was killed meanwhile
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def serve(folder: Path) -> int:
    """Be the market of `folder` until it is idle; 0 at once when another already is."""
    if not _lock(folder):
        return 0
    cloud = Cloud(folder)
    try:
        server = Server(cloud, cloud.port)  # guards know the address of the market before this one
    except OSError:
        server = Server(cloud, 0)
    cloud.listen(server.server_port)
    address = folder / ADDRESS_FILE
    me = {"pid": os.getpid(), "start": start_time(os.getpid())}
    write_json(str(address), {"port": server.server_port, "token": server.token, **me})
    address.chmod(0o600)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.turns()
    address.unlink(missing_ok=True)
    server.server_close()
    return 0


def _lock(folder: Path) -> bool:
    until = time.monotonic() + LOCK_SECONDS
    while hold_lock(str(folder / LOCK_FILE)) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True

"""A real S3 server on this machine (moto's), and a proxy before it that breaks what a network and S3 break."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

START_SECONDS = 60.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "expect", "keep-alive")
BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def s3_server(smallest_part_bytes: int = 5 * 2**20) -> Iterator[str]:
    """Its endpoint URL; one bucket called BUCKET is there. Ends with the block, or with this process.

    `smallest_part_bytes` is what it accepts as a part of a multipart upload that is not the last.
    """
    port = free_port()
    watch = "import os, threading, sys; threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()"
    serve = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    command = [sys.executable, "-c", f"{watch}\n{serve}"]
    quiet = subprocess.DEVNULL
    environment = {**os.environ, **CREDENTIALS, "S3_UPLOAD_PART_MIN_SIZE": str(smallest_part_bytes)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _await(port, server)
        urlopen(Request(f"{url}/{BUCKET}", method="PUT"), timeout=30).close()
        yield url
    finally:
        server.kill()
        server.wait(timeout=10)


def _await(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "moto's server has ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)


@dataclass(frozen=True)
class Asked:
    """One request as the proxy sees it; `number` counts from 0."""

    number: int
    method: str
    path: str

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type" in parse_qs(urlsplit(self.path).query)


Decide = Callable[[Asked], str | None]
"""Which fault a request meets:

error        500, and no effect
slow         the effect at once, the reply after `slow_seconds`
lost         the effect, and a closed connection instead of a reply
cut          half of the reply's body, then a closed connection
cut_request  half of the request's body is read, then a closed connection; no effect
stale        what the same list said before the newest change
"""


def no_fault(asked: Asked) -> str | None:
    return None


def at_random(seed: int, rates: Mapping[str, float]) -> Decide:
    """Each request meets each fault with its rate, the same for the same seed and order of requests."""
    rng = random.Random(seed)
    lock = threading.Lock()

    def decide(asked: Asked) -> str | None:
        with lock:
            drawn = rng.random()
        for fault, rate in rates.items():
            if drawn < rate:
                return fault if fault != "stale" or asked.is_list else None
            drawn -= rate
        return None

    return decide


class FaultProxy:
    """Between a client and an S3 server, in threads of this process."""

    def __init__(self, upstream_url: str, decide: Decide = no_fault, *, slow_seconds: float = 0.5) -> None:
        self.decide = decide
        self.slow_seconds = slow_seconds
        self.met: dict[str, int] = {}
        """How often each fault was met."""
        self.answers: dict[str, tuple[int, bytes]] = {}
        """By method: what to say instead of asking the server."""
        self.refuse_conditions = False
        """As servers do that know no If-None-Match."""
        self._upstream = urlsplit(upstream_url).netloc
        self._count = 0
        self._lock = threading.Lock()
        self._lists: dict[str, list[bytes]] = {}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                proxy.serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that was killed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            asked = Asked(self._count, handler.command, handler.path)
            self._count += 1
        fault = self.decide(asked)
        if fault is not None:
            with self._lock:
                self.met[fault] = self.met.get(fault, 0) + 1
        length = int(handler.headers.get("Content-Length") or 0)
        if fault == "cut_request":
            handler.rfile.read(length // 2)
            self._hang_up(handler)
            return
        body = _body(handler, length)
        if self.refuse_conditions and handler.headers.get("If-None-Match"):
            self._reply(handler, 501, {}, b"<Error><Code>NotImplemented</Code></Error>")
            return
        if handler.command in self.answers:
            status, content = self.answers[handler.command]
            self._reply(handler, status, {}, content)
            return
        if fault == "error":
            self._reply(handler, 500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        status, headers, content = self._forward(handler, body)
        if asked.is_list:
            with self._lock:
                known = self._lists.setdefault(asked.path, [])
                if not known or known[-1] != content:
                    known.append(content)
                if fault == "stale" and len(known) > 1:
                    content = known[-2]
        if fault == "slow":
            time.sleep(self.slow_seconds)
        if fault == "lost":
            self._hang_up(handler)
            return
        self._reply(handler, status, headers, content, cut=fault == "cut")

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP_HEADERS}
        connection = HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(handler.command, handler.path, body, {**headers, "Content-Length": str(len(body))})
            reply: HTTPResponse = connection.getresponse()
            content = reply.read()
            kept = {name: value for name, value in reply.getheaders() if name.lower() not in HOP_HEADERS}
            if handler.command == "HEAD":
                kept["Content-Length"] = reply.getheader("Content-Length") or "0"
            return reply.status, kept, content
        finally:
            connection.close()

    def _reply(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        *,
        cut: bool = False,
    ) -> None:
        handler.send_response_only(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if handler.command != "HEAD":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up(handler)

    def _hang_up(self, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.flush()
        handler.close_connection = True
        with suppress(OSError):
            handler.connection.shutdown(socket.SHUT_RDWR)


def _body(handler: BaseHTTPRequestHandler, length: int) -> bytes:
    if "chunked" not in (handler.headers.get("Transfer-Encoding") or ""):
        return handler.rfile.read(length)
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(chunks)

"""A real HTTP server that speaks as much of a cloud's API as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


Answer = str | dict[str, Any] | tuple[int, str] | tuple[int, str, dict[str, str]]
Route = Answer | Callable[[Asked], Answer]


@dataclass
class Server:
    """`routes` maps "METHOD /path" to what is answered; anything else is 404."""

    url: str
    routes: dict[str, Route]
    asked: list[Asked] = field(default_factory=list)

    def seen(self, method: str, path: str) -> list[Asked]:
        return [finding for finding in self.asked if (finding.method, finding.path) == (method, path)]


@contextmanager
def small_server(routes: dict[str, Route]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.command, url.path, parse_qs(url.query), headers, body)
            server.asked.append(asked)
            found = server.routes.get(f"{asked.method} {asked.path}", (404, "not found"))
            value = found(asked) if callable(found) else found
            status, text, more = (*value, {})[:3] if isinstance(value, tuple) else (200, value, {})
            content = (text if isinstance(text, str) else json.dumps(text)).encode()
            self.send_response(status)
            for name, header in more.items():
                self.send_header(name, header)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = Server(f"http://127.0.0.1:{http.server_port}", routes)
        Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def aws_metadata(more: dict[str, Route]) -> dict[str, Route]:
    """IMDSv2: nothing without a token, and a token only for a PUT that names its time to live."""

    def token(asked: Asked) -> Answer:
        return "a-token" if asked.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdigit() else (400, "no ttl")

    def behind_token(route: Route) -> Route:
        def answer(asked: Asked) -> Answer:
            if asked.headers.get("x-aws-ec2-metadata-token") != "a-token":
                return (401, "Unauthorized")
            return route(asked) if callable(route) else route

        return answer

    guarded: dict[str, Route] = {f"GET /latest/{path}": behind_token(route) for path, route in more.items()}
    return {"PUT /latest/api/token": token, **guarded}


def gcp_metadata(more: dict[str, Route]) -> dict[str, Route]:
    """Nothing without the header that no browser sends."""
    return {
        f"GET /computeMetadata/v1/{path}": _with_header("metadata-flavor", "Google", route)
        for path, route in more.items()
    }


def azure_metadata(more: dict[str, Route]) -> dict[str, Route]:
    return {f"GET /metadata/{path}": _with_header("metadata", "true", route) for path, route in more.items()}


def _with_header(name: str, value: str, route: Route) -> Route:
    def answer(asked: Asked) -> Answer:
        if asked.headers.get(name) != value:
            return (403, f"needs {name}: {value}")
        return route(asked) if callable(route) else route

    return answer

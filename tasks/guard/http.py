"""HTTP requests as plain values, built by pure functions elsewhere, and the one function that sends them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Mapping
from urllib.parse import urlsplit

HTTP_SECONDS = 10.0
"""How long a request may take."""


@dataclass(frozen=True)
class Request:
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def checked(self) -> Reply:
        """Itself, or an OSError with what the other side said."""
        if 200 <= self.status < 300:
            return self
        raise OSError(f"HTTP {self.status}: {' '.join(self.body.decode(errors='replace').split())[:300]}")

    def json(self) -> Any:
        return json.loads(self.checked().body)


def call(request: Request, timeout: float = HTTP_SECONDS) -> Reply:
    """Send a request as it stands: no proxy, no redirect, no header but Host and lengths.

    The names of the reply's headers are lower-case.
    """
    import http.client  # takes twice as long as all other imports together, and a node's first seconds are billed

    url = urlsplit(request.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=timeout)
    try:
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request(request.method, target, body=request.body or None, headers=dict(request.headers))
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error!r}") from error
    finally:
        connection.close()


def http_moment(date: str) -> float:
    """The Unix time of a date as HTTP and Azure write it."""
    import email.utils

    return email.utils.parsedate_to_datetime(date).timestamp()

"""The lab's nodes have no way out but this: an HTTP proxy on the bridge, for package registries (CONNECT and GET).

Nodes of real clouds reach a registry by themselves; namespaces without address translation do not. `pip` and `uv` on
the nodes are told of it by the lab, nothing else is.
"""

from __future__ import annotations

import select
import socket
import socketserver
import sys
from contextlib import closing
from urllib.parse import urlsplit

IDLE_SECONDS = 120.0
CHUNK_BYTES = 65536
HEAD_BYTES = 65536


class Tunnel(socketserver.BaseRequestHandler):
    """One client's connection to one host."""

    request: socket.socket

    def handle(self) -> None:
        head, rest = self._head()
        if not head:
            return
        method, target, version = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            greeting, opening = b"HTTP/1.1 200 Connection established\r\n\r\n", rest
        else:
            url = urlsplit(target)
            host, port = url.hostname or "", str(url.port or 80)
            path = url.path + (f"?{url.query}" if url.query else "")
            greeting = b""
            opening = f"{method} {path or '/'} {version}\r\n".encode("latin-1") + head.split(b"\r\n", 1)[1] + rest
        try:
            upstream = socket.create_connection((host.strip("[]"), int(port)), timeout=30)
        except OSError:
            self.request.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        with closing(upstream):
            self.request.sendall(greeting)
            upstream.sendall(opening)
            pump(self.request, upstream)

    def _head(self) -> tuple[bytes, bytes]:
        """The request's lines with their last line break, and what came after the empty line."""
        read = b""
        while b"\r\n\r\n" not in read and len(read) < HEAD_BYTES:
            chunk = self.request.recv(CHUNK_BYTES)
            if not chunk:
                return b"", b""
            read += chunk
        head, _, rest = read.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n", rest


def pump(each_socket: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until one side closes or both are silent."""
    while True:
        ready, _, _ = select.select([each_socket, other], [], [], IDLE_SECONDS)
        if not ready:
            return
        for source in ready:
            data = source.recv(CHUNK_BYTES)
            if not data:
                return
            (other if source is each_socket else each_socket).sendall(data)


class Proxy(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no event."""


if __name__ == "__main__":
    with Proxy((sys.argv[1], int(sys.argv[2])), Tunnel) as proxy:
        proxy.serve_forever()

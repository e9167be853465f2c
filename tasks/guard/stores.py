"""The run store as the guard reaches it: its keys, and a folder, a bucket or presigned URLs.

A store may hang, so only threads use it. Tests hold the keys to `tasks.run_store_keys` and the envelope to
`trainer.run_store.envelope`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from typing import Any, Dict, Optional
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from .credentials import Aws, Metadata
from .files import write_json
from .http import Reply, Request, call, http_moment
from .signing import signed

ENVELOPE = {"schema": 1, "writer": "guard", "tag": ""}
"""Fields of every record that the guard writes; those of a grant are read past."""


def request_key(lease: str, rank: int) -> str:
    """The newest numbered request of a node."""
    return f"{log_folder(lease, rank)}/request.json"


def grant_key(lease: str, rank: int) -> str:
    """The supervisor's newest answer to it."""
    return f"grants/{lease}/{rank}.json"


def log_folder(lease: str, rank: int) -> str:
    """Where the guard's log goes."""
    return f"guard/{lease}/{rank}"


class DirectoryStore:
    """A folder. A root that has vanished is an error and is never created again."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, key: str) -> Optional[bytes]:
        try:
            with open(os.path.join(self.root, key), "rb") as file:
                return file.read()
        except FileNotFoundError:
            if not os.path.isdir(self.root):
                raise
            return None

    def write(self, key: str, value: object) -> None:
        write_json(self._place(key), value)

    def append(self, folder: str, lines: str) -> None:
        """Add lines to `log.jsonl` in a folder of the store."""
        with open(self._place(f"{folder}/log.jsonl"), "a") as file:
            file.write(lines)

    def _place(self, key: str) -> str:
        folder = self.root
        for part in key.split("/")[:-1]:
            folder = os.path.join(folder, part)
            if not os.path.isdir(folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)
        return os.path.join(self.root, key)


class S3Store:
    """`s3://bucket/prefix?endpoint_url=URL`: the object of a key is prefix/key. Needs no client library.

    The endpoint is the option, else the URI's, else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS itself.
    """

    def __init__(self, uri: str, aws: Aws, endpoint: str = "", path_style: bool = False) -> None:
        parts = urlsplit(uri)
        self.bucket, self.prefix, self.aws = parts.netloc, unquote(parts.path).strip("/"), aws
        named = [endpoint, dict(parse_qsl(parts.query)).get("endpoint_url")]
        named += [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
        self.endpoint = next((url for url in named if url), "")
        self.path_style = path_style or bool(self.endpoint) or "." in self.bucket
        self.skew = 0.0
        self.part = 0

    def url(self, key: str, region: str) -> str:
        place = quote("/".join(part for part in (self.prefix, key) if part), safe="/-_.~")
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        base = self.endpoint.rstrip("/") or f"https://s3.{region}.{domain}"
        if self.path_style:
            return f"{base}/{self.bucket}/{place}"
        return f"{base.replace('://', f'://{self.bucket}.', 1)}/{place}"

    def read(self, key: str) -> Optional[bytes]:
        reply = self.send("GET", key)
        if reply.status == 404 and b"NoSuchBucket" in reply.body:
            reply.checked()
        # Without the right to list a bucket, a missing object is a 403. A missing right to write shows in `write`.
        return None if reply.status in (403, 404) else reply.checked().body

    def write(self, key: str, value: object) -> None:
        self.send("PUT", key, json.dumps(value).encode()).checked()

    def append(self, folder: str, lines: str) -> None:
        """Objects cannot grow: each call writes a part of its own, with names that sort in the order of writing."""
        self.part = max(self.part + 1, int(time.time() * 1000))
        self.send("PUT", f"{folder}/log/{self.part:015d}.jsonl", lines.encode()).checked()

    def send(self, method: str, key: str, body: bytes = b"") -> Reply:
        """One signed request for an object; the reply is not checked."""
        region = self.aws.region()
        request = Request(method, self.url(key, region), {"content-type": "application/json"} if body else {}, body)
        reply = self._signed(request, region)
        if reply.status == 403 and b"RequestTimeTooSkewed" in reply.body and "date" in reply.headers:
            self.skew = http_moment(reply.headers["date"]) - time.time()  # the node's wall clock is wrong
            reply = self._signed(request, region)
        return reply

    def _signed(self, request: Request, region: str) -> Reply:
        return call(signed(request, self.aws.credentials(), region, "s3", time.time() + self.skew))


class PresignedStore:
    """A JSON file {"get": {key: url}, "put": {key: url}}, read again each time: URLs expire and are replaced.

    The log is one object, `log.jsonl`, written as a whole each time.
    """

    def __init__(self, path: str) -> None:
        self.path, self.log = path, ""

    def read(self, key: str) -> Optional[bytes]:
        url = self._urls("get").get(key)
        if url is None:
            return None
        reply = call(Request("GET", url, {}))
        return None if reply.status == 404 else reply.checked().body

    def write(self, key: str, value: object) -> None:
        self._put(key, json.dumps(value).encode())

    def append(self, folder: str, lines: str) -> None:
        key = f"{folder}/log.jsonl"
        if not self.log:
            self.log = (self.read(key) or b"").decode()
        self._put(key, (self.log + lines).encode())
        self.log += lines

    def _put(self, key: str, body: bytes) -> None:
        url = self._urls("put").get(key)
        if url is None:
            raise OSError(f"{self.path} has no URL to put {key}")
        call(Request("PUT", url, {}, body)).checked()

    def _urls(self, verb: str) -> Dict[str, str]:
        with open(self.path) as file:
            return dict(json.load(file).get(verb, {}))


def open_store(options: argparse.Namespace) -> Any:
    """The store that the options name; without one, a folder on the node that is reached by ssh."""
    if options.store.startswith("s3://"):
        aws = Aws(Metadata(options.metadata_base), options.credentials, options.region)
        return S3Store(options.store, aws, options.endpoint_url, options.path_style)
    if options.store.startswith("presigned:"):
        return PresignedStore(options.store[len("presigned:") :])
    if not options.store:
        os.makedirs(os.path.join(options.node_dir, "store"), exist_ok=True)
        return DirectoryStore(os.path.join(options.node_dir, "store"))
    is_uri = options.store.startswith("file:")
    return DirectoryStore(unquote(urlsplit(options.store).path) if is_uri else options.store)

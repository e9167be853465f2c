"""A run store on S3, or on anything that speaks its protocol: `s3://bucket/prefix`.

The endpoint is `?endpoint_url=https://host` of the URI, else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS itself;
`uri` always says it, so that a node needs no more than the URI and credentials. Credentials come from where AWS's own
tools find them. Invariants as in trainer.run_store.base; in addition every reply may be lost, late or cut off: a
request is repeated until it is known to have had its effect once. boto3 is imported only when a store is opened.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from cost.errors import UserError
from tasks.stores.s3_client import Patience as Patience
from tasks.stores.s3_client import endpoint_of_environment, make_client
from tasks.stores.s3_errors import Refusal, refusal_of
from trainer.run_store.base import Bytes, StoreError, StoreKeyMissing, checked_key, is_unconditional

MARKER = ".slm-store"
"""Says that a store was opened here, so that an emptied prefix is not taken for a run that has not begun."""
SMALLEST_PART_BYTES = 16 * 2**20
MOST_PARTS = 9000
"""Of one multipart upload; S3 allows 10,000."""
PARALLEL_REQUESTS = 8
STALE_UPLOAD_AGE = timedelta(days=1)
"""A multipart upload that began so long ago belongs to a process that was killed; its parts cost money."""

T = TypeVar("T")
Sent = dict[str, Any]
"""What S3 wants back of each part, to make one value of them."""


class Garbled(Exception):
    """What arrived is not what was stored."""


class S3Store:
    """A prefix of a bucket as a store. Safe to use from several threads."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        create: bool = True,
        conditional: bool = True,
        patience: Patience | None = None,
    ) -> None:
        self.bucket = bucket
        self.conditional = conditional
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._patience = patience or Patience()
        endpoint = endpoint_url or endpoint_of_environment()
        query = {"endpoint_url": endpoint} if endpoint else {}
        query |= {} if conditional else {"conditional_writes": "no"}
        self.uri = f"s3://{bucket}/{quote(self._prefix.rstrip('/'))}" + (f"?{urlencode(query)}" if query else "")
        self._client = make_client(endpoint, self._patience)
        self._swept = False
        self._open(create)

    @classmethod
    def from_uri(cls, uri: str, *, create: bool = True, patience: Patience | None = None) -> S3Store:
        """Raises UserError when it names no bucket, or asks for something unknown."""
        parts = urlsplit(uri)
        query = parse_qs(parts.query)
        unknown = sorted(query.keys() - {"endpoint_url", "conditional_writes"})
        if not parts.netloc or unknown:
            wrong = f"has an unknown {unknown[0]}" if unknown else "names no bucket"
            raise UserError(
                f"{uri} {wrong}; write s3://bucket/prefix, or s3://bucket/prefix?endpoint_url=https://host."
            )
        prefix = unquote(parts.path).strip("/")
        if prefix:
            checked_key(prefix)
        return cls(
            parts.netloc,
            prefix,
            endpoint_url=query.get("endpoint_url", [None])[0],
            create=create,
            conditional=not is_unconditional(parts.query),
            patience=patience,
        )

    # -- the contract ----------------------------------------------------------------------------

    def read(self, key: str) -> bytes:
        def attempt() -> bytes:
            reply = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            content: bytes = reply["Body"].read()
            _check(content, reply["Metadata"])
            return content

        return self._persist("read", key, attempt)

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        if num_bytes <= 0:
            return b""
        span = f"bytes={offset}-{offset + num_bytes - 1}"

        def attempt() -> bytes:
            reply = self._client.get_object(Bucket=self.bucket, Key=self._name(key), Range=span)
            content: bytes = reply["Body"].read()
            return content

        try:
            return self._persist("read", key, attempt)
        except _BeyondTheEnd:
            return b""

    def write(self, key: str, data: bytes) -> None:
        self._persist("write", key, lambda: self._put(key, data))

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        """Without a checksum of the whole: who writes in pieces has one of each. Transport has its own."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        self._write_large(key, sum(map(len, views)), lambda begin, end: _slice(views, begin, end), {})

    def create(self, key: str, data: bytes) -> bool:
        if not self.conditional:
            if self._head(key) is not None:
                return False
            self.write(key, data)
            return True
        nonce = secrets.token_hex(16)

        def attempt() -> bool:
            self._put(key, data, IfNoneMatch="*", nonce=nonce)
            return True

        try:
            return self._persist("create", key, attempt)
        except _Taken:
            # By another, or by an earlier attempt of ours whose reply was lost.
            head = self._head(key)
            return head is not None and head["Metadata"].get("nonce") == nonce
        except StoreError:
            head = self._head(key)
            if head is not None and head["Metadata"].get("nonce") == nonce:
                return True
            raise

    def list(self, prefix: str = "") -> list[str]:
        keys: list[str] = []
        request = {"Bucket": self.bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._persist("list", prefix, lambda: self._client.list_objects_v2(**request))
            keys += [entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                break
            request["ContinuationToken"] = page["NextContinuationToken"]
        if not keys:
            self._require_marker()
        return sorted(key for key in keys if not any(part.startswith(".") or not part for part in key.split("/")))

    def delete(self, key: str) -> None:
        self._persist("delete", key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._name(key)))

    def upload(self, key: str, source: Path) -> None:
        num_bytes = source.stat().st_size
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()

        def content(begin: int, end: int) -> bytes:
            with source.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)

        self._write_large(key, num_bytes, content, {"sha256": digest})

    def download(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            self._persist("read", key, lambda: self._download(key, partial))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    # -- requests --------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _put(self, key: str, data: Bytes, *, nonce: str | None = None, **options: Any) -> None:
        metadata = {"sha256": hashlib.sha256(data).hexdigest()} | ({"nonce": nonce} if nonce else {})
        self._client.put_object(Bucket=self.bucket, Key=self._name(key), Body=bytes(data), Metadata=metadata, **options)

    def _head(self, key: str) -> dict[str, Any] | None:
        """What is known of a key; None when there is none."""
        action, name = ("open", "") if key == MARKER else ("read", key)
        try:
            found: dict[str, Any] = self._persist(action, name, lambda: self._asked(self._prefix + key))
        except StoreKeyMissing:
            return None
        return found

    def _asked(self, name: str) -> dict[str, Any]:
        """The reply to HEAD; a refusal of it has no body that says why, so a GET is refused in its place."""
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = self._client.head_object(Bucket=self.bucket, Key=name)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403):
                self._client.get_object(Bucket=self.bucket, Key=name)["Body"].close()
            raise
        return found

    def _write_large(
        self, key: str, num_bytes: int, content: Callable[[int, int], bytes], metadata: dict[str, str]
    ) -> None:
        """One value of any size, in parts that go at the same time; it appears whole or not at all."""
        part_bytes = max(SMALLEST_PART_BYTES, -(-num_bytes // MOST_PARTS))
        if num_bytes <= part_bytes:
            self.write(key, content(0, num_bytes))
            return
        self._sweep()
        name, nonce = self._name(key), secrets.token_hex(16)
        place = {"Bucket": self.bucket, "Key": name}
        metadata = {**metadata, "nonce": nonce}
        begun = self._persist("write", key, lambda: self._client.create_multipart_upload(**place, Metadata=metadata))
        upload = {**place, "UploadId": begun["UploadId"]}

        def send(begin: int) -> Sent:
            body = content(begin, min(begin + part_bytes, num_bytes))
            number = begin // part_bytes + 1
            sent = self._persist(
                "write", key, lambda: self._client.upload_part(**upload, PartNumber=number, Body=io.BytesIO(body))
            )
            kept = {name: sent[name] for name in sent if name == "ETag" or name.startswith("ChecksumC")}
            return {"PartNumber": number, **{name: value for name, value in kept.items() if value}}

        try:
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
                parts = [*pool.map(send, range(0, num_bytes, part_bytes))]
            self._complete(key, upload, parts, nonce)
        except BaseException:
            with suppress(Exception):
                self._client.abort_multipart_upload(**upload)
            raise

    def _complete(self, key: str, upload: dict[str, str], parts: Sequence[Sent], nonce: str) -> None:
        try:
            self._persist(
                "write",
                key,
                lambda: self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}),
            )
        except StoreError:
            # An upload that is gone may have been completed by an attempt of ours whose reply was lost.
            head = self._head(key)
            if head is None or head["Metadata"].get("nonce") != nonce:
                raise

    def _download(self, key: str, partial: Path) -> None:
        head = self._client.head_object(Bucket=self.bucket, Key=self._name(key))
        size, same = head["ContentLength"], {"IfMatch": head["ETag"]}

        def fetch(begin: int) -> None:
            span = f"bytes={begin}-{min(begin + SMALLEST_PART_BYTES, size) - 1}"

            def attempt() -> bytes:
                reply = self._client.get_object(Bucket=self.bucket, Key=self._name(key), Range=span, **same)
                content: bytes = reply["Body"].read()
                return content

            os.pwrite(file.fileno(), self._persist("read", key, attempt), begin)

        with partial.open("w+b") as file:
            file.truncate(size)
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
                for _ in pool.map(fetch, range(0, size, SMALLEST_PART_BYTES)):
                    pass
            file.seek(0)
            _check_digest(hashlib.file_digest(file, "sha256").hexdigest(), head["Metadata"])

    def _open(self, create: bool) -> None:
        if not create:
            self._require_marker()
        elif self._head(MARKER) is None:
            name = self._prefix + MARKER
            self._persist(
                "open", "", lambda: self._client.put_object(Bucket=self.bucket, Key=name, Body=b"slm run store\n")
            )

    def _require_marker(self) -> None:
        if self._head(MARKER) is None:
            raise StoreError(
                f"the run store {self.uri} is gone: nothing is there, not even {MARKER}; correct its name or bring it "
                "back and run the command again (it is not created anew, since an empty store would lose the run)."
            )

    def _sweep(self) -> None:
        """End the multipart uploads that killed processes left; not worth an error."""
        if self._swept:
            return
        self._swept = True
        oldest = datetime.now(UTC) - STALE_UPLOAD_AGE
        with suppress(Exception):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._prefix
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                if upload["Initiated"] < oldest:
                    self._client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def _persist(self, action: str, key: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, repeated while it fails for a passing reason.

        Raises StoreKeyMissing, _Taken, _BeyondTheEnd, or StoreError with the fact and the way out.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        failures = 0
        while True:
            try:
                return attempt()
            except (BotoCoreError, ClientError, Garbled) as error:
                refusal = refusal_of(error)
                failures += 1
                if refusal is Refusal.MISSING and action in ("read", "open"):
                    raise StoreKeyMissing(key, self.uri) from error
                if refusal is Refusal.TAKEN and action == "create":
                    raise _Taken from error
                if refusal is Refusal.BEYOND_THE_END:
                    raise _BeyondTheEnd from error
                if refusal is not Refusal.PASSING or failures >= self._patience.attempts:
                    raise StoreError(self._message(action, key, error, refusal, failures)) from error
                time.sleep(self._patience.wait_seconds(failures))

    def _message(self, action: str, key: str, error: BaseException, refusal: Refusal, failures: int) -> str:
        what = f"{action} {key} in" if key else action
        tries = f" {failures} times" if failures > 1 else ""
        fact, fix = refusal.value
        return f"cannot {what} the run store {self.uri}{tries}: {fact} ({_said(error)}); {fix}"


class _Taken(Exception):
    """A conditional create found the key taken."""


class _BeyondTheEnd(Exception):
    """A range begins where the value has ended."""


def _check(content: bytes, metadata: dict[str, str]) -> None:
    _check_digest(hashlib.sha256(content).hexdigest(), metadata)


def _check_digest(digest: str, metadata: dict[str, str]) -> None:
    """Values of another origin carry no checksum."""
    if digest != metadata.get("sha256", digest):
        raise Garbled(f"its SHA-256 is {digest[:12]} instead of {metadata['sha256'][:12]}")


def _slice(views: Sequence[memoryview], begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of all views as one."""
    return b"".join(_overlaps(views, begin, end))


def _overlaps(views: Sequence[memoryview], begin: int, end: int) -> Iterator[memoryview]:
    at = 0
    for view in views:
        piece = view[max(0, begin - at) : max(0, end - at)]
        if len(piece):
            yield piece
        at += len(view)


def _said(error: BaseException) -> str:
    """Its first line, without the client's own count of repetitions, which are ours."""
    first = re.sub(r" \(reached max retries: \d+\)", "", (str(error).splitlines() or [""])[0])
    return first.strip().rstrip(".")[:300] or type(error).__name__

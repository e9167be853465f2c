"""Run stores on S3: a real server, boto3 as it is, and a proxy that breaks what can break between them."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from cost.errors import UserError
from tasks.stores import s3 as s3_module
from tasks.stores.opening import has_conditional_writes, open_for_training, open_store, probe
from tasks.stores.s3 import Patience, S3Store
from tests.support.s3_server import BUCKET, CREDENTIALS, Asked, FaultProxy, at_random, free_port, s3_server
from tests.support.store_contract import ConditionalStoreContract, Factory
from trainer.run_store.base import DirectoryStore, Store, StoreError, StoreKeyMissing, scoped

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
from faults.storage import MemoryStore

QUICK = Patience(attempts=9, first_wait_seconds=0.001, longest_wait_seconds=0.01, reply_seconds=20)
NAMES = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    made = FaultProxy(server)
    yield made
    made.close()


def fresh() -> str:
    """A prefix that no other test uses."""
    return f"runs/{next(NAMES)}"


def s3(url: str, prefix: str | None = None, **options: Any) -> S3Store:
    return S3Store(BUCKET, prefix or fresh(), endpoint_url=url, patience=options.pop("patience", QUICK), **options)


def client(url: str) -> Any:
    return boto3.client("s3", endpoint_url=url)


class TestS3(ConditionalStoreContract):
    @pytest.fixture(params=["s3", "uri", "whole bucket", "scoped"])
    def factory(self, server: str, request: pytest.FixtureRequest) -> Factory:
        prefix = fresh()
        if request.param == "uri":
            return lambda: open_store(f"s3://{BUCKET}/{prefix}?endpoint_url={server}")
        if request.param == "whole bucket":
            client(server).create_bucket(Bucket=(bucket := prefix.replace("/", "-")))
            return lambda: S3Store(bucket, endpoint_url=server)
        if request.param == "scoped":
            return lambda: scoped(s3(server, prefix), "runs/one")
        return lambda: s3(server, prefix)


class TestS3ThroughFaults(ConditionalStoreContract):
    """The same, while every fourth request fails in one of the ways in which requests fail."""

    @pytest.fixture
    def factory(self, proxy: FaultProxy, request: pytest.FixtureRequest) -> Factory:
        rates = {"error": 0.08, "lost": 0.06, "cut": 0.06, "cut_request": 0.05}
        proxy.decide = at_random(seed=len(request.node.name), rates=rates)
        prefix = fresh()
        return lambda: s3(proxy.url, prefix)


class TestMemory(ConditionalStoreContract):
    @pytest.fixture
    def factory(self) -> Factory:
        store = MemoryStore()
        return lambda: store


# --- replies that are lost, late or cut ---


def nth(fault: str, *numbers: int, method: str = "PUT") -> Any:
    """That fault for the n-th requests of this method from now on."""
    count = itertools.count()
    lock = threading.Lock()

    def decide(asked: Asked) -> str | None:
        with lock:
            return fault if asked.method == method and next(count) in numbers else None

    return decide


def test_a_create_whose_reply_is_lost_still_says_true_to_its_maker(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    proxy.decide = nth("lost", 0)
    assert store.create("incarnations/0.json", b"x")
    assert proxy.met == {"lost": 1}
    assert not store.create("incarnations/0.json", b"x")  # the same content by another caller


def test_a_create_whose_every_reply_is_lost_still_says_true_to_its_maker(proxy: FaultProxy) -> None:
    store = s3(proxy.url, patience=replace(QUICK, attempts=3))
    proxy.decide = nth("lost", *range(100))
    assert store.create("incarnations/0.json", b"x")


def test_a_create_that_comes_late_says_false(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    other = s3(proxy.url, store._prefix)

    def decide(asked: Asked) -> str | None:
        if asked.method != "PUT" or proxy.met:
            return None
        proxy.met["another was first"] = 1
        assert other.create("incarnations/0.json", b"theirs")
        return "error"

    proxy.decide = decide
    assert not store.create("incarnations/0.json", b"mine")
    assert store.read("incarnations/0.json") == b"theirs"


def test_a_reply_that_comes_too_late_is_asked_for_again(proxy: FaultProxy) -> None:
    store = s3(proxy.url, patience=replace(QUICK, reply_seconds=0.2))
    proxy.slow_seconds = 1.0
    proxy.decide = nth("slow", 0)
    assert store.create("k", b"1")
    proxy.decide = nth("slow", 0, method="GET")
    assert store.read("k") == b"1"
    assert proxy.met == {"slow": 2}


def test_a_body_that_is_cut_in_the_middle_is_read_again(proxy: FaultProxy, tmp_path: Path) -> None:
    store = s3(proxy.url)
    content = os.urandom(40_000_000)
    store.write_pieces("k", [content])
    for read in (
        lambda: store.read("k"),
        lambda: store.read_range("k", 0, len(content)),
        lambda: (store.download("k", tmp_path / "k"), (tmp_path / "k").read_bytes())[1],
    ):
        proxy.decide = nth("cut", 0, method="GET")
        assert read() == content
    assert proxy.met == {"cut": 3}


def test_an_upload_completed_by_a_request_whose_reply_was_lost_is_complete(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    content = os.urandom(40_000_000)
    proxy.decide = nth("lost", 1, method="POST")  # the first begins the upload, the second completes it
    store.write_pieces("k", [content])
    assert proxy.met == {"lost": 1}
    assert store.read("k") == content


def test_an_upload_that_fails_leaves_nothing_that_costs_money(proxy: FaultProxy, server: str) -> None:
    store = s3(proxy.url, patience=replace(QUICK, attempts=2))
    store.write("k", b"old")
    proxy.decide = lambda asked: "error" if "partNumber" in asked.path else None
    with pytest.raises(StoreError, match=r"cannot write k in the run store s3://\S+ 2 times: it does not answer"):
        store.write_pieces("k", [bytes(40_000_000)])
    assert store.read("k") == b"old"
    uploads = client(server).list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [upload for upload in uploads if upload["Key"].startswith(store._prefix)] == []


def test_uploads_that_killed_processes_left_are_ended_and_those_that_go_on_are_not(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3(server)
    left = client(server).create_multipart_upload(Bucket=BUCKET, Key=store._prefix + "left")["UploadId"]

    def uploads() -> list[str]:
        return [each["UploadId"] for each in client(server).list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    # This server says of every upload that it began in 2010.
    monkeypatch.setattr(s3_module, "STALE_UPLOAD_AGE", timedelta(days=365 * 200))
    store.write_pieces("k", [bytes(40_000_000)])
    assert left in uploads()
    monkeypatch.setattr(s3_module, "STALE_UPLOAD_AGE", timedelta(days=1))
    s3(server, store._prefix).write_pieces("k", [bytes(40_000_000)])
    assert left not in uploads()


def test_a_value_that_was_changed_in_the_bucket_is_not_returned(server: str) -> None:
    store = s3(server, patience=replace(QUICK, attempts=2))
    store.write("k", b"right")
    metadata = client(server).head_object(Bucket=BUCKET, Key=store._prefix + "k")["Metadata"]
    client(server).put_object(Bucket=BUCKET, Key=store._prefix + "k", Body=b"wrong", Metadata=metadata)
    with pytest.raises(StoreError, match=r"cannot read k .* 2 times: it does not answer as it should \(its SHA-256 is"):
        store.read("k")


def test_a_server_that_fails_for_long_is_reported_with_the_fix(proxy: FaultProxy) -> None:
    store = s3(proxy.url, patience=replace(QUICK, attempts=4))
    proxy.decide = lambda asked: "error"
    fact = (
        r"cannot list runs/ in the run store s3://bucket/\S+ 4 times: it does not answer as it should \(.*InternalError"
    )
    with pytest.raises(
        StoreError, match=fact + r".*\); look at its status and your network, then run the command again"
    ):
        store.list("runs/")
    assert proxy.met == {"error": 4}


# --- opening, and refusals ---


def test_a_store_that_was_emptied_is_gone_and_not_made_anew(server: str) -> None:
    store = s3(server)
    with pytest.raises(StoreError, match=r"run store s3://bucket/runs/\d+-never\S* is gone: nothing is there"):
        s3(server, store._prefix.rstrip("/") + "-never", create=False)
    assert s3(server, store._prefix, create=False).list() == []
    client(server).delete_object(Bucket=BUCKET, Key=store._prefix + ".slm-store")
    with pytest.raises(StoreError, match="is gone"):
        store.list()


def test_a_wrong_bucket_is_said(server: str) -> None:
    message = r"cannot open the run store s3://bucketeer/x\S+: there is no such bucket .*; correct the name in the URI"
    with pytest.raises(StoreError, match=message):
        S3Store("bucketeer", "x", endpoint_url=server, patience=QUICK)


def test_missing_credentials_are_said(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match=r"no credentials were found \(.*\); set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        s3(server)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"cannot open a run store on S3: no credentials were found \(.*nobody"):
        s3(server)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "ExpiredToken", "the credentials have expired .* renew them"),
        (403, "AccessDenied", "permission denied .* allow s3:GetObject, s3:PutObject"),
        (403, "InvalidAccessKeyId", "the credentials are not accepted .* check AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", "this machine's clock is wrong .* timedatectl"),
        (400, "InvalidRequest", "it refused .* run the command again"),
    ],
)
def test_a_refusal_of_s3_names_the_fix(proxy: FaultProxy, status: int, code: str, message: str) -> None:
    store = s3(proxy.url)
    proxy.answers["PUT"] = (status, f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode())
    with pytest.raises(StoreError, match=f"cannot write k in the run store .*{message}"):
        store.write("k", b"")


def test_an_endpoint_where_nobody_answers_is_said() -> None:
    with pytest.raises(StoreError, match=r"cannot open the run store .* 2 times: it does not answer as it should"):
        s3(f"http://127.0.0.1:{free_port()}", patience=replace(QUICK, attempts=2))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3:///x", "names no bucket; write s3://bucket/prefix"),
        ("s3://bucket/x?endpoint=http://h", "has an unknown endpoint; write"),
        ("ftp://host/x", "no run store can be opened at ftp://host/x; give s3://bucket/prefix, a folder or"),
        ("file://home/me", "names the host 'home'"),
        ("s3://bucket/x?endpoint_url=nonsense", "the endpoint cannot be used"),
    ],
)
def test_a_uri_that_names_no_store_is_refused(uri: str, message: str) -> None:
    with pytest.raises((UserError, StoreError), match=message):
        open_store(uri)


def test_the_uri_carries_the_endpoint_that_was_found_in_the_environment(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    store = open_store(f"s3://{BUCKET}/{fresh()}")
    store.write("k", b"1")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert open_store(store.uri, create=False).read("k") == b"1"


def test_a_folder_is_opened_by_its_path(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert isinstance(store, DirectoryStore)
    assert open_store(store.uri, create=False).uri == store.uri


# --- what a store can do ---


class Overwrites(S3Store):
    """A server that ignores the condition of a write."""

    def _put(self, key: str, data: bytes, *, nonce: str | None = None, **options: Any) -> None:
        super()._put(key, data, nonce=nonce)


def test_a_probe_names_what_a_store_does_and_leaves_nothing(server: str, tmp_path: Path) -> None:
    for store in (s3(server), DirectoryStore(tmp_path)):
        assert [(each.name, each.ok) for each in probe(store)] == [
            ("write and read", True),
            ("conditional writes", True),
            ("list", True),
            ("delete", True),
        ]
        assert store.list() == []


def test_a_probe_finds_conditions_that_are_ignored(server: str) -> None:
    store = Overwrites(BUCKET, fresh(), endpoint_url=server, patience=QUICK)
    found = {each.name: each for each in probe(store)}
    assert [name for name, each in found.items() if not each.ok] == ["conditional writes"]
    assert "a second create of one key is not refused" in found["conditional writes"].detail
    assert store.list() == []


def test_a_probe_finds_conditions_that_are_refused(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    proxy.refuse_conditions = True
    found = {each.name: each for each in probe(store)}
    assert not found["conditional writes"].ok
    assert "it has no conditional writes" in found["conditional writes"].detail
    assert found["delete"].ok


def test_a_probe_of_a_store_that_refuses_says_why(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    proxy.answers["PUT"] = (403, b"<Error><Code>AccessDenied</Code></Error>")
    (found,) = probe(store)
    assert not found.ok
    assert "permission denied" in found.detail


def test_without_conditional_writes_training_needs_the_word_of_the_user(proxy: FaultProxy) -> None:
    store = s3(proxy.url)
    assert open_for_training(store.uri, create=False, single_supervisor=False).uri == store.uri
    proxy.refuse_conditions = True
    assert not has_conditional_writes(store)
    message = r"run store s3://\S+ has no conditional writes, so that two supervisors.*or add --single-supervisor"
    with pytest.raises(UserError, match=message):
        open_for_training(store.uri, create=False, single_supervisor=False)
    alone = open_for_training(store.uri, create=False, single_supervisor=True)
    assert alone.uri == f"{store.uri}&conditional_writes=no"
    assert (alone.create("k", b"1"), alone.create("k", b"2"), alone.read("k")) == (True, False, b"1")
    assert open_for_training(alone.uri, create=False, single_supervisor=True).uri == alone.uri


def test_a_store_that_cannot_be_read_names_no_key_that_is_missing(proxy: FaultProxy) -> None:
    store: Store = s3(proxy.url)
    with pytest.raises(StoreKeyMissing):
        store.read("absent")
    proxy.answers["GET"] = (403, b"<Error><Code>AccessDenied</Code></Error>")
    with pytest.raises(StoreError, match="permission denied"):
        store.read("absent")

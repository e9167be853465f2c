"""The guard's stores: their keys, folders, and S3 and presigned URLs against moto's server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks import run_store_keys as keys
from tasks.guard.clock import boottime
from tasks.guard.command_line import parse
from tasks.guard.credentials import Aws, Metadata
from tasks.guard.decision import Answer, parse_answer
from tasks.guard.http import Reply
from tasks.guard.stores import (
    ENVELOPE,
    DirectoryStore,
    PresignedStore,
    S3Store,
    grant_key,
    log_folder,
    open_store,
    request_key,
)
from tests.support.guarded import (
    LEASE,
    SLACK_SECONDS,
    SLEEPER,
    Node,
    node,
    until,
)
from tests.support.moto_cloud import BUCKET, REGION, Cloud, moto_cloud
from trainer.run_store.envelope import Writer, envelope, unwrap, wrap

__all__ = ["node"]
GRANT_KEY = f"tests/run-1/grants/{LEASE}/0.json"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with moto_cloud() as made:
        yield made


def test_a_key_lies_under_bucket_and_prefix_in_the_path_or_in_the_host() -> None:
    aws = Aws(Metadata(), region="eu-north-1")
    assert S3Store("s3://runs/a/b/", aws).url("x=1/y.json", "eu-north-1") == (
        "https://runs.s3.eu-north-1.amazonaws.com/a/b/x%3D1/y.json"
    )
    assert S3Store("s3://my.runs", aws).url("y", "cn-north-1") == "https://s3.cn-north-1.amazonaws.com.cn/my.runs/y"
    quoted = S3Store("s3://runs/a%20b?endpoint_url=http%3A%2F%2F127.0.0.1%3A9000&conditional_writes=no", aws)
    assert quoted.url("y", "us-east-1") == "http://127.0.0.1:9000/runs/a%20b/y"
    local = S3Store("s3://runs/a", aws, "http://127.0.0.1:9000/")
    assert local.url("y", "us-east-1") == "http://127.0.0.1:9000/runs/a/y"


def s3_store(cloud: Cloud, tmp_path: Path, uri: str = f"s3://{BUCKET}/tests/run-1", secret: str = "") -> S3Store:
    keys = tmp_path / "keys.json"
    fields = {"aws_access_key_id": cloud.access_key, "aws_secret_access_key": secret or cloud.secret_key}
    keys.write_text(json.dumps(fields))
    return S3Store(uri, Aws(Metadata(), str(keys), REGION), cloud.url)


def test_objects_are_written_read_and_missed(cloud: Cloud, tmp_path: Path) -> None:
    store = s3_store(cloud, tmp_path)
    with cloud.verifying():
        store.write("guard/a b/é=1/request.json", {"number": 7})
        assert json.loads(store.read("guard/a b/é=1/request.json") or b"") == {"number": 7}
        assert store.read("grants/none.json") is None
        store.append("guard/x/0", '{"event": 1}\n')
        store.append("guard/x/0", '{"event": 2}\n{"event": 3}\n')
    s3 = cloud.client("s3")
    body = s3.get_object(Bucket=BUCKET, Key="tests/run-1/guard/a b/é=1/request.json")["Body"].read()
    assert json.loads(body) == {"number": 7}
    parts = [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET, Prefix="tests/run-1/guard/x/0/log/")["Contents"]]
    assert parts == sorted(parts)
    text = b"".join(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in parts)
    assert [json.loads(line)["event"] for line in text.splitlines()] == [1, 2, 3]


def test_a_wrong_key_and_a_missing_bucket_are_errors_that_say_so(cloud: Cloud, tmp_path: Path) -> None:
    with cloud.verifying(), pytest.raises(OSError, match=r"HTTP 403.*SignatureDoesNotMatch"):
        s3_store(cloud, tmp_path, secret="wrong").write("x", 1)
    missing = s3_store(cloud, tmp_path, "s3://no-such-bucket/tests")
    for use in (lambda: missing.write("x", 1), lambda: missing.read("x")):
        with pytest.raises(OSError, match=r"HTTP 404.*NoSuchBucket"):
            use()


def read_parts(cloud: Cloud, prefix: str) -> list[dict[str, Any]]:
    s3 = cloud.client("s3")
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    bodies = [s3.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in listed]
    return [json.loads(line) for line in b"".join(bodies).splitlines()]


def test_a_node_lives_on_grants_in_a_bucket_and_tells_its_end_there(node: Callable[..., Node], cloud: Cloud) -> None:
    s3 = cloud.client("s3")
    paid = node(SLEEPER, first_grant=60.0, store=f"s3://{BUCKET}/tests/run-1", env=cloud.environment())
    request_key = f"tests/run-1/guard/{LEASE}/0/request.json"

    def request() -> dict[str, Any]:
        found = s3.list_objects_v2(Bucket=BUCKET, Prefix=request_key).get("Contents")
        return json.loads(s3.get_object(Bucket=BUCKET, Key=request_key)["Body"].read()) if found else {}

    number = until(request)["number"]
    grant = {"fencing_token": 1, "number": number, "duration_seconds": 6.0}
    s3.put_object(Bucket=BUCKET, Key=GRANT_KEY, Body=json.dumps(grant).encode())
    until(lambda: paid.deadline() < 60.0)
    end = paid.deadline()
    until(lambda: not paid.alive())
    assert end <= boottime() - paid.started < end + SLACK_SECONDS
    told = [line["event"] for line in read_parts(cloud, f"tests/run-1/guard/{LEASE}/0/log/")]
    assert told[0] == "armed"
    assert told[-3:] == ["deadline", "terminator fired", "processes ended"]


def test_a_node_lives_on_presigned_urls(node: Callable[..., Node], cloud: Cloud, tmp_path: Path) -> None:
    s3, place = cloud.client("s3"), f"guard/{LEASE}/0"

    def url(verb: str, key: str) -> str:
        return str(s3.generate_presigned_url(verb, Params={"Bucket": BUCKET, "Key": f"signed/{key}"}, ExpiresIn=600))

    put = [f"{place}/request.json", f"{place}/log.jsonl"]
    get = [f"grants/{LEASE}/0.json", f"{place}/request.json"]
    urls = {
        "put": {key: url("put_object", key) for key in put},
        "get": {key: url("get_object", key) for key in get},
    }
    file = tmp_path / "urls.json"
    file.write_text(json.dumps(urls))
    paid = node(SLEEPER, first_grant=60.0, store=f"presigned:{file}")
    store = PresignedStore(str(file))
    until(lambda: store.read(f"{place}/request.json"))
    reader = PresignedStore(str(file))
    number = json.loads(reader.read(f"{place}/request.json") or b"")["number"]
    grant = {"fencing_token": 1, "number": number, "duration_seconds": 5.0}
    s3.put_object(Bucket=BUCKET, Key=f"signed/grants/{LEASE}/0.json", Body=json.dumps(grant).encode())
    until(lambda: paid.deadline() < 60.0)
    until(lambda: not paid.alive())
    log = s3.get_object(Bucket=BUCKET, Key=f"signed/{place}/log.jsonl")["Body"].read()
    assert [json.loads(line)["event"] for line in log.splitlines()][-1] == "processes ended"
    with pytest.raises(OSError, match=r"has no URL to put guard/other\.json"):
        store.write("guard/other.json", 1)


def test_a_wrong_wall_clock_does_not_keep_a_node_from_its_store(cloud: Cloud, tmp_path: Path) -> None:
    """S3 refuses what is signed a quarter of an hour off; its reply says what time it is."""
    from threading import Thread

    signed_at: list[str] = []

    class Strict(BaseHTTPRequestHandler):
        """Refuses what is signed by a clock other than its own, 1 January 2031."""

        def do_GET(self) -> None:
            signed_at.append(self.headers["x-amz-date"])
            if signed_at[-1].startswith("20310101T00"):
                self.answer(200, b"granted")
            else:
                self.answer(403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")

        def date_time_string(self, timestamp: float | None = None) -> str:
            return "Wed, 01 Jan 2031 00:00:00 GMT"

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Strict) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        store = s3_store(Cloud(f"http://127.0.0.1:{server.server_port}", "A", "B"), tmp_path)
        assert store.read("x") == b"granted"
        assert store.read("x") == b"granted"
        server.shutdown()
    assert len(signed_at) == 3  # corrected once, remembered


def test_a_folder_may_be_a_uri(tmp_path: Path) -> None:
    words = ["--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d", "--store"]
    options = parse([*words, f"file://{tmp_path}/a%20b", "--", "true"])
    assert open_store(options).root == f"{tmp_path}/a b"


def test_the_guard_and_the_supervisor_read_each_others_records() -> None:
    assert envelope(Writer.GUARD) == ENVELOPE
    grant = {"fencing_token": 2, "number": 7, "duration_seconds": 9.0, "at_ms": 1}
    assert parse_answer(wrap(grant, Writer.SUPERVISOR)) == Answer(2, 7, 9.0)
    assert unwrap(json.dumps({**ENVELOPE, "number": 7}).encode(), "request.json") == {"number": 7}


def test_requests_and_grants_have_the_keys_that_the_supervisor_uses() -> None:
    assert request_key("lease-1", 3) == keys.guard_request("lease-1", 3)
    assert grant_key("lease-1", 3) == keys.grant("lease-1", 3)


def test_a_folder_gets_the_log_as_one_file(tmp_path: Path) -> None:
    DirectoryStore(str(tmp_path)).append(log_folder("lease-1", 3), "{}\n")
    assert (tmp_path / keys.guard_log("lease-1", 3)).read_text() == "{}\n"


def test_a_bucket_gets_the_log_as_numbered_parts() -> None:
    sent: list[str] = []

    class Recording(S3Store):
        def send(self, method: str, key: str, body: bytes = b"") -> Reply:
            sent.append(key)
            return Reply(200, {}, b"")

    store = Recording("s3://bucket", Aws(Metadata()))
    store.append(log_folder("lease-1", 3), "{}\n")
    assert sent == [keys.guard_log_part("lease-1", 3, store.part)]

"""The guard on S3: its signing against published vectors and botocore's signer, its stores against moto's server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import guard
from tasks.guard import Aws, Credentials, Metadata, PresignedStore, Request, S3Store, signed
from tests.support.guarded import LEASE, SLACK_SECONDS, SLEEPER, Node, node, until
from tests.support.moto_cloud import BUCKET, REGION, Cloud, moto_cloud

__all__ = ["node"]
GRANT_KEY = f"tests/run-1/grants/{LEASE}/0.json"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with moto_cloud() as made:
        yield made


# -- signing ---------------------------------------------------------------------------------------

# The example key of AWS's Signature Version 4 test suite, and that of the S3 documentation.
SUITE = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
S3_DOCS = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
SUITE_TIME = datetime(2015, 8, 30, 12, 36, tzinfo=UTC).timestamp()
S3_DOCS_TIME = datetime(2013, 5, 24, tzinfo=UTC).timestamp()
S3_HOST = "https://examplebucket.s3.amazonaws.com"


@pytest.mark.parametrize(
    ("request_", "credentials", "service", "at", "signature"),
    [
        pytest.param(
            Request("GET", "https://example.amazonaws.com/", {}),
            *(SUITE, "service", SUITE_TIME),
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
            id="test suite: get-vanilla",
        ),
        pytest.param(
            Request(
                "POST",
                "https://example.amazonaws.com/",
                {"Content-Type": "application/x-www-form-urlencoded"},
                b"Param1=value1",
            ),
            *(SUITE, "service", SUITE_TIME),
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
            id="test suite: post-x-www-form-urlencoded",
        ),
        pytest.param(
            Request("GET", f"{S3_HOST}/test.txt", {"Range": "bytes=0-9"}),
            *(S3_DOCS, "s3", S3_DOCS_TIME),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            id="S3 documentation: GET Object",
        ),
        pytest.param(
            Request(
                "PUT",
                f"{S3_HOST}/test%24file.text",
                {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
                b"Welcome to Amazon S3.",
            ),
            *(S3_DOCS, "s3", S3_DOCS_TIME),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
            id="S3 documentation: PUT Object",
        ),
        pytest.param(
            Request("GET", f"{S3_HOST}/?max-keys=2&prefix=J", {}),
            *(S3_DOCS, "s3", S3_DOCS_TIME),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            id="S3 documentation: list objects",
        ),
    ],
)
def test_signatures_are_those_that_aws_published(
    request_: Request, credentials: Credentials, service: str, at: float, signature: str
) -> None:
    authorization = signed(request_, credentials, "us-east-1", service, at).headers["authorization"]
    assert authorization.endswith(f"Signature={signature}")


@settings(max_examples=60, deadline=None)
@given(
    service=st.sampled_from(["s3", "ec2"]),
    path=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
    query=st.dictionaries(st.text("ab+ =&/é", min_size=1, max_size=4), st.text("xy %+=é", max_size=4), max_size=3),
    body=st.binary(max_size=40),
    token=st.sampled_from(["", "a-session+token/=="]),
    port=st.sampled_from(["", ":443", ":9000"]),
)
def test_signatures_are_those_of_botocore(
    service: str, path: str, query: dict[str, str], body: bytes, token: str, port: str
) -> None:
    place = quote(path.lstrip("/"), safe="/-_.~") if service == "s3" else ""
    words = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in query.items())
    url = f"https://host.example{port}/{place}" + (f"?{words}" if words else "")
    request = Request("PUT", url, {"Content-Type": "application/json"}, body)
    ours = signed(request, Credentials("AKID", "secret/key+", token), REGION, service, SUITE_TIME)
    theirs = AWSRequest("PUT", url, headers=dict(request.headers), data=body)
    theirs.context["payload_signing_enabled"] = True
    signer = botocore.auth.S3SigV4Auth if service == "s3" else botocore.auth.SigV4Auth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda: datetime.fromtimestamp(SUITE_TIME, UTC))
        signer(BotoCredentials("AKID", "secret/key+", token or None), service, REGION).add_auth(theirs)
    assert ours.headers["authorization"] == theirs.headers["Authorization"]


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


# -- credentials -----------------------------------------------------------------------------------


def test_credentials_are_read_from_json_and_from_the_file_of_the_aws_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_json, as_ini = tmp_path / "key.json", tmp_path / "credentials"
    as_json.write_text('{"aws_access_key_id": "A", "aws_secret_access_key": "B", "aws_session_token": "C"}')
    as_ini.write_text(
        "[default]\naws_access_key_id = D\naws_secret_access_key = E%F\n[other]\naws_access_key_id=G\n"
        "aws_secret_access_key=H\naws_session_token=I\n"
    )
    assert guard.read_credentials(str(as_json)) == Credentials("A", "B", "C")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    assert guard.read_credentials(str(as_ini)) == Credentials("D", "E%F", "")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert guard.read_credentials(str(as_ini)) == Credentials("G", "H", "I")
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(OSError, match=r"no section \[none\]"):
        guard.read_credentials(str(as_ini))


def test_credentials_cannot_be_given_on_the_command_line() -> None:
    options = {action.dest for action in guard_parser_actions()}
    assert {"credentials", "region"} <= options
    assert not {name for name in options if "secret" in name or "access_key" in name or "token" in name}


def guard_parser_actions() -> list[Any]:
    import argparse

    parser = argparse.ArgumentParser()
    guard._guard_options(parser)
    return parser._actions


# -- the stores against a server that verifies -----------------------------------------------------


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
    grant = {"epoch": 1, "number": number, "duration_seconds": 6.0}
    s3.put_object(Bucket=BUCKET, Key=GRANT_KEY, Body=json.dumps(grant).encode())
    until(lambda: paid.deadline() < 60.0)
    end = paid.deadline()
    until(lambda: not paid.alive())
    assert end <= guard.boottime() - paid.started < end + SLACK_SECONDS
    told = [line["event"] for line in read_parts(cloud, f"tests/run-1/guard/{LEASE}/0/log/")]
    assert told[0] == "armed"
    assert told[-3:] == ["deadline", "kill", "killed"]


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
    grant = {"epoch": 1, "number": number, "duration_seconds": 5.0}
    s3.put_object(Bucket=BUCKET, Key=f"signed/grants/{LEASE}/0.json", Body=json.dumps(grant).encode())
    until(lambda: paid.deadline() < 60.0)
    until(lambda: not paid.alive())
    log = s3.get_object(Bucket=BUCKET, Key=f"signed/{place}/log.jsonl")["Body"].read()
    assert [json.loads(line)["event"] for line in log.splitlines()][-1] == "killed"
    with pytest.raises(OSError, match=r"has no URL to put guard/other\.json"):
        store.write("guard/other.json", 1)


def test_a_wrong_wall_clock_does_not_keep_a_node_from_its_store(cloud: Cloud, tmp_path: Path) -> None:
    """S3 refuses what is signed a quarter of an hour off; its reply says what time it is."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
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
    options = guard.parse([*words, f"file://{tmp_path}/a%20b", "--", "true"])
    assert guard.open_store(options).root == f"{tmp_path}/a b"


def test_the_environment_of_this_test_holds_no_keys() -> None:
    assert "AWS_ACCESS_KEY_ID" not in os.environ

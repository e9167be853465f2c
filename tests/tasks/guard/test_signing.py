"""Signature Version 4 against published examples and botocore's signer."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.guard.http import Request
from tasks.guard.signing import Credentials, signed
from tests.support.moto_cloud import REGION

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

"""AWS Signature Version 4, so that S3 and EC2 can be reached without any client library."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, urlsplit

from .http import Request


@dataclass(frozen=True)
class Credentials:
    access_key: str
    secret_key: str
    token: str = ""


def signed(request: Request, credentials: Credentials, region: str, service: str, now: float) -> Request:
    """The request with an AWS Signature Version 4 in its headers.

    Source: "Create a signed AWS API request", AWS Identity and Access Management User Guide; for S3 the path is encoded
    once and the hash of the body is a header.
    """
    import hashlib
    import hmac

    url = urlsplit(request.url)
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    body_hash = hashlib.sha256(request.body).hexdigest()
    headers = {name.lower(): " ".join(value.split()) for name, value in request.headers.items()}
    headers.update({"host": host_header(request.url), "x-amz-date": moment})
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    if service == "s3":
        headers["x-amz-content-sha256"] = body_hash
    names = ";".join(sorted(headers))
    path = (url.path or "/") if service == "s3" else quote(url.path or "/", safe="/-_.~")
    encoded = sorted((_encoded(name), _encoded(value)) for name, value in parse_qsl(url.query, keep_blank_values=True))
    query = "&".join(f"{name}={value}" for name, value in encoded)
    canonical_headers = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join([request.method, path, query, canonical_headers, names, body_hash])
    scope = f"{moment[:8]}/{region}/{service}/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = ("AWS4" + credentials.secret_key).encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    who = f"Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return replace(request, headers={**headers, "authorization": f"AWS4-HMAC-SHA256 {who}"})


def host_header(url: str) -> str:
    """As http.client writes it: with the port unless that is the scheme's own."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return (parts.hostname or "") + (f":{parts.port}" if parts.port not in (None, default) else "")


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")

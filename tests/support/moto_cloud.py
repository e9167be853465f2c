"""AWS on this machine: moto's server, which verifies signatures and policies once a test asks for it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

REGION = "eu-north-1"
BUCKET = "slm-runs"
ALLOWED = ["s3:GetObject", "s3:PutObject", "ec2:TerminateInstances"]


@dataclass(frozen=True)
class Cloud:
    """Where it listens, and a key that may do what `ALLOWED` names."""

    url: str
    access_key: str
    secret_key: str

    def client(self, service: str) -> Any:
        """With the same key, so that it also works while signatures are verified."""
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(signature_version="s3v4" if service == "s3" else "v4", s3={"addressing_style": "path"}),
        )

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
        }

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Signatures are recomputed with botocore's signer, and keys need a policy."""
        self._authenticate_after(b"0")
        try:
            yield
        finally:
            self._authenticate_after(b"inf")

    def _authenticate_after(self, actions: bytes) -> None:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", actions, plain, method="POST")
        urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def moto_cloud() -> Iterator[Cloud]:
    """A server of its own, with one bucket and one user."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST"), timeout=10).close()
        iam = Cloud(url, "first", "first").client("iam")
        iam.create_user(UserName="node")
        statement = {"Effect": "Allow", "Action": ALLOWED, "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName="node", PolicyName="node", PolicyDocument=document)
        key = iam.create_access_key(UserName="node")["AccessKey"]
        cloud = Cloud(url, key["AccessKeyId"], key["SecretAccessKey"])
        location = {"LocationConstraint": REGION}
        cloud.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration=location)
        yield cloud
    finally:
        server.stop()

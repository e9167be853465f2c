"""The metadata service of the node's cloud, and AWS credentials from it, from a file or from the environment."""

from __future__ import annotations

import json
import os
from typing import Mapping

from .http import Reply, Request, call
from .signing import Credentials


class Metadata:
    """The cloud's own service on the node: AWS (IMDSv2), GCP and Azure answer at the same address."""

    ADDRESS = "http://169.254.169.254"
    GCP, AZURE = {"Metadata-Flavor": "Google"}, {"Metadata": "true"}

    def __init__(self, base: str = "") -> None:
        self.base = base.rstrip("/") or self.ADDRESS

    def aws(self, path: str, timeout: float = 2.0) -> Reply:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = call(Request("PUT", f"{self.base}/latest/api/token", ttl), timeout).checked().body.decode()
        return call(Request("GET", f"{self.base}/latest/{path}", {"X-aws-ec2-metadata-token": token}), timeout)

    def gcp(self, path: str, timeout: float = 2.0) -> Reply:
        return call(Request("GET", f"{self.base}/computeMetadata/v1/{path}", self.GCP), timeout)

    def azure(self, path: str, timeout: float = 5.0) -> Reply:
        return call(Request("GET", f"{self.base}/metadata/{path}", self.AZURE), timeout)

    def aws_text(self, path: str) -> str:
        return self.aws(path).checked().body.decode().strip()

    def gcp_text(self, path: str) -> str:
        return self.gcp(path).checked().body.decode().strip()


class Aws:
    """Credentials and region: of an option, the environment, ~/.aws/credentials, or the instance's role."""

    def __init__(self, metadata: Metadata, credentials_file: str = "", region: str = "") -> None:
        self.metadata, self.file, self._region = metadata, credentials_file, region

    def credentials(self) -> Credentials:
        """Read again each time, since short-lived credentials are replaced in place."""
        if self.file:
            return read_credentials(self.file)
        environment = os.environ
        if environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY"):
            token = environment.get("AWS_SESSION_TOKEN", "")
            return Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], token)
        shared = os.path.expanduser(environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
        if os.path.exists(shared):
            return read_credentials(shared)
        folder = "meta-data/iam/security-credentials/"
        role = json.loads(self.metadata.aws_text(folder + self.metadata.aws_text(folder).split()[0]))
        return Credentials(role["AccessKeyId"], role["SecretAccessKey"], role["Token"])

    def region(self) -> str:
        named = self._region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not named:
            try:
                named = self.metadata.aws_text("meta-data/placement/region")
            except OSError:
                named = "us-east-1"
            self._region = named
        return named


def read_credentials(path: str) -> Credentials:
    """A JSON object, or a file as the AWS command line writes it (profile AWS_PROFILE, else default)."""
    with open(path) as file:
        text = file.read()
    import configparser

    fields: Mapping[str, str]
    if text.lstrip().startswith("{"):
        fields = json.loads(text)
    else:
        parser = configparser.RawConfigParser()
        parser.read_string(text)
        profile = os.environ.get("AWS_PROFILE", "default")
        if not parser.has_section(profile):
            raise OSError(f"{path} has no section [{profile}]")
        fields = dict(parser.items(profile))
    key, secret = fields.get("aws_access_key_id"), fields.get("aws_secret_access_key")
    if not key or not secret:
        raise OSError(f"{path} has no aws_access_key_id and aws_secret_access_key")
    return Credentials(key, secret, fields.get("aws_session_token") or "")

"""What is missing is told in one message, with the way out, before there is a run and before anything is rented."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cost.ledger.database import connect
from orchestrator.backends.sky.enabled_clouds import Enabled
from orchestrator.settings import Home
from orchestrator.supervisor.cloud_leases import rentable
from orchestrator.upkeep.doctor import Level, clouds, storage
from tasks.recipe.load import load_recipe
from tests.support.aws_cloud import AwsCloud, aws_cloud
from tests.support.moto_cloud import BUCKET

OFFERS = ("--clouds", "aws", "--all-clouds")
SECONDS = 240


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsCloud]:
    with aws_cloud() as made:
        yield made


def launched(
    tmp_path: Path, store: str | None, *words: str, unset: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """`slm launch` in a home of its own; no file of the user's is read."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SLM_HOME": str(tmp_path / "home"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        **environ,
    }
    for name in unset:
        environment.pop(name, None)
    command = [sys.executable, "-m", "orchestrator.cli", "launch", "1.5b", "--backend", "sky", "--yes"]
    command += ["--budget", "100", *OFFERS, *(["--store", store] if store else []), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=tmp_path
    )


def told(done: subprocess.CompletedProcess[str], tmp_path: Path, *parts: str) -> str:
    """The one message; it ends the command, and no run was made."""
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    for part in parts:
        assert part in message, message
    database = tmp_path / "home" / "slm.db"
    if database.exists():
        db = connect(database)
        assert db.execute("SELECT count(*) FROM runs").fetchone()[0] == 0
        db.close()
    return message


def test_a_store_that_nodes_cannot_reach_is_told(aws: AwsCloud, tmp_path: Path) -> None:
    told(launched(tmp_path, None), tmp_path, "--store s3://bucket/prefix")


def test_no_credentials_are_told(aws: AwsCloud, tmp_path: Path) -> None:
    done = launched(tmp_path, f"s3://{BUCKET}/runs", unset=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    told(done, tmp_path, "no credentials", "aws configure", "nothing was rented")


def test_a_wrong_bucket_is_told(aws: AwsCloud, tmp_path: Path) -> None:
    told(launched(tmp_path, "s3://no-such-bucket/runs"), tmp_path, "no-such-bucket", "aws s3 mb")


def test_a_key_that_is_not_accepted_is_told(aws: AwsCloud, tmp_path: Path) -> None:
    with aws.cloud.verifying():
        done = launched(tmp_path, f"s3://{BUCKET}/runs", AWS_ACCESS_KEY_ID="AKIAUNKNOWN", AWS_SECRET_ACCESS_KEY="x")
    told(done, tmp_path, "the credentials are not accepted", "AWS_ACCESS_KEY_ID")


def test_no_network_is_told_within_a_bounded_time(aws: AwsCloud, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and never listening: every connection is refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = launched(tmp_path, f"s3://{BUCKET}/runs", AWS_ENDPOINT_URL=url)
    told(done, tmp_path, "network")


def test_an_expired_token_is_told(aws: AwsCloud, tmp_path: Path) -> None:
    """moto keeps no expiry, so a server that answers as S3 does: 400 ExpiredToken."""
    from tests.support.s3_server import FaultProxy

    proxy = FaultProxy(aws.cloud.url)
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    proxy.answers = dict.fromkeys(("GET", "PUT", "POST"), (400, body)) | {"HEAD": (400, b"")}
    try:
        done = launched(tmp_path, f"s3://{BUCKET}/runs", AWS_ENDPOINT_URL=proxy.url)
    finally:
        proxy.close()
    told(done, tmp_path, "the credentials have expired", "aws sso login")


def test_a_cloud_without_enough_terminators_is_told(tmp_path: Path) -> None:
    from dataclasses import replace
    from decimal import Decimal

    from tests.support.backend_contract import OFFER

    offer = replace(OFFER, cloud="lambda", spot=False)
    found, reasons = rentable([offer], load_recipe("1.5b"), free_usd=Decimal(100), allow_unguarded=False)
    assert found == []
    assert "lambda: nothing ends a node whose guest hangs" in reasons[0]


def test_doctor_says_the_same_of_clouds_and_of_the_store(
    aws: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = [cloud for cloud in clouds(lambda: Enabled()) if cloud.name == "skypilot"]
    assert (found.level, found.detail, found.fix) == (Level.WARN, "has credentials for no cloud", "sky check")
    home = Home(tmp_path / "home").create()
    (store,) = storage(home, "s3://no-such-bucket/runs")
    assert getattr(store, "level", None) is Level.FAIL
    assert "there is no such bucket" in getattr(store, "detail", "")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (store,) = storage(home, f"s3://{BUCKET}/runs")
    assert "no credentials were found" in getattr(store, "detail", "")

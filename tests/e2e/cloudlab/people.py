"""Those who use the lab: people with a HOME for SkyPilot and an SLM_HOME, and the bucket of their run stores."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config

from tests.e2e.cloudlab.cluster import HERE, MARK, WAIT_SECONDS, Lab, Late, end_all, until

RECIPE = HERE / "lab.yaml"
BIN = Path(sys.executable).parent
BRIDGE = "10.77.0.1"
BUCKET = "slm-lab"
KEYS = {"AWS_ACCESS_KEY_ID": "lab", "AWS_SECRET_ACCESS_KEY": "lab-secret-value", "AWS_REGION": "eu-north-1"}


@dataclass
class Bucket:
    """The run stores, in an S3 server on the bridge, where nodes and this machine both reach it."""

    url: str

    @property
    def env(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=KEYS["AWS_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )

    def keys(self, prefix: str) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def json(self, key: str) -> dict[str, Any]:
        """An object of the store; empty where there is none yet."""
        try:
            return dict(json.loads(self.read(key)))
        except self.client().exceptions.NoSuchKey:
            return {}


@contextmanager
def bucket_on_the_bridge() -> Iterator[Bucket]:
    """moto's server as a process of its own."""
    port = free_port(BRIDGE)
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", BRIDGE, "-p", str(port)]
        env = {**os.environ, MARK: "1"}
        server = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            bucket = Bucket(f"http://{BRIDGE}:{port}")
            until("the S3 server", lambda: answers(BRIDGE, port), seconds=60, every=0.2)
            place = {"LocationConstraint": KEYS["AWS_REGION"]}
            bucket.client().create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place)
            yield bucket
        finally:
            server.kill()
            server.wait(10)


def free_port(host: str) -> int:
    with socket.socket() as item:
        item.bind((host, 0))
        return int(item.getsockname()[1])


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


@dataclass
class User:
    """Somebody with a HOME for SkyPilot and an SLM_HOME, who types slm commands."""

    folder: Path
    lab: Lab
    bucket: Bucket
    port: int
    """Of this user's own SkyPilot API server."""
    prefix: str = ""
    supervisors: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def slm_home(self) -> Path:
        return self.folder / "slm" / (self.prefix or "first")

    @property
    def store(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SLM_", "SKY"))}
        return {
            **kept,
            **self.bucket.env,
            MARK: "1",
            "HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "SLM_HOME": str(self.slm_home),
            "SLM_REFRESH": "never",
            "NO_COLOR": "1",
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self.port),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            **{name: os.environ[name] for name in ("AWS_CA_BUNDLE",) if name in os.environ},
        }

    def sky(self, *arguments: str, seconds: float = WAIT_SECONDS) -> subprocess.CompletedProcess[str]:
        return self._run(BIN / "sky", arguments, seconds)

    def slm(self, *arguments: str, seconds: float = WAIT_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run slm to its end."""
        return self._run(BIN / "slm", arguments, seconds)

    def _run(self, program: Path, arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    @property
    def log(self) -> Path:
        return self.slm_home / "lab.log"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run slm in a session of its own; what it prints is kept in `log`."""
        self.slm_home.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            popen = subprocess.Popen(
                [str(BIN / "slm"), *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.supervisors.append(popen)
        return popen

    def launch(self, *settings: str, budget: str = "5") -> subprocess.Popen[str]:
        """The lab's recipe with these fields set, on SkyPilot, into the bucket."""
        options = [word for setting in settings for word in ("--set", setting)]
        command = ("launch", str(RECIPE), "--backend", "sky", "--store", self.store, "--budget", budget, "--yes")
        return self.start(*command, *options)

    def finish(self, supervisor: subprocess.Popen[str], *, seconds: float = WAIT_SECONDS) -> int:
        """The supervisor's exit code; what it printed is in the message when it is late."""
        try:
            return supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Late(f"slm still runs after {seconds:.0f} s:\n{self.said()}") from None

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")[-6000:] if self.log.exists() else ""

    # -- what the run says of itself ---------------------------------------------------------------

    def run_id(self) -> str:
        """The only run of this home; empty before it is there."""
        runs = self.slm_home / "runs"
        names = sorted(item.name for item in runs.iterdir()) if runs.is_dir() else []
        return names[0] if names else ""

    def status(self) -> dict[str, Any]:
        """The only run's facts, as `slm status --json` tells them; empty before there is one."""
        done = self.slm("status", "--json", seconds=60)
        runs = json.loads(done.stdout)["runs"] if done.returncode == 0 and done.stdout else []
        return dict(runs[0]) if runs else {}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The run's own log of what happened."""
        path = self.slm_home / "runs" / self.run_id() / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if self.run_id() and path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if not kinds or event["kind"] in kinds]

    def store_prefix(self) -> str:
        """Where in the bucket the run keeps everything; empty before anything is there."""
        keys = self.bucket.keys(self.prefix)
        found = {key.split("/ledger/")[0] for key in keys if "/ledger/" in key}
        return found.pop() if found else ""

    def progress(self) -> dict[str, Any]:
        """What the trainer last wrote; empty before its first step."""
        prefix = self.store_prefix()
        return self.bucket.json(f"{prefix}/progress/latest.json") if prefix else {}

    def step(self) -> int:
        return int(self.progress().get("step") or 0)

    def checkpoints(self) -> list[int]:
        """Steps of whole checkpoints."""
        return self._checkpoints("")

    def checkpoints_of(self, incarnation: int) -> list[int]:
        return self._checkpoints(f"incarnation={incarnation}/")

    def _checkpoints(self, below: str) -> list[int]:
        keys = self.bucket.keys(f"{self.store_prefix()}/checkpoints/{below}")
        return sorted(int(key.split("/step=")[1].split("/")[0]) for key in keys if key.endswith("/manifest.json"))

    def incarnations(self) -> list[dict[str, Any]]:
        """Each start of the workers, and the checkpoint it came from."""
        prefix = f"{self.store_prefix()}/incarnations/"
        found = [self.bucket.json(key) for key in self.bucket.keys(prefix)]
        return sorted(found, key=lambda entry: int(entry["incarnation"]))

    def trains(self) -> bool:
        """Whether a step was made that a whole checkpoint holds."""
        return bool(self.store_prefix()) and bool(self.checkpoints())

    def spent_usd(self) -> Decimal:
        return Decimal(str(self.status()["spent_usd"]))

    def kill_supervisors(self) -> None:
        """SIGKILL what this user started."""
        for supervisor in self.supervisors:
            if supervisor.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(supervisor.pid, signal.SIGKILL)
                supervisor.wait(10)

    def end(self) -> None:
        """With all that runs in this home, SkyPilot's API server too."""
        self.kill_supervisors()
        end_all("HOME", str(self.home))

    def api_server(self) -> list[psutil.Process]:
        """SkyPilot's API server of this home, with its workers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get("HOME") == str(self.home)
                if ours and "sky.server.server" in " ".join(process.cmdline()):
                    found += [process, *process.children(recursive=True)]
        return found


def new_user(folder: Path, lab: Lab, bucket: Bucket) -> User:
    """A home as `lab.sh sky_home` makes it, with a SkyPilot that knows nothing yet."""
    user = User(folder, lab, bucket, free_port("127.0.0.1"))
    user.home.mkdir(parents=True)
    lab("sky_home", str(user.home))
    return user


@contextmanager
def first_user(lab: Lab, bucket: Bucket) -> Iterator[User]:
    """The home whose SkyPilot API server all others share: to start one takes ten seconds."""
    folder = Path(tempfile.mkdtemp(prefix="slm-lab-"))
    user = new_user(folder, lab, bucket)
    try:
        until("prices of the lab", lambda: user.slm("offers", "--refresh").returncode == 0)
        yield user
    finally:
        user.end()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def one_more(first: User, name: str) -> Iterator[User]:
    """A user who has launched nothing yet, on a cloud where everything is free; what is started ends with it."""
    user = User(first.folder, first.lab, first.bucket, first.port, prefix=name)
    user.slm_home.mkdir(parents=True)
    shutil.copy(first.slm_home / "offers.json", user.slm_home / "offers.json")
    try:
        yield user
    finally:
        user.kill_supervisors()
        first.lab.set_free()

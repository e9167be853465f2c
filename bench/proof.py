"""What the proofs share: an SLM_HOME of their own, the slm command, and everything that runs because of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil

SLM = Path(sys.executable).with_name("slm")
CLOUD_VARIABLES = ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS")


@dataclass
class Proof:
    """One SLM_HOME, and what is known to have failed in it."""

    home: Path
    failures: list[str] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in CLOUD_VARIABLES}
        return {**kept, "SLM_HOME": str(self.home), "SLM_REFRESH": "never", "NO_COLOR": "1"}

    def start(self, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Run slm in the background, in a session of its own."""
        output: Any = subprocess.DEVNULL if log is None else log.open("a")
        command = [str(SLM), *arguments]
        return subprocess.Popen(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def slm(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run slm to its end."""
        return subprocess.run(
            [str(SLM), *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        """What `slm ... --json` prints; None where it fails."""
        done = self.slm(*arguments, "--json", timeout=60)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def status(self) -> dict[str, Any]:
        """The only run's facts; empty where there is none."""
        runs = (self.json("status") or {}).get("runs", [])
        return dict(runs[0]) if runs else {}

    def check(self, holds: bool, claim: str) -> bool:
        """Note a claim that does not hold."""
        if not holds:
            self.failures.append(claim)
            print(f"FAILED: {claim}", file=sys.stderr, flush=True)
        return holds

    def processes(self) -> list[psutil.Process]:
        """Every process that carries this SLM_HOME in its environment, this one excepted."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("SLM_HOME") == str(self.home):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def wait_until_empty(self, seconds: float) -> list[str]:
        """What still runs after so many seconds; empty as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [describe(process) for process in left]

    def run_dir(self, run_id: str) -> Path:
        return self.home / "runs" / run_id

    def true_bill_usd(self, run_id: str) -> Decimal:
        """What the local cloud itself says that it charges."""
        from orchestrator.backends.local.records import true_bill

        return true_bill(self.run_dir(run_id) / "market")

    def read(self, run_id: str, key: str) -> dict[str, Any] | None:
        """A JSON object of the run store."""
        try:
            content = json.loads((self.home / "store" / run_id / key).read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)


@contextmanager
def proof_in(folder: Path | None = None) -> Iterator[Proof]:
    """A proof in a temporary home; whatever it left running is ended, but reported first."""
    with tempfile.TemporaryDirectory(prefix="slm-proof-", dir=folder, ignore_cleanup_errors=True) as home:
        proof = Proof(Path(home))
        try:
            yield proof
        finally:
            for process in proof.processes():
                try:
                    process.kill()
                except psutil.Error:
                    continue


class PeakMemory:
    """Samples the proportional memory of all of a proof's processes while the block runs."""

    def __init__(self, proof: Proof, *, every_seconds: float = 2.0) -> None:
        self.peak_bytes = 0
        self._proof = proof
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self.peak_bytes = max(self.peak_bytes, sum(memory_of(process) for process in self._proof.processes()))


def memory_of(process: psutil.Process) -> int:
    """Proportional share where the kernel tells it, else the resident set; shared pages count once over all."""
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except (psutil.Error, OSError):
        return 0


def finish(proof: Proof, facts: dict[str, Any], *, as_json: bool) -> int:
    """Print what was found and return the exit code."""
    facts = {**facts, "failures": proof.failures}
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        for name, value in facts.items():
            print(f"{name:32} {value}")
    return 1 if proof.failures else 0

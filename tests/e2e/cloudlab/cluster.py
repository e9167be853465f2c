"""The lab as seen from a test: a cloud that gives and takes nodes.

Everything is decided by files, by what Slurm says and by what runs on the nodes. `until` bounds each wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import psutil

HERE = Path(__file__).parent
SCRIPT = HERE / "lab.sh"
NODE_USER = "slmlab"
NODES = ("n1", "n2")
LOCK = Path("/var/tmp/slm-cloudlab.lock")
WAIT_SECONDS = 240.0
CRAWL_SECONDS = 0.2
MARK = "SLM_CLOUDLAB"
"""In the environment of everything that a test starts here, so that what a killed test left behind is found."""
USD_PER_HOUR = {"spot": Decimal("1.10"), "ondemand": Decimal("2.99")}
"""What `lab.sh sky_home` tells SkyPilot."""

Found = TypeVar("Found")


class Late(AssertionError):
    """Something did not come within its bound."""


def until(what: str, look: Callable[[], Found], *, seconds: float = WAIT_SECONDS, every: float = 1.0) -> Found:
    """The first true thing that `look` sees.

    Raises:
        Late: Nothing within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Late(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


@dataclass(frozen=True)
class Job:
    """One ended Slurm job, as Slurm's own accounting wrote it."""

    name: str
    state: str
    partition: str
    started: datetime
    ended: datetime
    nodes: str
    num_nodes: int

    @property
    def node_hours(self) -> Decimal:
        return Decimal((self.ended - self.started).total_seconds()) * self.num_nodes / 3600

    @property
    def usd(self) -> Decimal:
        """What the nodes cost at the partition's price."""
        return self.node_hours * USD_PER_HOUR[self.partition]


@contextmanager
def lab_on_this_machine() -> Iterator[Lab]:
    """The cluster, after whatever an earlier run left behind is gone; one at a time on a machine.

    Raises:
        NoLab: This machine cannot be one.
    """
    lab = Lab(Path(os.environ.get("LAB_DIR", "/var/tmp/slm-cloudlab")))
    refusal = lab.refusal()
    if refusal is not None:
        raise NoLab(refusal)
    with LOCK.open("w") as lock:
        until("the lab to be free", lambda: taken(lock.fileno()), seconds=600)
        end_all(MARK, "1")
        lab("down")
        lab("up", seconds=600)
        try:
            yield lab
        finally:
            end_all(MARK, "1")
            lab("down")


def taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class NoLab(Exception):
    """Why this machine cannot be a lab."""


class Lab:
    """The cluster on this machine."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.env = {
            **os.environ,
            "LAB_DIR": str(base),
            "PYTHON": sys.executable,
            "SLURM_CONF": str(base / "cluster" / "etc" / "slurm.conf"),
        }

    def __call__(self, *command: str, seconds: float = WAIT_SECONDS) -> str:
        """A command of lab.sh."""
        return self._run([str(SCRIPT), *command], seconds)

    def slurm(self, *command: str) -> str:
        """A command of Slurm's, as its administrator."""
        return self._run(command, 60)

    def _run(self, command: Sequence[str], seconds: float) -> str:
        done = subprocess.run(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout

    def refusal(self) -> str | None:
        """Why this machine cannot be a lab; None if it can."""
        done = subprocess.run(
            [str(SCRIPT), "check"], env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        return None if done.returncode == 0 else (done.stdout.strip() or done.stderr.strip() or "lab.sh check failed")

    def jobs(self) -> list[dict[str, str]]:
        """Clusters that exist now: ours are the jobs whose names begin with slm-."""
        lines = self.slurm("squeue", "-h", "-o", "%i|%j|%P|%T|%N").splitlines()
        rows = [
            dict(zip(("id", "name", "partition", "state", "nodes"), line.split("|"), strict=True)) for line in lines
        ]
        return [row for row in rows if row["name"].startswith("slm-")]

    def running(self) -> dict[str, str] | None:
        """The one cluster of ours that runs."""
        return next((job for job in self.jobs() if job["state"] == "RUNNING" and job["nodes"]), None)

    def ended_jobs(self) -> list[Job]:
        """Every cluster of ours that has ended since the lab is up."""
        log = self.base / "cluster" / "jobcomp" / "jobcomp.log"
        found = []
        for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
            said = dict(part.split("=", 1) for part in line.split() if "=" in part)
            # A job that was cancelled while it waited has no node, and cost nothing; it may still have a start.
            ran = said["NodeList"] != "(null)" and "Unknown" not in (said["StartTime"], said["EndTime"])
            if said["Name"].startswith("slm-") and ran:
                found.append(
                    Job(
                        name=said["Name"],
                        state=said["JobState"],
                        partition=said["Partition"],
                        started=datetime.fromisoformat(said["StartTime"]),
                        ended=datetime.fromisoformat(said["EndTime"]),
                        nodes=said["NodeList"],
                        num_nodes=int(said["NodeCnt"]),
                    )
                )
        return found

    def reclaim(self, node: str, *, seconds: int = 20) -> None:
        """Another tenant with a better right: Slurm preempts what runs there."""
        wrap = f"sleep {seconds}"
        self.slurm("sbatch", "-p", "reclaim", "-w", node, "--exclusive", "-t", "2", "-o", "/dev/null", "--wrap", wrap)

    def set_free(self) -> None:
        """Every node up, every partition open, no job and no zombie left: also after a scenario that failed."""
        for name in ("spot", "ondemand", "reclaim"):
            self.slurm("scancel", f"--partition={name}")
            self.slurm("scontrol", "update", f"PartitionName={name}", "State=UP")
        for node in NODES:
            kill_all(lambda node=node: self.node_processes(node, user=NODE_USER))
            self("node_up", node)
        until("free nodes", lambda: set(self.slurm("sinfo", "-h", "-p", "spot", "-N", "-o", "%t").split()) == {"idle"})

    def hold_training(self, node: str) -> list[psutil.Process]:
        """Stop the trainers on that node where they stand, so that no speed of this machine decides a test."""
        found = self.node_processes(node, "ray::RayTrainWorker")
        for process in found:
            process.suspend()
        assert found, f"nothing trains on {node}"
        return found

    def node_processes(self, node: str, *words: str, user: str | None = None) -> list[psutil.Process]:
        """Processes on that node, of one user or all, whose command line has all these words."""
        init = self.base / "cluster" / "run" / f"{node}.init"
        if not init.exists():
            return []
        found = []
        namespace = namespace_of(int(init.read_text()))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                line = " ".join(process.cmdline())
                fits = line and all(word in line for word in words) and user in (None, process.username())
                if fits and namespace_of(process.pid) == namespace:
                    found.append(process)
        return found


def let_go(processes: Sequence[psutil.Process]) -> int:
    """Let held trainers go on; how many were still there."""
    there = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
            there += 1
    return there


def crawl(processes: Sequence[psutil.Process]) -> None:
    """Let held trainers make a few steps and hold them again: slow, but nothing that anyone could take for dead."""
    let_go(processes)
    time.sleep(CRAWL_SECONDS)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def namespace_of(pid: int) -> str:
    """Which process namespace a process lives in; every node has one of its own."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def kill_all(look: Callable[[], list[psutil.Process]]) -> int:
    """Stop, then SIGKILL whatever `look` finds, until nothing is found: watchdogs that restart each other included."""
    killed = 0
    while found := look():
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
        killed += len(found)
        psutil.wait_procs(found, timeout=5)
    return killed


def end_all(variable: str, value: str) -> None:
    """SIGKILL every process with that in its environment, this one excepted."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                process.kill()

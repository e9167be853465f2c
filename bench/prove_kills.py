"""SIGKILL of the supervisor, a guard, Ray's head and a worker at random moments: running the command again repairs.

`python bench/prove_kills.py [--kills 20] [--seed 0] [--json]` trains the demo's model without an end, kills each target
so many times in random order, half of the kills while the one before is still being repaired, and counts what was
repaired. Afterwards the ledger is replayed against the cap and against the cloud's own bill, and the last act kills the
supervisor for good: nothing may be left running once the grants have run out.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import psutil
from proof import Proof, finish, proof_in

from tasks.run_store_keys import PROGRESS

CAP_USD = 400
TARGETS = ("supervisor", "guard", "head", "worker")
COMMAND = (
    *("launch", "demo", "--backend", "local", "--market", "calm", "--yes", "--budget", str(CAP_USD)),
    *("--set", "training.num_steps=1000000", "--set", "training.eval_every_steps=1000000"),
    *("--set", "optimizer.decay_fraction=0.0"),
)
REPAIR_SECONDS = 240.0
FIND_SECONDS = 60.0
GRANT_SECONDS = 90.0
"""Longer than any grant, its terminators and the market's own end take together."""


@dataclass
class Siege:
    """The run under attack."""

    proof: Proof
    rng: random.Random
    log: Path
    supervisor: subprocess.Popen[str] | None = None
    kills: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    reruns: int = 0
    repair_seconds: list[float] = field(default_factory=list)

    def keep_supervised(self) -> None:
        """What a user does: run the same command again when it ended."""
        if self.supervisor is None or self.supervisor.poll() is not None:
            self.reruns += self.supervisor is not None
            self.supervisor = self.proof.start(*COMMAND, log=self.log)

    def progress(self) -> tuple[int, int]:
        """Incarnation of the workers and newest step."""
        newest = self.proof.read("demo-1", PROGRESS) or {}
        return int(newest.get("incarnation", -1)), int(newest.get("step", -1))

    def wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.keep_supervised()
            if until():
                return True
            time.sleep(0.3)
        return False

    def candidates(self, target: str) -> list[psutil.Process]:
        if target == "supervisor":
            alive = self.supervisor is not None and self.supervisor.poll() is None
            return [psutil.Process(self.supervisor.pid)] if alive and self.supervisor else []
        return [process for process in self.proof.processes() if is_target(process, target)]

    def kill(self, target: str) -> bool:
        """SIGKILL one process of this kind, waiting a while for one to exist."""
        victims: list[psutil.Process] = []

        def found() -> bool:
            victims[:] = self.candidates(target)
            return bool(victims)

        if not self.wait(FIND_SECONDS, found):
            return self.proof.check(False, f"a {target} to kill within {FIND_SECONDS:.0f} s")
        try:
            self.rng.choice(victims).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return self.kill(target)
        self.kills[target] += 1
        return True

    def wait_for_repair(self, targets: list[str]) -> None:
        """Training must advance by itself, or after the command was run again."""
        incarnation, step = self.progress()
        started = time.monotonic()

        def advanced() -> bool:
            now_incarnation, now_step = self.progress()
            return (now_incarnation, now_step) != (incarnation, step) and now_step >= 0 and now_step != step

        # A step in flight may still land after the kill: two advances in a row count.
        if self.wait(REPAIR_SECONDS, advanced):
            incarnation, step = self.progress()
            if self.wait(REPAIR_SECONDS, advanced):
                self.repaired.update(targets)
                self.repair_seconds.append(round(time.monotonic() - started, 1))
                return
        self.proof.check(False, f"training again within {REPAIR_SECONDS:.0f} s after {targets}")


def is_target(process: psutil.Process, target: str) -> bool:
    try:
        line = process.cmdline()
        rank = process.environ().get("SLM_RANK")
    except (psutil.Error, OSError):
        return False
    program = Path(line[0]).name if line else ""
    if target == "guard":
        return any(part.endswith("guard.pyz") for part in line) and "watchdog" not in line
    if target == "head":
        return program == "gcs_server" or (program == "raylet" and rank == "0")
    return program.startswith("ray::RayTrainWorker")


def besiege(siege: Siege, kills_each: int) -> None:
    """Pairs of kills in random order: the second of a pair falls into the repair of the first."""
    order = [target for target in TARGETS for _ in range(kills_each)]
    siege.rng.shuffle(order)
    siege.keep_supervised()
    siege.proof.check(siege.wait(REPAIR_SECONDS, lambda: siege.progress()[1] > 0), "training starts")
    while order:
        pair, order = order[:2], order[2:]
        time.sleep(siege.rng.uniform(0.0, 4.0))
        for number, target in enumerate(pair):
            if number:
                siege.wait(siege.rng.uniform(0.0, 15.0), lambda: False)
            siege.kill(target)
        siege.wait_for_repair(pair)
        done = sum(siege.kills.values())
        print(f"{done} kills, {sum(siege.repaired.values())} repaired, last {pair}", file=sys.stderr, flush=True)


def check_ledger(proof: Proof, run_id: str = "demo-1") -> dict[str, object]:
    """Replay every entry: never over the cap, never below the cloud's own bill."""
    view = proof.json("ledger", run_id) or {}
    committed = highest = Decimal(0)
    for entry in view.get("entries", []):
        committed += Decimal(str(entry["spent_usd"])) + Decimal(str(entry["reserved_usd"]))
        highest = max(highest, committed)
    bill = proof.true_bill_usd(run_id)
    spent = Decimal(str(view.get("spent_usd", "-1")))
    proof.check(highest <= CAP_USD, f"committed never exceeds the cap: ${highest:.4f} <= ${CAP_USD}")
    proof.check(spent >= bill, f"the ledger (${spent:.4f}) is not below the cloud's own bill (${bill:.4f})")
    return {"entries": len(view.get("entries", [])), "highest_committed_usd": highest, "spent_usd": spent, "bill": bill}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with proof_in() as proof:
        siege = Siege(proof, random.Random(arguments.seed), proof.home / "supervisor.out")
        besiege(siege, arguments.kills)
        # The last act: nobody comes back, so the grants run out and everything ends by itself.
        if siege.supervisor is not None:
            siege.supervisor.kill()
            siege.supervisor.wait()
        left = proof.wait_until_empty(GRANT_SECONDS)
        proof.check(not left, f"nothing runs {GRANT_SECONDS:.0f} s after the supervisor is gone: {left}")
        ended = proof.slm("stop", "demo-1", timeout=120)
        proof.check(ended.returncode == 0, f"slm stop settles what is left: {ended.stderr}")
        ledger = check_ledger(proof)
        if proof.failures:
            print(siege.log.read_text()[-6000:], file=sys.stderr)
        facts = {
            "seed": arguments.seed,
            "kills": dict(siege.kills),
            "repaired": dict(siege.repaired),
            "command_run_again": siege.reruns,
            "repair_seconds_median": sorted(siege.repair_seconds)[len(siege.repair_seconds) // 2],
            "repair_seconds_max": max(siege.repair_seconds),
            **ledger,
            "left_running": left,
        }
        return finish(proof, facts, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

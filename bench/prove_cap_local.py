"""The cap on this machine: SIGKILL and SIGSTOP of supervisor, guard, watchdog, raylet and trainer in random order.

`python bench/prove_cap_local.py --minutes 10 --seed S [--json]` trains the demo's model on two local nodes.
What was stopped goes on after a while, or never. A supervisor that died is replaced by running the same command again;
one that is stopped for ever, as a laptop that was closed, must see its nodes end by themselves. Afterwards nothing may
be left running, the ledger may not be below the cloud's own bill, and that bill not below the time during which any
process of a node was seen alive, at its price.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
from proof import Proof, finish, proof_in
from prove_kills import COMMAND, GRANT_SECONDS, check_ledger

from tasks.run_store_keys import PROGRESS

TARGETS = ("supervisor", "guard", "watchdog", "raylet", "trainer")
LAUNCH = (*COMMAND, "--nodes", "2")
FIRST_STEP_SECONDS = 240.0
PAUSE_SECONDS = (1.0, 8.0)
STOPPED_SECONDS = ((0.5, 5.0), (5.0, 40.0))
"""How long a stopped process stands still, one of these ranges or for ever, with equal chances."""


@dataclass
class Watch:
    """Sees which nodes have a living process, by the mark in its environment; knows nothing of ledger and market."""

    proof: Proof
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        for process in self.proof.processes():
            try:
                mark = process.environ().get("SLM_NODE_MARK")
            except (psutil.Error, OSError):
                continue
            if mark:
                self.first.setdefault(mark, now)
                self.last[mark] = now

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.look()


@dataclass
class Storm:
    """The run, what is thrown at it, and what stands still at the moment."""

    proof: Proof
    rng: random.Random
    log: Path
    supervisor: Any = None
    thrown: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    reruns: int = 0
    waking: list[tuple[float, psutil.Process]] = field(default_factory=list)
    asleep_seconds: list[float] = field(default_factory=list)

    def keep_supervised(self) -> None:
        """What a user does: run the same command again when it ended."""
        if self.supervisor is None or self.supervisor.poll() is not None:
            self.reruns += self.supervisor is not None
            self.supervisor = self.proof.start(*LAUNCH, log=self.log)

    def pause(self, seconds: float) -> None:
        """Let time pass, wake up whose time has come, and keep the run supervised."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            due = [process for at, process in self.waking if at <= time.monotonic()]
            self.waking = [(at, process) for at, process in self.waking if at > time.monotonic()]
            for process in due:
                send(process, signal.SIGCONT)
            self.keep_supervised()
            time.sleep(0.2)

    def candidates(self, target: str) -> list[psutil.Process]:
        if target == "supervisor":
            alive = self.supervisor is not None and self.supervisor.poll() is None
            return [psutil.Process(self.supervisor.pid)] if alive else []
        return [process for process in self.proof.processes() if kind_of(process) == target]

    def strike(self, target: str, number: signal.Signals) -> None:
        victims = self.candidates(target)
        if not victims:
            self.absent[target] += 1
            return
        victim = self.rng.choice(victims)
        self.thrown[f"{number.name} {target}"] += send(victim, number)
        if number == signal.SIGSTOP:
            span = self.rng.choice([*STOPPED_SECONDS, None])
            if span is not None:
                self.waking.append((time.monotonic() + self.rng.uniform(*span), victim))
            elif target == "supervisor":
                self.sleep_for_ever()

    def sleep_for_ever(self) -> None:
        """Nobody renews: the nodes must end. Then the supervisor is killed, as a user who comes back does."""
        began = time.monotonic()
        while self.node_processes() and time.monotonic() - began < GRANT_SECONDS:
            time.sleep(0.3)
        left = self.node_processes()
        self.asleep_seconds.append(round(time.monotonic() - began, 1))
        self.proof.check(not left, f"nodes end while the supervisor sleeps: {left} are left")
        self.supervisor.kill()
        self.supervisor.wait()

    def node_processes(self) -> int:
        return sum(kind_of(process) in ("guard", "watchdog", "raylet", "trainer") for process in self.proof.processes())


def kind_of(process: psutil.Process) -> str:
    """Which target a process is; empty for any other."""
    try:
        line = process.cmdline()
        state = process.status()
    except (psutil.Error, OSError):
        return ""
    program = Path(line[0]).name if line else ""
    if state == psutil.STATUS_ZOMBIE:
        return ""
    if any(part.endswith("guard.pyz") for part in line):
        return "watchdog" if "watchdog" in line else "guard"
    if program == "raylet":
        return "raylet"
    return "trainer" if program.startswith("ray::RayTrainWorker") else ""


def send(process: psutil.Process, number: signal.Signals) -> int:
    """1 if it was there to be told."""
    try:
        process.send_signal(number)  # psutil compares the start time: no other process of that pid is hit
    except psutil.NoSuchProcess:
        return 0
    return 1


def rage(storm: Storm, minutes: float) -> None:
    """Every pair of target and signal once, in random order, over and over."""
    storm.keep_supervised()
    until = time.monotonic() + FIRST_STEP_SECONDS
    while not trained(storm.proof) and time.monotonic() < until:
        storm.pause(0.5)
    storm.proof.check(trained(storm.proof), "training starts")
    end, deck = time.monotonic() + minutes * 60, []
    while time.monotonic() < end:
        if not deck:
            deck = [(target, number) for target in TARGETS for number in (signal.SIGKILL, signal.SIGSTOP)]
            storm.rng.shuffle(deck)
        storm.pause(storm.rng.uniform(*PAUSE_SECONDS))
        storm.strike(*deck.pop())
        print(f"{max(0, end - time.monotonic()):4.0f} s left, {dict(storm.thrown)}", file=sys.stderr, flush=True)


def trained(proof: Proof) -> bool:
    return int((proof.read("demo-1", PROGRESS) or {}).get("step", 0)) > 0


def seen_usd(watch: Watch, proof: Proof, run_id: str) -> Decimal:
    """What the nodes of a run cost if they are billed from when they were first seen to when they were last seen."""
    from orchestrator.backends.local.records import BILL_FILE, load_state, read_lines

    market = proof.run_dir(run_id) / "market"
    anchor = load_state(market).anchor
    prices = {
        line["instance_id"]: Decimal(line["usd_per_hour"])
        for line in read_lines(market / BILL_FILE)
        if line["event"] == "start"
    }
    seconds = {mark: Decimal(watch.last[mark] - first) for mark, first in watch.first.items() if mark in prices}
    scale = Decimal(anchor.scale) if anchor else Decimal(1)
    return sum((price * seconds.get(mark, Decimal(0)) * scale / 3600 for mark, price in prices.items()), Decimal(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with proof_in() as proof:
        watch = Watch(proof)
        thread = threading.Thread(target=watch.run, daemon=True)
        thread.start()
        storm = Storm(proof, random.Random(arguments.seed), proof.home / "supervisor.out")
        rage(storm, arguments.minutes)
        # Nobody comes back, and what stands still goes on standing: everything must end by itself.
        storm.supervisor.kill()
        storm.supervisor.wait()
        began = time.monotonic()
        left = proof.wait_until_empty(GRANT_SECONDS)
        ended_after = round(time.monotonic() - began, 1)
        watch.done.set()
        thread.join()
        proof.check(not left, f"nothing runs {GRANT_SECONDS:.0f} s after the supervisor is gone: {left}")
        ledger: dict[str, Any] = {}
        for folder in sorted((proof.home / "runs").iterdir()):
            ended = proof.slm("stop", folder.name, timeout=120)
            proof.check(ended.returncode == 0, f"slm stop settles what is left: {ended.stderr}")
            found = check_ledger(proof, folder.name)
            seen = seen_usd(watch, proof, folder.name)
            proof.check(
                seen <= Decimal(str(found["bill"])), f"the bill ({found['bill']}) covers what was seen ({seen})"
            )
            ledger[folder.name] = {**found, "seen_usd": round(seen, 4)}
        if proof.failures:
            print(storm.log.read_text()[-6000:], file=sys.stderr)
        facts = {
            "minutes": arguments.minutes,
            "seed": arguments.seed,
            "thrown": dict(sorted(storm.thrown.items())),
            "absent": dict(storm.absent),
            "command_run_again": storm.reruns,
            "nodes_rented": len(watch.first),
            "supervisor_asleep_until_nodes_ended_seconds": storm.asleep_seconds,
            "last_end_seconds": ended_after,
            "left_running": left,
            "ledger": ledger,
        }
        return finish(proof, facts, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

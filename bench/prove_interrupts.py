"""Ctrl-C at any moment leaves nothing running and nothing lost.

`python bench/prove_interrupts.py [--moments 6] [--seed 0] [--json]` launches the demo's model, presses Ctrl-C at a
random moment (half of the times a second one shortly after), and checks that the command ends, that no process is
left, that the ledger is settled and not below the cloud's own bill; at last a resumed run goes on behind where it was.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal
from typing import Any

from proof import Proof, finish, proof_in

from tasks.run_store_keys import PROGRESS

COMMAND = (
    *("launch", "demo", "--backend", "local", "--market", "calm", "--yes"),
    *("--set", "training.num_steps=1000000", "--set", "training.eval_every_steps=1000000"),
)
LATEST_SECONDS = 40.0
END_SECONDS = 90.0


def interrupt(proof: Proof, number: int, rng: random.Random) -> dict[str, Any]:
    """One launch and its Ctrl-C; what was found afterwards."""
    wait, twice = rng.uniform(0.2, LATEST_SECONDS), number % 2 == 1
    child = proof.start(*COMMAND, log=proof.home / "launch.out")
    time.sleep(wait)
    child.send_signal(signal.SIGINT)
    if twice:
        time.sleep(rng.uniform(0.2, 3.0))
        child.send_signal(signal.SIGINT)
    started = time.monotonic()
    try:
        code: int | None = child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - started
    what = f"Ctrl-C {'twice ' if twice else ''}after {wait:.1f} s"
    proof.check(code is not None, f"{what}: the command ends within {END_SECONDS:.0f} s")
    left = proof.wait_until_empty(10)
    proof.check(not left, f"{what}: nothing is left running: {left}")
    return {"after_seconds": round(wait, 1), "twice": twice, "exit_code": code, "seconds_to_end": round(seconds, 1)}


def check_settled(proof: Proof) -> list[str]:
    """Every run's ledger holds nothing back and is not below the bill."""
    states = []
    for run in (proof.json("status") or {}).get("runs", []):
        view = proof.json("ledger", run["run_id"]) or {}
        held, spent = Decimal(str(view.get("reserved_usd", "-1"))), Decimal(str(view.get("spent_usd", "-1")))
        bill = proof.true_bill_usd(run["run_id"])
        proof.check(held == 0, f"{run['run_id']} holds nothing back: ${held}")
        proof.check(spent >= bill, f"{run['run_id']}: ${spent} is not below the cloud's own bill ${bill}")
        states.append(f"{run['run_id']} {run['state']} at step {run['step']}")
    return states


def resumes(proof: Proof) -> bool:
    """The run that got farthest goes on behind where it stood."""
    runs = [run for run in (proof.json("status") or {}).get("runs", []) if run["checkpoint_step"]]
    if not proof.check(bool(runs), "at least one run got to a checkpoint"):
        return False
    farthest = max(runs, key=lambda run: run["checkpoint_step"])
    child = proof.start("resume", farthest["run_id"], log=proof.home / "resume.out")
    deadline = time.monotonic() + 120
    went_on = False
    while time.monotonic() < deadline and not went_on:
        newest = proof.read(farthest["run_id"], PROGRESS) or {}
        went_on = newest.get("step", 0) > farthest["step"]
        time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    child.wait(END_SECONDS)
    return proof.check(went_on, f"{farthest['run_id']} goes on behind step {farthest['step']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with proof_in() as proof:
        found = [interrupt(proof, number, rng) for number in range(arguments.moments)]
        states = check_settled(proof)
        went_on = resumes(proof)
        left = proof.wait_until_empty(10)
        proof.check(not left, f"nothing is left running: {left}")
        return finish(proof, {"interrupts": found, "runs": states, "went_on": went_on}, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

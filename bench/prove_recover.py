"""A run taken over by a second machine that knows nothing of it but its run store.

`python bench/prove_recover.py [--steps N] [--json]` launches the demo from one SLM_HOME with a run store in a folder
that both reach, stops its supervisor with SIGSTOP (a laptop that sleeps), recovers the run in an empty second SLM_HOME
and resumes it there. Then the first supervisor is woken. The second must adopt the living nodes and finish; the first
must end without having granted anything; the second's ledger must cover the cloud's bill; nothing may be left running.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from proof import Proof, finish, proof_in

from tasks.run_store_keys import LEDGER

WAIT_SECONDS = 240.0


def wait_for_step(proof: Proof, step: int) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if (proof.status().get("step") or 0) >= step:
            return True
        time.sleep(0.5)
    return False


def tokens_in(store: Path) -> list[int]:
    """Of all records of the ledger, in their order."""
    return [json.loads(path.read_bytes())["fencing_token"] for path in sorted((store / LEDGER).glob("*.json"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slm-shared-") as shared, proof_in() as laptop, proof_in() as desktop:
        log = Path(shared) / "laptop.log"
        launch = [
            "launch",
            "demo",
            "--yes",
            "--market",
            "calm",
            "--store",
            shared,
            "--set",
            f"training.num_steps={arguments.steps}",
        ]
        first = laptop.start(*launch, log=log)
        laptop.check(wait_for_step(laptop, 40), "the run trains on the first machine")
        [store] = Path(shared).glob("slm-*")
        os.kill(first.pid, signal.SIGSTOP)
        recovered = desktop.slm("recover", "--store", str(store), "--json")
        laptop.check(recovered.returncode == 0, f"recover: {recovered.stderr.strip()}")
        run_id = json.loads(recovered.stdout)["runs"][0]["run_id"] if recovered.returncode == 0 else ""
        second = desktop.start("resume", run_id, log=Path(shared) / "desktop.log")
        laptop.check(wait_for_step(desktop, 60), "the run goes on under the second machine")
        os.kill(first.pid, signal.SIGCONT)
        first.wait(timeout=WAIT_SECONDS)
        laptop.check("was taken over by another supervisor" in log.read_text(), "the first supervisor says why it ends")
        laptop.check(first.returncode == 1, f"the first supervisor ends with 1, not {first.returncode}")
        second.wait(timeout=2 * WAIT_SECONDS)
        status = desktop.status()
        laptop.check(status.get("state") == "SUCCEEDED", f"it succeeded, not {status.get('state')}")
        starts = [line for line in (Path(shared) / "desktop.log").read_text().splitlines() if "took over" in line]
        laptop.check(bool(starts), "the living nodes were adopted")
        tokens = tokens_in(store)
        laptop.check(tokens == sorted(tokens), f"no record of the first after the second had the run: {tokens}")
        bill = laptop.true_bill_usd(run_id)
        spent = status.get("spent_usd", 0)
        laptop.check(spent >= float(bill) - 1e-6, f"${spent} in the ledger covers the cloud's ${bill}")
        left = laptop.wait_until_empty(30) + desktop.wait_until_empty(30)
        laptop.check(not left, f"nothing is left: {left}")
        facts = {
            "spent_usd": spent,
            "bill_usd": float(bill),
            "cap_usd": status.get("cap_usd"),
            "tokens": sorted(set(tokens)),
            "records": len(tokens),
            "step": status.get("step"),
            "preemptions": status.get("num_preemptions"),
        }
        return finish(laptop, facts, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

"""The demo keeps its promises: a node killed, a node drained, learning, a budget, and nothing left running.

`python bench/prove_demo.py [--json]` runs `make demo` in an SLM_HOME of its own and checks the result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

from proof import PeakMemory, finish, proof_in

from tasks.run_store_keys import RESULT

ROOT = Path(__file__).resolve().parent.parent
MAX_SECONDS = 300
MAX_BYTES = 6 * 2**30
MIN_FALL_NATS = 2.0
MIN_BELOW_UNIGRAM_NATS = 0.7
BUDGET_USD = Decimal(100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with proof_in() as proof:
        started = time.monotonic()
        with PeakMemory(proof) as memory:
            demo = subprocess.run(
                ["make", "demo", f"DEMO_HOME={proof.home}"],
                cwd=ROOT,
                env=proof.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
        seconds = time.monotonic() - started
        if not arguments.json:
            print(demo.stdout)
        proof.check(demo.returncode == 0, f"make demo ends well (exit {demo.returncode}): {demo.stderr[-2000:]}")
        left = proof.wait_until_empty(10)
        proof.check(not left, f"nothing is left running: {left}")
        run = proof.status()
        run_id = str(run.get("run_id", "demo-1"))
        result = proof.read(run_id, RESULT) or {}
        first, last = result.get("first_heldout_loss", 0.0), result.get("heldout_loss", 99.0)
        unigram = result.get("unigram_entropy", 0.0)
        events_path = proof.run_dir(run_id) / "market" / "events.jsonl"
        market = events_path.read_text() if events_path.exists() else ""
        events = (proof.run_dir(run_id) / "events.jsonl").read_text() if market else ""
        spent = Decimal(str(run.get("spent_usd", "0")))
        proof.check('"kill"' in market, "the market killed a node")
        proof.check('"notice"' in market, "the market drained a node with notice")
        proof.check(events.count('"recovered"') >= 2, "training went on after each loss")
        proof.check(
            run.get("num_preemptions", 0) >= 2, f"both are counted as preemptions: {run.get('num_preemptions')}"
        )
        proof.check(run.get("num_failures") == 0, f"and neither as a failure of ours: {run.get('num_failures')}")
        proof.check(first - last > MIN_FALL_NATS, f"held-out loss falls by {first - last:.2f} > {MIN_FALL_NATS} nats")
        proof.check(
            unigram - last >= MIN_BELOW_UNIGRAM_NATS,
            f"it ends {unigram - last:.2f} >= {MIN_BELOW_UNIGRAM_NATS} nats below the unigram entropy",
        )
        proof.check(0 < spent <= BUDGET_USD, f"${spent} is spent within the budget")
        proof.check(proof.true_bill_usd(run_id) <= spent, "the ledger is not below the cloud's own bill")
        proof.check(seconds < MAX_SECONDS, f"{seconds:.0f} s < {MAX_SECONDS} s")
        proof.check(memory.peak_bytes < MAX_BYTES, f"{memory.peak_bytes / 2**30:.2f} GiB < 6 GiB")
        facts = {
            "seconds": round(seconds, 1),
            "peak_gib": round(memory.peak_bytes / 2**30, 2),
            "first_heldout_loss": first,
            "heldout_loss": last,
            "unigram_entropy": unigram,
            "spent_usd": spent,
            "true_bill_usd": proof.true_bill_usd(run_id),
            "left_running": left,
        }
        return finish(proof, facts, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

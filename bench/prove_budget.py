"""A share of the money stops a run at the cap with a checkpoint; more money finishes it, with the very same weights.

`python bench/prove_budget.py [--steps N] [--share S] [--json]` runs the demo calmly on two nodes in fp32 to its end,
then again with that share of what the first was settled at, a third without --share, then resumes it. A shorter run
needs a larger share: its start-up costs the same.
"""

from __future__ import annotations

import argparse
import sys
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from proof import Proof, finish, proof_in

from tasks.run_store_keys import RESULT

CALM = ("--backend", "local", "--market", "calm", "--nodes", "2", "--set", "precision=fp32", "--yes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's own")
    parser.add_argument("--share", type=Decimal, default=Decimal(1) / 3, help="of the whole run's dollars; a third")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    steps = ("--set", f"training.num_steps={arguments.steps}") if arguments.steps else ()
    with proof_in() as whole, proof_in() as cut:
        never_stopped = finished_run(whole, *steps)
        settled = Decimal(str(never_stopped["spent_usd"]))
        cap = (settled * arguments.share).quantize(Decimal("0.01"), rounding=ROUND_FLOOR)
        stopped = cut.slm("launch", "demo", *CALM, *steps, "--budget", str(cap), timeout=900)
        first = cut.status()
        cut.check(first.get("state") == "OUT_OF_BUDGET", f"the cap stops it: {first.get('state')} {stopped.stderr}")
        cut.check(Decimal(str(first.get("spent_usd", "-1"))) <= cap, f"${first.get('spent_usd')} <= ${cap}")
        cut.check((first.get("checkpoint_step") or 0) > 0, f"a checkpoint at step {first.get('checkpoint_step')}")
        cut.check(not cut.wait_until_empty(10), "nothing runs after the cap")
        resumed = cut.slm("resume", "--budget", "100", timeout=1200)
        last = cut.status()
        cut.check(last.get("state") == "SUCCEEDED", f"more money finishes it: {last.get('state')} {resumed.stderr}")
        weights = [(proof.read("demo-1", RESULT) or {}).get("weights_sha256") for proof in (whole, cut)]
        cut.check(weights[0] is not None and weights[0] == weights[1], f"the weights are the same: {weights}")
        cut.failures += whole.failures
        facts = {
            "settled_usd": settled,
            "cap_usd": cap,
            "spent_at_cap_usd": first.get("spent_usd"),
            "checkpoint_step": first.get("checkpoint_step"),
            "num_steps": last.get("num_steps"),
            "spent_in_all_usd": last.get("spent_usd"),
            "weights_sha256": weights,
        }
        return finish(cut, facts, as_json=arguments.json)


def finished_run(proof: Proof, *steps: str) -> dict[str, Any]:
    done = proof.slm("launch", "demo", *CALM, *steps, timeout=1200)
    found = proof.status()
    proof.check(found.get("state") == "SUCCEEDED", f"the whole run finishes: {found.get('state')} {done.stderr}")
    proof.check(not proof.wait_until_empty(10), "nothing runs afterwards")
    return found


if __name__ == "__main__":
    sys.exit(main())

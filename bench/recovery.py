"""How fast a run comes back on a real cluster that SkyPilot rents from: the lab of tests/e2e/cloudlab.

`python -m bench.recovery [--rounds 1]` prints JSON. Per round, one run loses its node to Slurm's own preemption, and
one loses it to a SIGKILL of all that runs on it. Every time is one of the run's own events or of a file's, in UTC:
launch to first step (as the supervisor saw it), loss to detection, detection to training again.
Needs root on Debian, as the lab does.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from datetime import UTC, datetime
from typing import Any

from tests.e2e.cloudlab.cluster import Lab, NoLab, lab_on_this_machine, until
from tests.e2e.cloudlab.people import User, bucket_on_the_bridge, first_user, one_more

STEPS = 1500
BOUNDS = {
    "launch_to_first_step_seconds": 90.0,
    "reclaim_to_detection_seconds": 15.0,
    "node_kill_to_detection_seconds": 45.0,
    "detection_to_training_seconds": 90.0,
}
"""What must hold for the largest of all rounds."""
LOSSES = ("reclaim", "node_kill")


def lose(lab: Lab, how: str, node: str) -> datetime:
    """Take the node; when that was."""
    now = datetime.now(UTC)
    if how == "reclaim":
        lab.reclaim(node)
    else:
        lab("node_kill", node)
    return now


def at(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["at"])


def one_round(lab: Lab, user: User, how: str) -> dict[str, float]:
    """One run that loses its node once; seconds."""
    launched_at = datetime.now(UTC)
    supervisor = user.launch(f"training.num_steps={STEPS}")
    until("a checkpoint", user.trains)
    held = lab.hold_training(node := (lab.running() or {})["nodes"])
    lost_at = lose(lab, how, node)
    recovered = until("training again", lambda: user.events("recovered"))[0]
    for process in held:
        if process.is_running():
            process.kill()
    if user.finish(supervisor) != 0:
        raise SystemExit(user.said())
    running = next(event for event in user.events("state") if event["state"] == "RUNNING")
    said = re.search(r"after (\d+\.\d+) s", recovered["message"])
    assert said is not None, recovered
    back = float(said[1])
    return {
        "launch_to_first_step_seconds": (at(running) - launched_at).total_seconds(),
        f"{how}_to_detection_seconds": round((at(recovered) - lost_at).total_seconds() - back, 1),
        "detection_to_training_seconds": back,
    }


def measured(rounds: int) -> dict[str, list[float]]:
    """Every measured time, by name."""
    found: dict[str, list[float]] = {name: [] for name in BOUNDS}
    with lab_on_this_machine() as lab, bucket_on_the_bridge() as bucket, first_user(lab, bucket) as first:
        for number in range(rounds):
            for how in LOSSES:
                with one_more(first, f"{how.replace('_', '-')}-{number}") as user:
                    for name, seconds in one_round(lab, user, how).items():
                        found[name].append(round(seconds, 1))
                        print(f"{how} {number}: {name} {seconds:.1f}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="of two runs each")
    rounds = parser.parse_args().rounds
    try:
        found = measured(rounds)
    except NoLab as refusal:
        print(json.dumps({"skipped": f"no lab on this machine: {refusal}"}))
        return 0
    results = {
        name: {"all": times, "median": statistics.median(times), "largest": max(times), "at_most": BOUNDS[name]}
        for name, times in found.items()
    }
    late = [name for name, times in found.items() if max(times) > BOUNDS[name]]
    print(json.dumps({"rounds": rounds, **results, "over_the_bound": late}, indent=1))
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())

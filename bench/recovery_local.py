"""How long a lease of two nodes on this machine takes to start, and to train again after each kind of change.

    python -m bench.recovery_local [--rounds 3] [--json]

Real nodes as a backend starts them, with a small model. "seconds" is from the moment of the change (SIGKILL, the
notice's moment to leave, the start of a node) until a new group of workers has made a step; "phases" is what the
workers wrote themselves, from the moment that the controller noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.node.notice import LEAVE_SECONDS
from tests.support.ray_nodes import Nodes

BOUND_SECONDS = 180.0
NOTICE_SECONDS = 8.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the values of every round, as JSON")
    options = parser.parse_args()
    rounds = [one_round(number) for number in range(options.rounds)]
    if options.json:
        print(json.dumps({"cpus": os.cpu_count(), "rounds": rounds}, indent=1))
        return 0
    print(f"{'change':<24} {'median s':>9} {'worst s':>9}   {options.rounds} round(s), {os.cpu_count()} cpus")
    for name in rounds[0]["seconds"]:
        values = [each["seconds"][name] for each in rounds]
        print(f"{name:<24} {statistics.median(values):>9.1f} {max(values):>9.1f}")
    print(f"{'memory of all, MiB':<24} {max(each['memory_mib'] for each in rounds):>9}")
    return 0


def one_round(number: int) -> dict[str, Any]:
    """One lease: start, loss of a worker, loss of a node, growth, notice, loss of the head."""
    seconds: dict[str, float] = {}
    with Nodes(2) as nodes:
        nodes.start(0)
        nodes.start(1)
        measure(seconds, "start of two nodes", nodes, lambda: nodes.trains(2))
        nodes.wait("a checkpoint", nodes.checkpoints, BOUND_SECONDS)
        memory = sum(process.memory_full_info().pss for rank in (0, 1) for process in nodes.family(rank)) // 2**20

        incarnation = nodes.progress()["incarnation"]
        for process in nodes.family(1):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
        measure(seconds, "worker killed", nodes, lambda: nodes.trains(2, incarnation))

        incarnation = nodes.progress()["incarnation"]
        nodes.kill(1)
        measure(seconds, "node killed", nodes, lambda: nodes.trains(1, incarnation))

        nodes.start(1)
        measure(seconds, "node added", nodes, lambda: nodes.trains(2))

        incarnation = nodes.progress()["incarnation"]
        nodes.notice(1, NOTICE_SECONDS)
        measure(seconds, "node drained", nodes, lambda: nodes.trains(1, incarnation))
        seconds["node drained"] -= NOTICE_SECONDS - LEAVE_SECONDS

        gcs = [process for process in nodes.family(0) if process.name() == "gcs_server"]
        psutil.Process(gcs[0].pid).kill()
        measure(seconds, "head killed, node ends", nodes, lambda: nodes.processes[0].poll() is not None)
        phases = nodes.phases()
    rounded = {name: round(value, 2) for name, value in seconds.items()}
    return {"round": number, "seconds": rounded, "memory_mib": memory, "phases": phases}


def measure(seconds: dict[str, float], name: str, nodes: Nodes, condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    nodes.wait(name, condition, BOUND_SECONDS)
    seconds[name] = time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())

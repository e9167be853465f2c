"""How much of the paid time ends up in the weights while a spot market takes a node a minute, and where the rest goes.

    python bench/goodput.py [--minutes 10] [--every 60] [--seed 0] [--json]

Two nodes of the local cloud train without an end. The market is seeded: lifetimes are exponential, so that of the two
nodes one is taken every `--every` seconds on average, half of them with a notice of 15 s; it may be the head's. Goodput
is the seconds of steps that the weights kept, over the seconds from the first node's start to the stop. A loss counts
from the moment that the market took the node until a group of workers made a step again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from proof import Proof, finish, proof_in

from tasks import run_store_keys as keys

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.backends.local.records import EVENTS_FILE, read_lines
from orchestrator.runs.goodput import kept_seconds
from trainer.run_store.base import DirectoryStore

RUN = "demo-1"
NUM_NODES = 2
NOTICE_SECONDS = 15
NOTICE_SHARE = 0.5
BOUND_SECONDS = 20.0
"""From a kill to training again, the median over nodes other than the head's."""
START_SECONDS = 180.0
DRAIN_BOUND_SECONDS = 60.0
LOOK_SECONDS = 0.2
RESTART_PHASES = ("shutdown", "workers", "handover", "imports", "fabric", "data", "model", "compile")
"""What a group costs whose surviving processes are started anew; the rest is needed by any new group."""


def command(options: argparse.Namespace) -> tuple[str, ...]:
    per_hour = 3600 / (options.every * NUM_NODES)
    market = f"hazard:{per_hour:g},notice={NOTICE_SHARE},notice_seconds={NOTICE_SECONDS}"
    settings = {
        "local.time_scale": 1,
        "local.seed": options.seed,
        "training.num_steps": 1_000_000,
        "training.eval_every_steps": 1_000_000,
        "optimizer.decay_fraction": 0.0,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    launch = ("launch", "demo", "--backend", "local", "--nodes", str(NUM_NODES), "--yes", "--budget", "1000")
    return (*launch, "--market", market, *words)


@dataclass
class Group:
    """One group of workers, by its own account."""

    incarnation: int
    world_size: int
    reason: str
    noticed_at: float
    trains_at: float
    seconds: dict[str, float]
    parent_step: int


@dataclass
class Seen:
    """What was seen while it ran: the newest step of each incarnation, as its progress told it."""

    newest_step: dict[int, int] = field(default_factory=dict)

    def look(self, proof: Proof) -> None:
        newest = proof.read(RUN, keys.PROGRESS) or {}
        if newest.get("step") is not None:
            incarnation = int(newest["incarnation"])
            self.newest_step[incarnation] = max(int(newest["step"]), self.newest_step.get(incarnation, 0))


def groups_of(store: Path) -> list[Group]:
    """All that made a step, in the order of their incarnations."""
    groups = []
    for path in (store / keys.PHASES).glob("*.json"):
        facts = json.loads(path.read_text())
        start = json.loads((store / keys.incarnation(facts["incarnation"])).read_text())
        noticed = datetime.fromisoformat(facts["started_at"]).timestamp()
        groups.append(
            Group(
                incarnation=int(facts["incarnation"]),
                world_size=int(facts["world_size"]),
                reason=facts["reason"],
                noticed_at=noticed,
                trains_at=noticed + facts["total_seconds"],
                seconds=facts["seconds"],
                parent_step=0 if start["parent"] is None else int(start["parent"]["step"]),
            )
        )
    return sorted(groups, key=lambda group: group.incarnation)


def losses_of(market: Path, until: float) -> list[dict[str, Any]]:
    """Every node that the market took before `until`, with the moment of its notice."""
    noticed: dict[str, float] = {}
    found = []
    for line in read_lines(market / EVENTS_FILE):
        at = datetime.fromisoformat(line["at"]).timestamp()
        if line["event"] == "notice":
            noticed[line["instance_id"]] = at
        elif line["event"] == "kill" and at < until:
            found.append({"at": at, "rank": line["rank"], "noticed_at": noticed.get(line["instance_id"])})
    return found


def steps_of(store: Path) -> dict[int, list[int]]:
    """Steps that each incarnation recorded; a killed one loses the records of its last seconds, a leaving one none."""
    found: dict[int, list[int]] = {}
    for path in sorted(store.glob(f"{keys.METRICS}*/*.jsonl")):
        incarnation = keys.incarnation_of_metrics(path.relative_to(store).as_posix())
        assert incarnation is not None
        found.setdefault(incarnation, []).extend(json.loads(line)["step"] for line in path.read_text().splitlines())
    return found


def recoveries(
    groups: Sequence[Group], losses: Sequence[dict[str, Any]], seen: Seen, store: Path
) -> list[dict[str, Any]]:
    """Per loss: who, how, until when, and how many steps had to be done again.

    Of losses that one group makes good, the first has cost the steps: those that came while it started took none. A
    node that was lost before it had joined the group that trained stopped nobody.
    """
    steps = steps_of(store)
    found = []
    counted: set[int] = set()
    for loss in sorted(losses, key=lambda loss: loss["noticed_at"] or loss["at"]):
        since = loss["noticed_at"] or loss["at"]
        after = next((group for group in groups if group.trains_at > since and group.noticed_at > since - 1.0), None)
        kind = "drained" if loss["noticed_at"] else "killed"
        facts: dict[str, Any] = {"node": "head" if loss["rank"] == 0 else "other", "how": kind}
        facts["after_seconds"] = round(since - groups[0].trains_at, 1)
        training = next((group for group in reversed(groups) if group.trains_at <= since), None)
        if training is not None and loss["rank"] >= training.world_size:
            found.append(facts | {"had_joined": False})
            continue
        if after is not None:
            before = max(
                (incarnation for incarnation in seen.newest_step if incarnation < after.incarnation), default=None
            )
            newest = max([*steps.get(before, [0]), seen.newest_step.get(before, 0)]) if before is not None else 0
            # A drained node is left before it is taken: what counts is how long nobody trained.
            began = after.noticed_at if kind == "drained" and after.noticed_at < loss["at"] else loss["at"]
            facts |= {
                "seconds": round(after.trains_at - began, 2),
                "detected_after_seconds": round(max(0.0, after.noticed_at - began), 2),
                "phases": after.seconds,
                "steps_lost": 0 if after.incarnation in counted else max(0, newest - after.parent_step),
                "while_another_was_recovered": after.incarnation in counted,
                "trains_on": after.world_size,
            }
            counted.add(after.incarnation)
        found.append(facts)
    return found


def summary(found: Sequence[dict[str, Any]], node: str, how: str) -> dict[str, Any] | None:
    """Median and worst of one kind of loss."""
    mine = [loss for loss in found if (loss["node"], loss["how"]) == (node, how) and "seconds" in loss]
    if not mine:
        return None
    seconds = [loss["seconds"] for loss in mine]
    names = list(dict.fromkeys(name for loss in mine for name in loss["phases"]))
    phases = {name: round(statistics.median(loss["phases"].get(name, 0.0) for loss in mine), 2) for name in names}
    return {
        "count": len(mine),
        "median_seconds": round(statistics.median(seconds), 2),
        "worst_seconds": round(max(seconds), 2),
        "detected_after_seconds": round(statistics.median(loss["detected_after_seconds"] for loss in mine), 2),
        "phases_median_seconds": phases,
        "steps_lost_median": statistics.median(loss["steps_lost"] for loss in mine),
        "steps_lost_worst": max(loss["steps_lost"] for loss in mine),
    }


def restart_cost(groups: Sequence[Group]) -> dict[str, Any] | None:
    """What it costs that Ray Train starts the survivors' processes anew, in groups that go on after a change."""
    again = [group for group in groups if group.incarnation > 0 and "shutdown" in group.seconds]
    if not again:
        return None
    anew = [sum(group.seconds.get(name, 0.0) for name in RESTART_PHASES) for group in again]
    whole = [sum(group.seconds.values()) for group in again]
    return {
        "groups": len(again),
        "median_seconds": round(statistics.median(anew), 2),
        "of_median_seconds": round(statistics.median(whole), 2),
        "phases": RESTART_PHASES,
    }


def run(proof: Proof, options: argparse.Namespace) -> tuple[Seen, float]:
    """Train for so long; what was seen, and when the stop was asked for."""
    seen = Seen()
    log = proof.home / "supervisor.out"
    supervisor = proof.start(*command(options), log=log)
    began = time.time()
    while time.time() < began + START_SECONDS and not seen.newest_step:
        seen.look(proof)
        time.sleep(LOOK_SECONDS)
    proof.check(bool(seen.newest_step), f"training starts within {START_SECONDS:.0f} s")
    until = time.time() + 60 * options.minutes
    told = 0.0
    while time.time() < until and proof.check(supervisor.poll() is None, "the run goes on by itself"):
        seen.look(proof)
        if time.time() > told + 30:
            told = time.time()
            print(f"{until - told:.0f} s left, steps by incarnation {seen.newest_step}", file=sys.stderr, flush=True)
        time.sleep(LOOK_SECONDS)
    stopped_at = time.time()
    ended = proof.slm("stop", RUN, timeout=300)
    proof.check(ended.returncode == 0, f"slm stop ends it: {ended.stderr[-500:]}")
    if proof.failures:
        print(log.read_text()[-4000:], file=sys.stderr)
    return seen, stopped_at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, from its first step on")
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between two losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with proof_in() as proof:
        seen, stopped_at = run(proof, options)
        store, market = proof.home / "store" / RUN, proof.run_dir(RUN) / "market"
        groups, losses = groups_of(store), losses_of(market, stopped_at)
        found = recoveries(groups, losses, seen, store)
        lines = read_lines(market / EVENTS_FILE)
        first = datetime.fromisoformat(next(line["at"] for line in lines if line["event"] == "start")).timestamp()
        kept = kept_seconds(DirectoryStore(store, create=False))
        kinds = {
            f"{node}_{how}": summary(found, node, how) for node in ("other", "head") for how in ("killed", "drained")
        }
        killed = kinds["other_killed"]
        proof.check(killed is not None, "a node other than the head's is killed and recovered from; take more minutes")
        if killed is not None:
            within = killed["median_seconds"] <= BOUND_SECONDS
            proof.check(within, f"median from kill to training again {killed['median_seconds']} s <= {BOUND_SECONDS} s")
        drained = [loss for loss in found if loss["how"] == "drained" and "seconds" in loss]
        kept_all = all(loss["steps_lost"] == 0 for loss in drained)
        proof.check(kept_all, f"no step is lost to a drain: {[loss['steps_lost'] for loss in drained]}")
        facts = {
            "minutes": options.minutes,
            "every_seconds": options.every,
            "seed": options.seed,
            "goodput": round(kept / (stopped_at - first), 4),
            "goodput_since_first_step": round(kept / (stopped_at - groups[0].trains_at), 4),
            "kept_seconds": round(kept, 1),
            "seconds": round(stopped_at - first, 1),
            "losses": len(losses),
            "steps": max(seen.newest_step.values()),
            "start_seconds": round(groups[0].trains_at - first, 2),
            "start_phases": groups[0].seconds,
            "recovery": kinds,
            "survivors_restarted": restart_cost(groups),
            "each": found,
        }
        if options.json:
            return finish(proof, facts, as_json=True)
        return show(facts, proof)


def show(facts: dict[str, Any], proof: Proof) -> int:
    print(f"goodput {100 * facts['goodput']:.1f} % over {facts['seconds']:.0f} s with {facts['losses']} losses")
    print(f"start of two nodes: {facts['start_seconds']} s {facts['start_phases']}")
    print(f"{'loss':<15} {'count':>5} {'median s':>9} {'worst s':>8} {'seen s':>7} {'steps lost':>11}")
    for kind, row in facts["recovery"].items():
        if row is None:
            print(f"{kind:<15} {0:>5}")
            continue
        lost = f"{row['steps_lost_median']:.0f}, {row['steps_lost_worst']}"
        times = f"{row['median_seconds']:>9.1f} {row['worst_seconds']:>8.1f} {row['detected_after_seconds']:>7.1f}"
        print(f"{kind:<15} {row['count']:>5} {times} {lost:>11}   {row['phases_median_seconds']}")
    cost = facts["survivors_restarted"]
    if cost is not None:
        print(f"starting the survivors' processes anew costs {cost['median_seconds']} of {cost['of_median_seconds']} s")
    for failure in proof.failures:
        print(f"FAILED: {failure}")
    return 1 if proof.failures else 0


if __name__ == "__main__":
    sys.exit(main())

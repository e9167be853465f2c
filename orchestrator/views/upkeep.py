"""What lives and what was ended, as tables and as facts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestrator.figures import UNKNOWN, dollars, plural
from orchestrator.upkeep.doctor import Level
from orchestrator.upkeep.inventory import Outcome, Verdict
from orchestrator.views.runs import bullets, following, say, state_of, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from orchestrator.upkeep.doctor import Finding
    from orchestrator.upkeep.inventory import Cluster, Inventory
    from orchestrator.upkeep.sky_costs import Comparison
    from orchestrator.upkeep.stop_all import Ending

WHY = {
    Verdict.SUPERVISED: "its run is supervised",
    Verdict.PAID: "paid for until its grant ends; slm resume takes it over",
    Verdict.ELSEWHERE: "another machine has taken its run over",
    Verdict.EXPIRED: "its paid time is over",
    Verdict.SETTLED: "the books have settled it",
    Verdict.UNKNOWN: "the books do not know it",
    Verdict.FOREIGN: "does not carry our name",
}


def inventory(found: Inventory, console: Console) -> None:
    """The answer, the clusters, what could not be looked at, the next command."""
    tell(console, answer(found))
    if found.clusters:
        shown = table(
            "cluster", "where", "nodes", "$/h", "since", "state", "why", right=("nodes", "$/h"), fold=("why",)
        )
        for one in found.clusters:
            shown.add_row(
                one.name,
                one.backend,
                str(one.num_nodes),
                f"{one.usd_per_hour:.2f}",
                f"{one.started_at:%m-%d %H:%M} UTC",
                one.outcome.value,
                WHY[one.verdict] + (f"; {one.detail}" if one.detail else ""),
            )
        say(console, "", shown)
    if found.problems:
        say(console, "")
        bullets(console, found.problems)
    if found.leaked:
        following(console, "slm reconcile")


def answer(found: Inventory) -> str:
    """How much lives and what was done, in one line."""
    ours = [one for one in found.clusters if one.verdict is not Verdict.FOREIGN]
    if not ours:
        blind = (
            f", as far as could be seen: {plural(len(found.problems), 'place')} did not answer"
            if found.problems
            else ""
        )
        return f"Nothing of ours (slm-{found.owner}-) lives{blind}."
    done = Counter(one.outcome for one in ours)
    parts = [f"{number} {outcome.value}" for outcome, number in sorted(done.items())]
    left = [one for one in ours if one.outcome is not Outcome.ENDED]
    hourly = sum(one.usd_per_hour for one in left)
    cost = f"; what lives costs {dollars(hourly)}/h" if left else ""
    return f"{plural(len(ours), 'cluster')} of ours (slm-{found.owner}-): {', '.join(parts)}{cost}."


def inventory_facts(found: Inventory) -> dict[str, Any]:
    """What `slm reconcile --json` prints."""
    return {
        "owner": found.owner,
        "dry_run": found.dry_run,
        "clusters": [cluster_facts(one) for one in found.clusters],
        "problems": found.problems,
        "num_leaked": len(found.leaked),
    }


def cluster_facts(one: Cluster) -> dict[str, Any]:
    """One cluster."""
    return {
        "name": one.name,
        "backend": one.backend,
        "run_id": one.run_id,
        "num_nodes": one.num_nodes,
        "usd_per_hour": one.usd_per_hour,
        "started_at": one.started_at,
        "verdict": one.verdict.value,
        "outcome": one.outcome.value,
        "detail": one.detail,
    }


def ending(done: Ending, console: Console) -> None:
    """Whether anything is left, what became of every run, and of everything that lived."""
    tell(console, "Something may be left." if done.is_left else "Nothing is left running.")
    if done.runs:
        shown = table("run", "state", "checkpoint", "spent $", "cap $", right=("checkpoint", "spent $", "cap $"))
        for one in done.runs:
            saved = UNKNOWN if one.checkpoint_step is None else f"step {one.checkpoint_step}"
            shown.add_row(one.run_id, state_of(one), saved, f"{one.spent_usd:.2f}", f"{one.cap_usd:.2f}")
        say(console, "", shown)
    lines = [*done.failures]
    if done.interrupted:
        lines.append("interrupted: every run was asked to stop and goes on stopping; only the waiting has ended")
    if lines:
        say(console, "")
        bullets(console, lines)
    say(console, "")
    inventory(done.inventory, console)
    if done.is_left and not done.inventory.leaked:
        following(console, "slm stop --all")


def ending_facts(done: Ending) -> dict[str, Any]:
    """What `slm stop --all --json` prints."""
    return {
        "runs": done.runs,
        "failures": done.failures,
        "interrupted": done.interrupted,
        "reconciled": inventory_facts(done.inventory),
        "is_left": done.is_left,
    }


def comparison(run_id: str, found: Comparison, console: Console) -> None:
    """Both sums of what both know, then each lease."""
    ours, theirs = found.both_usd
    known = [one for one in found.leases if one.skypilot_usd is not None]
    if found.problem:
        tell(console, f"SkyPilot did not say what {run_id} cost: {found.problem}")
    elif not known:
        tell(console, f"SkyPilot on this machine knows no cluster of {run_id}.")
    else:
        tell(
            console,
            f"{run_id}: of {plural(len(known), 'lease')} that both know, ours charged {dollars(ours)}, SkyPilot "
            f"reports {dollars(theirs)}: {dollars(ours - theirs)} more here.",
        )
    shown = table("lease", "cluster", "ours $", "SkyPilot $", "difference $", right=("ours $", "SkyPilot $"))
    for one in found.leases:
        other = UNKNOWN if one.skypilot_usd is None else f"{one.skypilot_usd:.4f}"
        difference = UNKNOWN if one.difference_usd is None else f"{one.difference_usd:+.4f}"
        shown.add_row(one.lease_id, one.cluster, f"{one.charged_usd:.4f}", other, difference)
    say(console, "", shown)
    following(console, f"slm ledger {run_id}")


def comparison_facts(found: Comparison) -> dict[str, Any]:
    """What `slm ledger --compare --json` prints."""
    leases = [
        {
            "lease_id": one.lease_id,
            "cluster": one.cluster,
            "charged_usd": one.charged_usd,
            "skypilot_usd": one.skypilot_usd,
            "difference_usd": one.difference_usd,
        }
        for one in found.leases
    ]
    return {"leases": leases, "problem": found.problem or None}


def finding(one: Finding, console: Console) -> None:
    """One line, and under it the way out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=len(Level.WARN))
    grid.add_row(one.level.value, f"{one.name}: {one.detail}")
    if one.way_out:
        grid.add_row("", f"-> {one.way_out}")
    say(console, grid)


def verdict(found: Sequence[Finding], console: Console) -> None:
    """How many of each, in one line."""
    counts = Counter(one.level for one in found)
    parts = [f"{counts[level]} {level.value}" for level in Level if counts[level]]
    say(console, "")
    tell(console, f"{plural(len(found), 'finding')}: {', '.join(parts)}.")


def examination_facts(found: Sequence[Finding]) -> dict[str, Any]:
    """What `slm doctor --json` prints."""
    return {
        "findings": [
            {"name": one.name, "level": one.level.value, "detail": one.detail, "way_out": one.way_out or None}
            for one in found
        ],
        "num_failed": sum(one.level is Level.FAIL for one in found),
        "num_warned": sum(one.level is Level.WARN for one in found),
    }

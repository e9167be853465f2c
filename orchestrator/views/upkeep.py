"""Terminal output of `slm reconcile`, `slm stop --all`, `slm ledger --compare` and `slm doctor`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from orchestrator.figures import UNKNOWN, dollars, plural
from orchestrator.upkeep.doctor import Level
from orchestrator.upkeep.inventory import Outcome, Verdict
from orchestrator.views.runs import bullets, following, say, state_words, table, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from orchestrator.upkeep.doctor import Finding
    from orchestrator.upkeep.inventory import Inventory
    from orchestrator.upkeep.sky_costs import Comparison
    from orchestrator.upkeep.stop_all import Ending

WHY = {
    Verdict.SUPERVISED: "its run is supervised",
    Verdict.PAID: "its money is reserved until its grant ends; slm resume takes it over",
    Verdict.ELSEWHERE: "another machine has taken over its run",
    Verdict.EXPIRED: "orphan: its paid time is over",
    Verdict.SETTLED: "orphan: the ledger has settled it",
    Verdict.UNKNOWN: "orphan: the ledger does not know it",
    Verdict.FOREIGN: "its name does not begin with ours",
}


def inventory(found: Inventory, console: Console) -> None:
    """The answer, the clusters, what could not be looked at, the next command."""
    tell(console, answer(found))
    if found.clusters:
        shown = table(
            "cluster", "where", "nodes", "$/h", "since", "state", "why", right=("nodes", "$/h"), fold=("why",)
        )
        for cluster in found.clusters:
            shown.add_row(
                cluster.name,
                cluster.backend,
                str(cluster.num_nodes),
                f"{cluster.usd_per_hour:.2f}",
                f"{cluster.started_at:%m-%d %H:%M} UTC",
                cluster.outcome.value,
                WHY[cluster.verdict] + (f"; {cluster.detail}" if cluster.detail else ""),
            )
        say(console, "", shown)
    if found.problems:
        say(console, "")
        bullets(console, found.problems)
    if found.orphans:
        following(console, "slm reconcile")


def answer(found: Inventory) -> str:
    """How much lives and what was done, in one line."""
    ours = [cluster for cluster in found.clusters if cluster.verdict is not Verdict.FOREIGN]
    if not ours:
        blind = f", but {plural(len(found.problems), 'backend')} could not be checked" if found.problems else ""
        return f"No cluster of ours (slm-{found.owner}-) is running{blind}."
    done = Counter(our.outcome for our in ours)
    parts = [f"{number} {outcome.value}" for outcome, number in sorted(done.items())]
    left = [our for our in ours if our.outcome is not Outcome.ENDED]
    hourly = sum(item.usd_per_hour for item in left)
    cost = f"; running clusters cost {dollars(hourly)}/h" if left else ""
    return f"{plural(len(ours), 'cluster')} of ours (slm-{found.owner}-): {', '.join(parts)}{cost}."


def ending(done: Ending, console: Console) -> None:
    """Whether anything is left, and the result for every run and every cluster that was found."""
    tell(console, "Something may still be running." if done.is_left else "Nothing is running any more.")
    if done.runs:
        shown = table("run", "state", "checkpoint", "spent $", "cap $", right=("checkpoint", "spent $", "cap $"))
        for run in done.runs:
            saved = UNKNOWN if run.checkpoint_step is None else f"step {run.checkpoint_step}"
            shown.add_row(run.run_id, state_words(run), saved, f"{run.spent_usd:.2f}", f"{run.cap_usd:.2f}")
        say(console, "", shown)
    lines = [*done.failures]
    if done.interrupted:
        lines.append("interrupted: every run was asked to stop and continues to do so; only the wait has ended")
    if lines:
        say(console, "")
        bullets(console, lines)
    say(console, "")
    inventory(done.inventory, console)
    if done.is_left and not done.inventory.orphans:
        following(console, "slm stop --all")


def comparison(run_id: str, found: Comparison, console: Console) -> None:
    """Both sums of what both know, then each lease."""
    ours, theirs = found.both_usd
    known = [lease for lease in found.leases if lease.skypilot_usd is not None]
    if found.problem:
        tell(console, f"SkyPilot's cost report for {run_id} could not be read: {found.problem}")
    elif not known:
        tell(console, f"SkyPilot on this machine has no cluster of {run_id}.")
    else:
        tell(
            console,
            f"{run_id}: for {plural(len(known), 'lease')} in both, the ledger charged {dollars(ours)} and SkyPilot "
            f"reports {dollars(theirs)}: the ledger has {dollars(ours - theirs)} more.",
        )
    shown = table("lease", "cluster", "ledger $", "SkyPilot $", "difference $", right=("ledger $", "SkyPilot $"))
    for lease in found.leases:
        other = UNKNOWN if lease.skypilot_usd is None else f"{lease.skypilot_usd:.4f}"
        difference = UNKNOWN if lease.difference_usd is None else f"{lease.difference_usd:+.4f}"
        shown.add_row(lease.lease_id, lease.cluster, f"{lease.charged_usd:.4f}", other, difference)
    say(console, "", shown)
    following(console, f"slm ledger {run_id}")


def finding(finding: Finding, console: Console) -> None:
    """One line, and the fix below it."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=len(Level.WARN))
    grid.add_row(finding.level.value, f"{finding.name}: {finding.detail}")
    if finding.fix:
        grid.add_row("", f"-> {finding.fix}")
    say(console, grid)


def verdict(found: Sequence[Finding], console: Console) -> None:
    """How many of each, in one line."""
    counts = Counter(entry.level for entry in found)
    parts = [f"{counts[level]} {level.value}" for level in Level if counts[level]]
    say(console, "")
    tell(console, f"{plural(len(found), 'finding')}: {', '.join(parts)}.")

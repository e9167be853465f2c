"""What lives and what was ended, as tables and as facts."""

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
    Verdict.PAID: "paid for until its grant ends; slm resume takes it over",
    Verdict.ELSEWHERE: "another machine has taken its run over",
    Verdict.EXPIRED: "its paid time is over",
    Verdict.SETTLED: "the ledger has settled it",
    Verdict.UNKNOWN: "the ledger does not know it",
    Verdict.FOREIGN: "does not carry our name",
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
    if found.leaked:
        following(console, "slm reconcile")


def answer(found: Inventory) -> str:
    """How much lives and what was done, in one line."""
    ours = [cluster for cluster in found.clusters if cluster.verdict is not Verdict.FOREIGN]
    if not ours:
        blind = (
            f", as far as could be seen: {plural(len(found.problems), 'place')} did not answer"
            if found.problems
            else ""
        )
        return f"Nothing of ours (slm-{found.owner}-) lives{blind}."
    done = Counter(our.outcome for our in ours)
    parts = [f"{number} {outcome.value}" for outcome, number in sorted(done.items())]
    left = [our for our in ours if our.outcome is not Outcome.ENDED]
    hourly = sum(item.usd_per_hour for item in left)
    cost = f"; what lives costs {dollars(hourly)}/h" if left else ""
    return f"{plural(len(ours), 'cluster')} of ours (slm-{found.owner}-): {', '.join(parts)}{cost}."


def ending(done: Ending, console: Console) -> None:
    """Whether anything is left, what became of every run, and of everything that lived."""
    tell(console, "Something may be left." if done.is_left else "Nothing is left running.")
    if done.runs:
        shown = table("run", "state", "checkpoint", "spent $", "cap $", right=("checkpoint", "spent $", "cap $"))
        for run in done.runs:
            saved = UNKNOWN if run.checkpoint_step is None else f"step {run.checkpoint_step}"
            shown.add_row(run.run_id, state_words(run), saved, f"{run.spent_usd:.2f}", f"{run.cap_usd:.2f}")
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


def comparison(run_id: str, found: Comparison, console: Console) -> None:
    """Both sums of what both know, then each lease."""
    ours, theirs = found.both_usd
    known = [lease for lease in found.leases if lease.skypilot_usd is not None]
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
    for lease in found.leases:
        other = UNKNOWN if lease.skypilot_usd is None else f"{lease.skypilot_usd:.4f}"
        difference = UNKNOWN if lease.difference_usd is None else f"{lease.difference_usd:+.4f}"
        shown.add_row(lease.lease_id, lease.cluster, f"{lease.charged_usd:.4f}", other, difference)
    say(console, "", shown)
    following(console, f"slm ledger {run_id}")


def finding(finding: Finding, console: Console) -> None:
    """One line, and under it the way out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=len(Level.WARN))
    grid.add_row(finding.level.value, f"{finding.name}: {finding.detail}")
    if finding.way_out:
        grid.add_row("", f"-> {finding.way_out}")
    say(console, grid)


def verdict(found: Sequence[Finding], console: Console) -> None:
    """How many of each, in one line."""
    counts = Counter(entry.level for entry in found)
    parts = [f"{counts[level]} {level.value}" for level in Level if counts[level]]
    say(console, "")
    tell(console, f"{plural(len(found), 'finding')}: {', '.join(parts)}.")

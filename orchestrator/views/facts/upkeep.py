"""Facts of `slm reconcile`, `slm stop --all`, `slm ledger --compare` and `slm doctor` for `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.upkeep.doctor import Level
from orchestrator.views.facts.runs import run_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.upkeep.doctor import Finding
    from orchestrator.upkeep.inventory import Cluster, Inventory
    from orchestrator.upkeep.sky_costs import Comparison
    from orchestrator.upkeep.stop_all import Ending


def inventory_facts(found: Inventory) -> dict[str, Any]:
    """What `slm reconcile --json` prints."""
    return {
        "owner": found.owner,
        "dry_run": found.dry_run,
        "clusters": [cluster_facts(cluster) for cluster in found.clusters],
        "problems": found.problems,
        "num_orphans": len(found.orphans),
    }


def cluster_facts(cluster: Cluster) -> dict[str, Any]:
    """One cluster."""
    return {
        "name": cluster.name,
        "backend": cluster.backend,
        "run_id": cluster.run_id,
        "num_nodes": cluster.num_nodes,
        "usd_per_hour": cluster.usd_per_hour,
        "started_at": cluster.started_at,
        "verdict": cluster.verdict.value,
        "result": cluster.outcome.value,
        "detail": cluster.detail,
    }


def ending_facts(done: Ending) -> dict[str, Any]:
    """What `slm stop --all --json` prints."""
    return {
        "runs": [run_facts(run) for run in done.runs],
        "failures": done.failures,
        "interrupted": done.interrupted,
        "inventory": inventory_facts(done.inventory),
        "is_anything_left": done.is_left,
    }


def comparison_facts(found: Comparison) -> dict[str, Any]:
    """What `slm ledger --compare --json` prints."""
    leases = [
        {
            "lease_id": lease.lease_id,
            "cluster": lease.cluster,
            "charged_usd": lease.charged_usd,
            "skypilot_usd": lease.skypilot_usd,
            "difference_usd": lease.difference_usd,
        }
        for lease in found.leases
    ]
    return {"leases": leases, "problem": found.problem or None}


def examination_facts(found: Sequence[Finding]) -> dict[str, Any]:
    """What `slm doctor --json` prints."""
    return {
        "findings": [
            {"name": entry.name, "level": entry.level.value, "detail": entry.detail, "fix": entry.fix or None}
            for entry in found
        ],
        "num_failed": sum(entry.level is Level.FAIL for entry in found),
        "num_warned": sum(entry.level is Level.WARN for entry in found),
    }

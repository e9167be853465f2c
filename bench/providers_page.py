"""Writes docs/providers.md from cost/data: what ends a node on each cloud when nobody is left to.

python -m bench.providers_page [--out docs/providers.md]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cost.market.providers import KillerKind, Provider, providers, refusal
from orchestrator.figures import duration

NONE = "-"
HEADS = (
    "cloud",
    "ends a node without us",
    "slowest that needs no guest",
    "time limit",
    "window",
    "guest's power-off ends billing",
)
ABOUT = (
    "Made by `python -m bench.providers_page` from `cost/data/providers.csv` and `cost/data/killers.csv`, where each "
    "value has its source; one without a source says that it is assumed. Whoever rents arms these killers; what no "
    "backend of ours arms yet, a limit on Azure, does not count in a plan, which leaves it out "
    "([clouds.md](clouds.md))."
)
KINDS = (
    "A cloud needs killers of two kinds, one of which works with the guest hung: our guard (guest), a power-off that "
    "the guest's own init has scheduled (kernel), a time limit at the provider's (provider), or a prepaid account that "
    "runs empty (balance). SkyPilot's autodown runs on the head node and counts for nothing."
)
BALANCE = (
    "Where only a balance works with the guest hung ({clouds}), the whole balance counts against the cap; automatic "
    "payment must be off."
)
WINDOW = (
    "The window is the longest time from a node's start until the provider's limit is armed; there is none where the "
    "limit is part of the request. A node that hangs in it and is lost sight of is found by `slm reconcile` only."
)


def page() -> str:
    """The whole page."""
    known = [provider for name, provider in sorted(providers().items()) if name != "local"]
    rented = [entry for entry in known if refusal(entry, allow_unguarded=False) is None]
    refused = [entry for entry in known if entry not in rented]
    by_balance = ", ".join(provider.name for provider in rented if provider.balance_only)
    return "\n".join(
        [
            *("# What ends a node when nobody is left to", "", ABOUT, "", KINDS, ""),
            *(f"## May be rented from: {len(rented)}", "", *table(rented), ""),
            *(BALANCE.format(clouds=by_balance), "", WINDOW, ""),
            *(f"## Refused unless --allow-unguarded: {len(refused)}", "", *table(refused), ""),
            *("There a node whose guest hangs costs on until a supervisor, `slm reconcile` or you end it.", ""),
        ]
    )


def table(ones: Sequence[Provider]) -> list[str]:
    return [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *(row(item) for item in ones)]


def row(provider: Provider) -> str:
    counted = [killer for killer in provider.killers if killer.kind is not KillerKind.SKY]
    killers = ", ".join(f"{killer.name} ({killer.kind})" for killer in counted)
    slowest = duration(provider.kill_latency_seconds) if any(killer.survives_hung_guest for killer in counted) else NONE
    window = duration(provider.arm_seconds) if provider.arm_seconds else NONE
    off = "yes" if provider.guest_shutdown_stops_billing else "no"
    return f"| {provider.name} | {killers} | {slowest} | {provider.ttl.value} | {window} | {off} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/providers.md"))
    options = parser.parse_args(arguments)
    options.out.write_text(page(), encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes docs/providers.md from cost/data: what ends a node on each cloud when no supervisor is left.

python -m bench.providers_page [--out docs/providers.md]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cost.market.providers import Provider, TerminatorKind, providers, refusal
from orchestrator.figures import duration

NONE = "-"
HEADS = (
    "cloud",
    "terminators",
    "kill latency when the guest hangs",
    "time limit",
    "unguarded window",
    "power-off from inside ends billing",
)
ABOUT = (
    "Made by `python -m bench.providers_page` from `cost/data/providers.csv` and `cost/data/terminators.csv`, where "
    "each value has its source; a value without one says that it is assumed. A terminator is a means of ending a node "
    "without the supervisor. The backend that rents a node arms its terminators. One that no backend arms yet, the "
    "limit on Azure, does not count in a plan, which skips that cloud ([clouds.md](clouds.md))."
)
KINDS = (
    "A cloud needs two kinds of terminators, one of which works when the node's operating system (the guest) hangs: "
    "our guard (guest), a power-off that the guest's own init has scheduled (kernel), a time limit at the provider "
    "(provider), or a prepaid account that runs empty (balance). SkyPilot's autodown runs on the head node and is not "
    "counted."
)
BALANCE = (
    "Where only the balance works when the guest hangs ({clouds}), the whole balance counts against the cap; automatic "
    "payment must be off."
)
WINDOW = (
    "The unguarded window is the longest time from a node's start until the provider's limit is armed; there is none "
    "where the limit is part of the request. If a node hangs within it and the supervisor loses track of it, only "
    "`slm reconcile` finds it."
)


def page() -> str:
    """The whole page."""
    known = [provider for name, provider in sorted(providers().items()) if name != "local"]
    rented = [entry for entry in known if refusal(entry, allow_unguarded=False) is None]
    refused = [entry for entry in known if entry not in rented]
    by_balance = ", ".join(provider.name for provider in rented if provider.balance_only)
    return "\n".join(
        [
            *("# What ends a node when no supervisor is left", "", ABOUT, "", KINDS, ""),
            *(f"## May be rented from: {len(rented)}", "", *table(rented), ""),
            *(BALANCE.format(clouds=by_balance), "", WINDOW, ""),
            *(f"## Refused unless --allow-unguarded: {len(refused)}", "", *table(refused), ""),
            *("There a node whose guest hangs costs money until a supervisor, `slm reconcile` or you end it.", ""),
        ]
    )


def table(rows: Sequence[Provider]) -> list[str]:
    return [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *(row(provider) for provider in rows)]


def row(provider: Provider) -> str:
    counted = [terminator for terminator in provider.terminators if terminator.kind is not TerminatorKind.SKY]
    terminators = ", ".join(f"{terminator.name} ({terminator.kind})" for terminator in counted)
    needs_no_guest = any(terminator.survives_hung_guest for terminator in counted)
    slowest = duration(provider.kill_latency_seconds) if needs_no_guest else NONE
    window = duration(provider.arm_seconds) if provider.arm_seconds else NONE
    off = "yes" if provider.guest_shutdown_stops_billing else "no"
    return f"| {provider.name} | {terminators} | {slowest} | {provider.ttl.value} | {window} | {off} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/providers.md"))
    options = parser.parse_args(arguments)
    options.out.write_text(page(), encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`slm doctor`: checks everything that must be right before money is spent; each finding comes with its fix.

The checks change nothing, except for one key that is written into the store and deleted again. Orphans are only
reported: `slm reconcile` terminates them. Whatever may hang runs in its own process or thread with a time limit.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cost.errors import SlmError
from cost.ledger.leases import usd
from cost.ledger.ledger import Ledger, replay
from cost.market.providers import TerminatorKind, provider, refusal
from orchestrator.backends.base import Backend
from orchestrator.backends.registry import cloud_supports
from orchestrator.backends.sky.enabled_clouds import Enabled, enabled_clouds
from orchestrator.backends.sky.terminators import armed_provider
from orchestrator.figures import duration, plural
from orchestrator.runs.status import open_runs
from orchestrator.settings import DISTRIBUTION, Home
from orchestrator.upkeep import clock_skew
from orchestrator.upkeep.inventory import reconcile
from tasks.stores import opening as stores
from tasks.stores.opening import open_store
from trainer.run_store.base import Store

GIB = 2**30
FAIL_BELOW_GIB = 1.0
WARN_BELOW_GIB = 10.0
"""A checkpoint of a model of a billion parameters takes about 12 GiB."""
PROBE_PREFIX = "doctor/"
OLDEST_TORCH = (2, 11)
RAY = "2.60.0"
SKYPILOT = "0.14.1"


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and its fix if it is not OK."""

    name: str
    level: Level
    detail: str
    fix: str = ""


def examine(
    home: Home,
    backends: Sequence[Backend],
    *,
    store_uri: str | None = None,
    time_server: tuple[str, int] | None = clock_skew.TIME_SERVER,
    ask_skypilot: Callable[[], Enabled] = enabled_clouds,
) -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    yield from packages()
    yield home_folder(home)
    yield disk("disk", home.root)
    yield from ledgers(home)
    yield from clouds(ask_skypilot)
    store = None
    for finding in storage(home, store_uri):
        if isinstance(finding, Finding):
            yield finding
        else:
            store = finding
    yield clock(store, time_server)
    yield from orphans(home, backends)


# ---------------------------------------------------------------- this machine


def packages() -> Iterator[Finding]:
    """Python, and the packages that training on this machine needs."""
    running = f"Python {platform.python_version()} on {platform.system()}, {plural(os.cpu_count() or 1, 'core')}"
    yield Finding("python", Level.OK, f"{running}, {DISTRIBUTION} {installed(DISTRIBUTION) or 'from a checkout'}")
    training = {name: installed(name) for name in ("torch", "lightning", "ray")}
    missing = [name for name, found in training.items() if found is None]
    shown = ", ".join(f"{name} {found}" for name, found in training.items() if found is not None)
    if missing:
        detail = f"{', '.join(missing)} not installed: this machine can plan and supervise, not train"
        yield Finding("training", Level.WARN, detail, "pip install 'slm-spot[train]'")
    elif numbers(training["torch"] or "") < OLDEST_TORCH or training["ray"] != RAY:
        wanted = f"torch {'.'.join(map(str, OLDEST_TORCH))} or newer and ray {RAY}"
        yield Finding("training", Level.FAIL, f"{shown}; {wanted} is needed", "pip install 'slm-spot[train]'")
    else:
        yield Finding("training", Level.OK, shown)


def installed(name: str) -> str | None:
    """The version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())


def home_folder(home: Home) -> Finding:
    """It holds the ledger and the addresses of nodes."""
    mode = stat.S_IMODE(home.root.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding("home", Level.WARN, f"{home.root} is open to others ({mode:o})", f"chmod 700 {home.root}")
    return Finding("home", Level.OK, f"{home.root}, clusters are named slm-{home.owner_id()}-...")


def disk(name: str, folder: Path) -> Finding:
    return space(name, folder, shutil.disk_usage(folder).free / GIB)


def space(name: str, folder: Path, free: float) -> Finding:
    """Whether this many free GiB are enough."""
    detail = f"{free:.1f} GiB free at {folder}"
    if free >= WARN_BELOW_GIB:
        return Finding(name, Level.OK, detail)
    level = Level.FAIL if free < FAIL_BELOW_GIB else Level.WARN
    return Finding(
        name, level, detail, "free some space, or set SLM_HOME to a larger disk; on a full disk no grant can be written"
    )


# ---------------------------------------------------------------- the ledger


def ledgers(home: Home) -> Iterator[Finding]:
    """Whether the database is intact, and whether its entries add up to the totals of its leases."""
    if not home.database.exists():
        yield Finding("ledger", Level.OK, "no run was launched yet")
        return
    try:
        with open_runs(home) as runs:
            errors = [row[0] for row in runs.db.execute("PRAGMA integrity_check")]
            if errors != ["ok"]:
                yield Finding("ledger", Level.FAIL, f"{home.database} is damaged: {errors[0]}", RESTORE)
                return
            all_runs = runs.all()
            wrong = [
                text
                for run in all_runs
                if (text := discrepancy(Ledger(runs.db, run.run_id, fencing_token=run.fencing_token)))
            ]
    except (SlmError, sqlite3.Error) as error:
        yield Finding("ledger", Level.FAIL, str(error), RESTORE)
        return
    for text in wrong:
        yield Finding("ledger", Level.FAIL, text, "do not launch; keep a copy of the file, and report this as a bug")
    if not wrong:
        yield Finding(
            "ledger", Level.OK, f"{plural(len(all_runs), 'run')}, intact, every balance is the sum of its entries"
        )


RESTORE = (
    "do not launch; nodes terminate themselves. Restore a copy of the file, or move it away and run: slm reconcile"
)


def discrepancy(ledger: Ledger) -> str:
    """How the sum of the entries differs from the totals of leases and other lines; empty if it does not."""
    spent, held = replay(ledger.entries())
    leases, lines = ledger.accounts(), ledger.lines()
    spent_there = sum(lease.spent_micro_usd for lease in leases) + sum(line.spent_micro_usd for line in lines)
    held_there = sum(lease.held_micro_usd for lease in leases) + sum(line.held_micro_usd for line in lines)
    if (spent, held) == (spent_there, held_there):
        return ""
    return (
        f"the entries of run {ledger.run_id} add up to ${usd(spent)} spent and ${usd(held)} held, its leases and other "
        f"lines to ${usd(spent_there)} and ${usd(held_there)}"
    )


# ---------------------------------------------------------------- clouds


def clouds(ask_skypilot: Callable[[], Enabled]) -> Iterator[Finding]:
    """The clouds that can be rented from, and their terminators."""
    yield terminator_finding("local", "this machine simulates a spot market: slm launch demo")
    found = installed("skypilot")
    if found is None:
        yield Finding(
            "skypilot", Level.WARN, "not installed: no cloud can be rented from", "pip install 'slm-spot[cloud]'"
        )
        return
    if found != SKYPILOT:
        detail = f"version {found}; slm is made for {SKYPILOT}"
        yield Finding("skypilot", Level.WARN, detail, f"pip install skypilot=={SKYPILOT}")
    asked = ask_skypilot()
    if asked.problem is not None:
        yield Finding("skypilot", Level.FAIL, asked.problem, "sky check; if that fails too, install SkyPilot anew")
    elif not asked.enabled:
        yield Finding("skypilot", Level.WARN, "has credentials for no cloud", "sky check")
    else:
        yield Finding("skypilot", Level.OK, f"{found}, has credentials for {', '.join(asked.enabled)}")
        for name in asked.enabled:
            yield terminator_finding(name, "")


def terminator_finding(name: str, about: str) -> Finding:
    """The terminators of this cloud that count."""
    profile = provider(name)
    counted = [terminator for terminator in profile.terminators if terminator.kind is not TerminatorKind.SKY]
    detail = ", ".join(
        f"{terminator.name} ({terminator.kind}, {duration(terminator.latency_seconds)})" for terminator in counted
    )
    detail = f"terminators: {detail}" + (f"; {about}" if about else "")
    armed = profile if name == "local" else armed_provider(profile, cloud_supports())
    refused = refusal(armed, allow_unguarded=False)
    if refused is not None:
        return Finding(f"cloud {name}", Level.WARN, refused, "slm plan skips its offers; rent elsewhere")
    if profile.balance_only:
        fix = "keep no more on the prepaid account than a run may cost, with automatic payment off"
        return Finding(f"cloud {name}", Level.WARN, detail, fix)
    if profile.arm_seconds:
        detail += f"; the provider's limit is armed up to {duration(profile.arm_seconds)} after the start"
    return Finding(f"cloud {name}", Level.OK, detail)


# ---------------------------------------------------------------- the store


def storage(home: Home, uri: str | None) -> Iterator[Finding | Store]:
    """The checks of the run store, and last the store itself if it can be opened."""
    try:
        store = open_store(uri or str(home.root / "store"))
    except (SlmError, OSError) as error:
        yield Finding("store", Level.FAIL, str(error), "give --store a folder or bucket that this user may write to")
        return
    folder = store_folder(store)
    if folder is not None:
        yield disk("store disk", folder)
    yield from probe(store)
    yield store


def probe(store: Store) -> Iterator[Finding]:
    """Every permission and property that a run needs of its store."""
    asked = stores.probe(store)
    wrong = [finding for finding in asked if not finding.ok]
    if not wrong:
        names = ", ".join(finding.name for finding in asked)
        yield Finding("store", Level.OK, f"{store.uri}: {names}: as they should be")
    for check in wrong:
        fix = "allow this user to read, write, list and delete there, or use another store"
        if check.name == "conditional writes":
            fix = "use another store, or launch with --single-supervisor and run only one"
        yield Finding("store", Level.FAIL, f"{store.uri}: {check.name}: {check.detail}", fix)


def store_folder(store: Store) -> Path | None:
    """The folder of a directory store; None for other stores."""
    parts = urlsplit(store.uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


# ---------------------------------------------------------------- clock and orphans


def clock(store: Store | None, time_server: tuple[str, int] | None) -> Finding:
    """This machine's clock, compared with the store's and a time server's."""
    asked: list[clock_skew.Skew | str] = []
    if store is not None:
        asked.append(clock_skew.store_skew(store, store_folder(store)))
    if time_server is not None:
        asked.append(clock_skew.time_server_skew(*time_server))
    seen = [finding for finding in asked if isinstance(finding, clock_skew.Skew)]
    missing = [finding for finding in asked if isinstance(finding, str)]
    detail = "; ".join([*(f"{skew.seconds:+.1f} s against {skew.source}" for skew in seen), *missing])
    if not seen:
        return Finding("clock", Level.WARN, f"cannot be compared: {detail}", "compare it with another clock")
    worst = max(abs(skew.seconds) - skew.uncertain_seconds for skew in seen)
    if worst >= clock_skew.FAIL_SECONDS:
        return Finding("clock", Level.FAIL, f"{detail}: stores refuse requests that are 15 min off", SYNCHRONIZE)
    if worst >= clock_skew.WARN_SECONDS:
        detail += ": grants do not depend on it, times in the ledger do"
        return Finding("clock", Level.WARN, detail, SYNCHRONIZE)
    return Finding("clock", Level.OK, detail)


SYNCHRONIZE = "enable time synchronization: timedatectl set-ntp true"


def orphans(home: Home, backends: Sequence[Backend]) -> Iterator[Finding]:
    """Orphans: instances that nobody pays for. They are only reported."""
    try:
        found = reconcile(home, backends, dry_run=True)
    except SlmError as error:
        yield Finding("orphans", Level.FAIL, f"running instances cannot be compared with the ledger: {error}", RESTORE)
        return
    for problem in found.problems:
        yield Finding("orphans", Level.WARN, problem, "slm reconcile")
    for orphan in found.orphans:
        nodes = f"{plural(orphan.num_nodes, 'node')} of {orphan.name} at {orphan.backend}"
        detail = f"{nodes}, {orphan.verdict}: ${orphan.usd_per_hour:.2f}/h"
        yield Finding("orphans", Level.FAIL, detail, "slm reconcile")
    if not found.problems and not found.orphans:
        alive = [cluster for cluster in found.clusters if cluster.name.startswith(f"slm-{found.owner}-")]
        yield Finding(
            "orphans", Level.OK, f"none; {plural(len(alive), 'cluster')} of ours, all paid for" if alive else "none"
        )

"""`slm stop --all`: checkpoint and stop every unfinished run, then terminate the orphans.

The requests are in the ledger before anything is waited for, so that Ctrl-C, or a kill, ends only the wait: a
supervised run continues to stop, and the same command again does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cost.errors import SlmError
from orchestrator.backends.registry import every_backend
from orchestrator.events import Emit, Event
from orchestrator.runs.status import RunStatus, open_runs, status
from orchestrator.settings import Home
from orchestrator.upkeep.inventory import Inventory, Outcome, Verdict, reconcile


class StopRun(Protocol):
    """As `orchestrator.supervisor.requests.stop`."""

    def __call__(self, run_id: str | None, *, home: Home, on_event: Emit) -> RunStatus: ...


@dataclass(frozen=True, slots=True)
class Ending:
    """The result for every unfinished run, and all clusters that were found."""

    runs: tuple[RunStatus, ...]
    failures: tuple[str, ...]
    """Runs that did not stop, with the reason."""
    interrupted: bool
    inventory: Inventory

    @property
    def is_left(self) -> bool:
        """Whether anything of ours may still run or cost money."""
        alive = [cluster for cluster in self.inventory.clusters if cluster.outcome is not Outcome.ENDED]
        paid = any(instance.verdict is not Verdict.FOREIGN for instance in alive)
        return bool(self.failures or self.inventory.problems or paid or self.interrupted)


def stop_all(
    stop_run: StopRun, home: Home, on_event: Emit, *, take_stock: Callable[[Home], Inventory] | None = None
) -> Ending:
    """Stop every unfinished run, one after the other, and terminate orphans; Ctrl-C ends only the wait."""
    unfinished = request_stops(home)
    failures, interrupted = [], False
    for run_id in unfinished:
        on_event(Event("stop", f"stopping {run_id}", datetime.now(UTC), {"run_id": run_id}))
        try:
            stop_run(run_id, home=home, on_event=on_event)
        except SlmError as error:
            failures.append(f"{run_id}: {error}")
        except KeyboardInterrupt:
            interrupted = True
            break
    inventory = take_stock(home) if take_stock is not None else reconcile(home, every_backend(home))
    known = {run.run_id: run for run in status(None, home=home)}
    return Ending(tuple(known[run_id] for run_id in unfinished), tuple(failures), interrupted, inventory)


def request_stops(home: Home) -> list[str]:
    """Record that every unfinished run is to stop; their ids."""
    with open_runs(home) as runs:
        unfinished = [run.run_id for run in runs.all() if not run.is_finished]
        for run_id in unfinished:
            runs.request_stop(run_id)
    return unfinished

"""What commands act with: `orchestrator.supervisor.requests`, unless `cli.main` was given something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import typer

if TYPE_CHECKING:
    from decimal import Decimal
    from pathlib import Path

    from orchestrator.events import Emit
    from orchestrator.runs.options import LaunchRequest
    from orchestrator.runs.status import RunStatus, RunSummary
    from orchestrator.settings import Home
    from orchestrator.supervisor.lease.stopping import StopSwitch
    from tasks.recipe.schema import Recipe


class Actions(Protocol):
    """Everything that rents, ends or writes. Looking is `orchestrator.runs.status`, which needs no twin."""

    def launch(
        self, request: LaunchRequest, *, home: Home, on_event: Emit, switch: StopSwitch | None = None
    ) -> RunSummary: ...

    def resume(
        self,
        run_id: str | None,
        *,
        home: Home,
        budget_usd: Decimal | None,
        on_event: Emit,
        switch: StopSwitch | None = None,
        notify_target: str | None = None,
        single_supervisor: bool = False,
    ) -> RunSummary: ...

    def stop(self, run_id: str | None, *, home: Home, on_event: Emit) -> RunStatus: ...

    def recover(self, store_uri: str, *, home: Home) -> RunStatus: ...

    def prepare(self, recipe: Recipe, *, home: Home, on_event: Emit) -> Path: ...


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call of `cli.main`."""

    arguments: tuple[str, ...]
    actions: Actions | None = None


def given_invocation(context: typer.Context) -> Invocation:
    """What `cli.main` was called with."""
    given = context.obj
    assert isinstance(given, Invocation)
    return given


def given_actions(context: typer.Context) -> Actions:
    """What `cli.main` was given to act with, or the real thing."""
    given = given_invocation(context).actions
    if given is not None:
        return given
    from orchestrator.supervisor import requests as launch

    return launch

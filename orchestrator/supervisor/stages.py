"""From one stage of a run to the next, under one cap.

Invariants: a stage begins only when all that it reads is in the run store; before it rents anything, what all later
stages are planned to cost is reserved, so that it can spend the rest alone; and a stage whose manifest is in the store
is not run again. A stage that has used up its share of the cap ends like one that finished: later stages go on with
what it has made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate, Stop, StopReason
from orchestrator.clock import Clock
from orchestrator.runs.records import RunState
from orchestrator.supervisor.incidentals import Incidentals
from orchestrator.supervisor.lease_policy import TermsOf, worst_price
from tasks.recipe.schema import Recipe
from tasks.recipe.stages import StageOptions
from tasks.stages.base import Needs, Stage
from tasks.stages.manifest import Manifest, Outcome, inputs_of, is_complete, read_manifest, write_manifest
from tasks.stages.registry import missing_inputs
from trainer.run_store.base import Store, StoreError

SECONDS_PER_HOUR = 3600
RENT_SLACK = Decimal("0.1")
"""Of the smallest lease: for the moments between paying and renting."""
OUTCOMES = {StopReason.FINISHED: Outcome.FINISHED, StopReason.BUDGET: Outcome.CAP}
"""After every other reason the run ends, and the stage is continued when somebody resumes it."""


class StageRunner(Protocol):
    """Runs one stage to its end: a `Supervisor` with leases, or a program on this machine."""

    def until_stop(self) -> Stop: ...


class Concluder(Protocol):
    """Ends a run whose stages have ended; every `Supervisor` is one."""

    def settle_all(self) -> None: ...

    def conclude(self, stop: Stop) -> RunState: ...


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage of this run, with who runs it and what that is planned to cost."""

    stage: Stage
    runner: StageRunner
    rents: bool = True
    planned_usd: Decimal = Decimal(0)
    """What is reserved for it while earlier stages run."""

    @property
    def name(self) -> str:
        return self.stage.options.name


@dataclass(frozen=True, slots=True)
class StageSequence:
    """All stages of a run, in order. Any supervisor may `run()` it at any time: it continues where the run stands."""

    stages: Sequence[StageOptions]
    """All of the recipe; `jobs` has those that this supervisor may run."""
    jobs: Sequence[StageJob]
    ledger: Ledger
    store: Store
    clock: Clock
    concluder: Concluder
    tell: Callable[..., None]

    def run(self) -> RunState:
        """Run what is not complete; returns the final state of the run."""
        stop = self._through(self.pending())
        if self.ledger.open_accounts():  # of a stage that was complete before its supervisor could settle
            self.concluder.settle_all()
        return self.concluder.conclude(stop)

    def pending(self) -> list[StageJob]:
        """The first stage that is not complete and all after it, with the stages before that each supervisor repeats.

        Where all are complete and one of them stopped at the cap, that one is tried again: somebody resumed the run.
        """
        first = next((index for index, job in enumerate(self.jobs) if not self._is_complete(job)), None)
        if first is None:
            first = next((index for index, job in enumerate(self.jobs) if self._is_at_cap(job)), len(self.jobs))
        repeated = [job for job in self.jobs[:first] if job.stage.repeats and first < len(self.jobs)]
        return [*repeated, *self.jobs[first:]]

    def _is_complete(self, job: StageJob) -> bool:
        return is_complete(self.store, self.stages, job.name, cap_usd=self.ledger.balance().cap_usd)

    def _is_at_cap(self, job: StageJob) -> bool:
        manifest = read_manifest(self.store, job.name)
        return manifest is not None and manifest.outcome is Outcome.CAP

    def _through(self, pending: Sequence[StageJob]) -> Stop:
        """Run these stages until the run has to stop; a stage at the cap stops no other one."""
        stop = Stop(StopReason.FINISHED, "every stage is complete")
        at_cap: list[tuple[StageJob, Stop]] = []
        for index, job in enumerate(pending):
            missing = missing_inputs(self.store, job.stage)
            if missing:
                reason = f"{job.name} cannot begin: nothing in the run store matches {', '.join(missing)}"
                if not at_cap:
                    return Stop(StopReason.GAVE_UP, reason)
                self.tell("warning", reason)
                continue
            stop = self._run(job, pending[index + 1 :])
            if stop.reason is StopReason.BUDGET:
                at_cap.append((job, stop))
            elif stop.reason is not StopReason.FINISHED:
                return stop
        if not at_cap:
            return stop
        job, at_its_cap = at_cap[0]
        if job is pending[-1]:
            return at_its_cap
        return Stop(StopReason.BUDGET, f"{job.name} used up its share of the cap: {at_its_cap.message}")

    def _run(self, job: StageJob, later: Sequence[StageJob]) -> Stop:
        if job.rents:
            for follower in later:
                self._reserve(follower)
            self.ledger.begin_stage(job.name, at_ms=self.clock.now_ms())
            if sum(each.rents for each in self.jobs) > 1:
                self.tell("stage", f"stage {job.name} begins", stage=job.name)
        stop = job.runner.until_stop()
        if stop.reason in OUTCOMES:
            self._complete(job, OUTCOMES[stop.reason])
        return stop

    def _reserve(self, job: StageJob) -> None:
        if not job.planned_usd:
            return
        held = self.ledger.reserve_stage(job.name, job.planned_usd, at_ms=self.clock.now_ms())
        if held < job.planned_usd:
            self.tell(
                "warning",
                f"stage {job.name} is planned to cost ${job.planned_usd:.2f}, and only ${held:.2f} of the cap is left "
                "for it",
            )

    def _complete(self, job: StageJob, outcome: Outcome) -> None:
        """Write the manifest, unless the program of the stage has done so."""
        try:
            inputs = inputs_of(self.store, self.stages, job.name)
            known = read_manifest(self.store, job.name)
            if known is not None and known.outcome is outcome is Outcome.FINISHED and known.inputs == inputs:
                return
            cap_usd = self.ledger.balance().cap_usd if outcome is Outcome.CAP else None
            options = job.stage.options
            write_manifest(self.store, Manifest(options.name, options.kind, outcome, inputs, cap_usd=cap_usd))
        except StoreError as error:
            self.tell("warning", f"the end of stage {job.name} is not written to the run store: {error}")


def planned_usd(
    stage: Stage,
    recipe: Recipe,
    candidates: Sequence[Candidate],
    *,
    terms: TermsOf,
    scale: float,
    incidentals: Incidentals | None = None,
) -> Decimal:
    """What the stage is planned to cost on the offer that the plan likes best, at its highest price.

    The recipe may say it. Else it is what the planner expects for the run's training, by FLOPs, and the time that the
    stage needs beside; and never less than its smallest lease, with disks and transfers.
    """
    needs = stage.needs(recipe)
    if not needs.devices or not candidates:
        return Decimal(0)
    if stage.options.reserve_usd is not None:
        return stage.options.reserve_usd
    best = candidates[0]
    worst = worst_price(best.offer, terms(best.offer).price_bound) * best.num_nodes
    beside = Decimal(0) if incidentals is None else incidentals.rates(best.offer).usd_per_hour(best.num_nodes)
    start_hours = terms(best.offer).smallest_hours(scale)
    work_hours = Decimal(needs.node_seconds * scale) / SECONDS_PER_HOUR / best.num_nodes
    computing_usd = (best.expected_usd or Decimal(0)) * share_of_training(needs, recipe)
    return (worst + beside) * (start_hours + work_hours) * (1 + RENT_SLACK) + computing_usd


def share_of_training(needs: Needs, recipe: Recipe) -> Decimal:
    """FLOPs of the stage over those of the recipe's pre-training."""
    if needs.workload is None:
        return Decimal(0)
    return Decimal(needs.workload.total_flops) / Decimal(recipe.workload().total_flops)

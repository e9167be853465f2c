"""What our own runs on clouds saw, for the next plan: losses by kind of node, and speeds by GPU.

Reads the books and the run stores as they are, changes and creates nothing, so that it works beside a living run.
Invariant: a run of the local backend teaches nothing here, since its market is a game and its GPU this machine's
processor. What cannot be read is left out and named in `problem`; it is never an error of the plan.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost.errors import SlmError
from cost.ledger.database import MIGRATIONS
from cost.ledger.leases import MILLISECONDS_PER_HOUR
from cost.ledger.recovery import Cause
from cost.market.clouds import cloud_terms
from cost.market.hardware import accelerator
from cost.market.preemption import Sighting
from cost.performance.layouts import Cluster, own_layout, placed
from cost.performance.software import OUR_FRAMEWORK, Software, our_trainer
from cost.performance.throughput import Calibration, default_calibration
from cost.performance.workload import Workload
from cost.plan.plans import Seen
from orchestrator.planning.measured import SETTLED_STEPS
from orchestrator.planning.starts import typical
from orchestrator.runs.records import TERMINAL
from orchestrator.settings import Home
from tasks import run_store_keys as keys
from tasks.recipe.schema import AUTO, PRECISIONS, ConcretePrecision, Recipe

LOCAL = "local"
BOOKS_TIMEOUT_SECONDS = 1.0
"""A plan does not wait longer for a writer of the books."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SlmError)
"""What a row or a file of another version, or a damaged one, can raise."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The speed of one run over all of its devices, with all that the model needs to say what it expected."""

    run_id: str
    work: Workload
    cluster: Cluster
    micro_batch_size: int
    software: Software
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Experience:
    """Oldest run first."""

    sightings: tuple[Sighting, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    problem: str | None = None
    starts: Mapping[str, float] = field(default_factory=dict)
    """By cloud, seconds from the request to a node that is set up."""

    def calibrated(self, base: Calibration | None = None) -> Calibration:
        """The constants, corrected by what was measured; the newest run on a GPU has the last word."""
        calibration = default_calibration() if base is None else base
        for measurement in self.measurements:
            layout = own_layout(measurement.work, measurement.cluster, measurement.micro_batch_size)
            expected = placed(measurement.work, measurement.cluster, layout, calibration, measurement.software)
            calibration = calibration.with_measurement(
                OUR_FRAMEWORK,
                measurement.cluster.accelerator.name,
                measured=measurement.tokens_per_second,
                modelled=expected.tokens_per_second,
            )
        return calibration

    @property
    def seen(self) -> Seen:
        """For the text of a plan."""
        return Seen(
            {measurement.cluster.accelerator.name: measurement.run_id for measurement in self.measurements},
            self.sightings,
            self.problem,
            self.starts,
        )


def experience_of(home: Home) -> Experience:
    """Everything that the books and stores of this home teach; nothing where there are none."""
    if not home.database.exists():
        return Experience()
    try:
        with closing(_opened(home.database)) as books:
            runs = _rows(books, "SELECT * FROM runs ORDER BY CAST(created_at AS INTEGER), rowid")
            leases = _rows(books, "SELECT * FROM leases")
    except (sqlite3.Error, *UNREADABLE) as error:
        return Experience(problem=f"nothing was learned from own runs: {home.database} cannot be read ({error})")
    unread: list[str] = []
    rented = _rented(leases, dict(_on_clouds(runs, unread)), unread)
    measured = tuple(_measurements(home, rented, unread))
    named = ", ".join(dict.fromkeys(unread))
    problem = f"nothing was learned from what could not be read: {named}" if unread else None
    return Experience(_sightings(rented), measured, problem, typical(home.starts))


def begun_precision(home: Home, recipe: Recipe) -> ConcretePrecision | None:
    """In what an unfinished run computes that began from this recipe, where the recipe leaves it to the planner.

    The same command after a crash goes on with that run, whatever a plan would choose by now.
    """
    if recipe.precision != AUTO or not home.database.exists():
        return None
    by_digest = {recipe.in_precision(precision).digest(): precision for precision in PRECISIONS}
    finished = {state.value for state in TERMINAL}
    try:
        with closing(_opened(home.database)) as books:
            runs = _rows(books, "SELECT * FROM runs ORDER BY CAST(created_at AS INTEGER), rowid")
    except (sqlite3.Error, *UNREADABLE):
        return None  # the launch itself opens the books, and says what is wrong with them
    begun = [by_digest.get(run["recipe_digest"]) for run in runs if run["state"] not in finished]
    return next((precision for precision in reversed(begun) if precision is not None), None)


# ---------------------------------------------------------------- the books


def _opened(path: Path) -> sqlite3.Connection:
    """For reading only: the books are neither created nor migrated by a plan.

    Raises:
        ValueError: A newer slm wrote them.
        sqlite3.Error: They are damaged, or no books at all.
    """
    books = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BOOKS_TIMEOUT_SECONDS)
    try:
        books.row_factory = sqlite3.Row
        version = int(books.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise ValueError(f"format {version}, this slm knows up to {len(MIGRATIONS)}")
    except BaseException:
        books.close()
        raise
    return books


def _rows(books: sqlite3.Connection, query: str) -> list[sqlite3.Row]:
    return books.execute(query).fetchall()


def _on_clouds(runs: Sequence[sqlite3.Row], unread: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Recipes of the runs that rented, by name, oldest first."""
    for run in runs:
        try:
            if json.loads(run["options_json"])["backend"] != LOCAL:
                yield run["run_id"], json.loads(run["recipe_json"])
        except UNREADABLE:
            unread.append(f"run {run['run_id']}")


@dataclass(frozen=True, slots=True)
class _Rental:
    """One lease of a run on a cloud."""

    lease_id: str
    offer: Mapping[str, Any]
    lost: bool
    node_hours: float


def _rented(
    leases: Sequence[sqlite3.Row], recipes: Mapping[str, Mapping[str, Any]], unread: list[str]
) -> dict[str, tuple[Mapping[str, Any], list[_Rental]]]:
    """Recipe and leases of each run on a cloud."""
    found: dict[str, tuple[Mapping[str, Any], list[_Rental]]] = {name: (recipe, []) for name, recipe in recipes.items()}
    for row in leases:
        if row["run_id"] not in found:
            continue
        try:
            offer = json.loads(row["offer_json"])
            node_ms = row["accrued_units"] / row["price_micro_usd"] if row["accrued_units"] else 0.0
            lost = row["outcome"] == Cause.PREEMPTED.value
            kind = (str(offer["cloud"]), str(offer["accelerator"]), int(offer["gpus_per_node"]), bool(offer["spot"]))
        except UNREADABLE:
            unread.append(f"lease {row['lease_id']}")
            continue
        named = dict(zip(("cloud", "accelerator", "gpus_per_node", "spot"), kind, strict=True))
        rental = _Rental(row["lease_id"], named, lost, node_ms / MILLISECONDS_PER_HOUR)
        found[row["run_id"]][1].append(rental)
    return found


def _sightings(rented: Mapping[str, tuple[Mapping[str, Any], list[_Rental]]]) -> tuple[Sighting, ...]:
    """One for each kind of spot node that was held."""
    losses: dict[tuple[str, str, int], int] = defaultdict(int)
    hours: dict[tuple[str, str, int], float] = defaultdict(float)
    for _, rentals in rented.values():
        for rental in rentals:
            if rental.offer["spot"] and (rental.lost or rental.node_hours > 0):
                kind = (rental.offer["cloud"], rental.offer["accelerator"], rental.offer["gpus_per_node"])
                losses[kind] += rental.lost
                hours[kind] += rental.node_hours
    return tuple(Sighting(*kind, losses[kind], hours[kind]) for kind in sorted(losses))


# ---------------------------------------------------------------- the run stores


def _measurements(
    home: Home, rented: Mapping[str, tuple[Mapping[str, Any], list[_Rental]]], unread: list[str]
) -> Iterator[Measurement]:
    """The newest settled speed of each run that has one."""
    for run_id, (recipe, rentals) in rented.items():
        store = home.store_dir(run_id)
        if not (store / keys.PROGRESS).exists():
            continue
        try:
            found = _measurement(run_id, store, recipe, {rental.lease_id: rental for rental in rentals})
        except UNREADABLE:
            unread.append(f"the progress of {run_id}")
            continue
        if found is not None:
            yield found


def _measurement(
    run_id: str, store: Path, trained: Mapping[str, Any], rentals: Mapping[str, _Rental]
) -> Measurement | None:
    """None where the run says too little yet."""
    newest: Any = json.loads((store / keys.PROGRESS).read_bytes())
    speed, world_size = newest["tokens_per_second"], int(newest["world_size"])
    if newest["step"] < SETTLED_STEPS or speed is None or not (0 < speed < math.inf):
        return None
    began: Any = json.loads((store / keys.incarnation(newest["epoch"])).read_bytes())
    offer = rentals[began["lease_id"]].offer
    recipe = Recipe.model_validate(trained)
    num_nodes, rest = divmod(world_size, offer["gpus_per_node"])
    if rest or num_nodes < 1 or world_size > recipe.training.global_batch_size:
        return None  # nodes that lost some of their GPUs are no kind of machine
    network = cloud_terms(offer["cloud"]).network_bytes_per_second if num_nodes > 1 else 0.0
    return Measurement(
        run_id=run_id,
        work=recipe.workload(),
        cluster=Cluster(accelerator(offer["accelerator"]), offer["gpus_per_node"], num_nodes, network),
        micro_batch_size=recipe.training.micro_batch_size,
        software=our_trainer(optimizer=recipe.optimizer.name, compiled=recipe.training.compile),
        tokens_per_second=float(speed),
    )

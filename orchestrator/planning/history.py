"""What earlier runs of this home measured, for the next plan: preemptions, speeds, and times to set up a node.

Reads the ledger and the run stores as they are, changes and creates nothing, so that it works beside a living run; the
only file that is written is the home's `starts.jsonl`, one line for each node that was set up. Runs on clouds inform
plans for clouds (`History`); runs on the local backend, whose market is simulated and whose accelerator is this
machine's processor, inform only local plans (`measured_tokens_per_second`). What cannot be read is skipped and named in
`problem`; it is never an error of the plan.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
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
from orchestrator.runs.records import TERMINAL
from orchestrator.settings import Home
from tasks import run_store_keys as keys
from tasks.recipe.schema import AUTO, PRECISIONS, ConcretePrecision, Recipe
from trainer.run_store.envelope import unwrap

LOCAL = "local"
SETTLED_STEPS = 20
"""A run's speed counts from this step on: the first steps warm up caches and the compiler."""
NEWEST_STARTS = 5
"""A plan charges the median of so many."""
LEDGER_TIMEOUT_SECONDS = 1.0
"""A plan does not wait longer for a writer of the ledger."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SlmError)
"""What a row or a file of another version, or a damaged one, can raise."""

Read = Callable[[str], bytes]
"""The bytes of one key of a run store."""


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
class History:
    """What the runs of one home on clouds measured, oldest run first."""

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


def read_history(home: Home) -> History:
    """From the ledger and the run stores of this home; empty where there are none."""
    if not home.database.exists():
        return History()
    try:
        with closing(_opened(home.database)) as database:
            runs = _rows(database, "SELECT * FROM runs ORDER BY CAST(created_at AS INTEGER), rowid")
            leases = _rows(database, "SELECT * FROM leases")
    except (sqlite3.Error, *UNREADABLE) as error:
        return History(problem=f"earlier runs are not used: {home.database} cannot be read ({error})")
    unread: list[str] = []
    rented = _rented(leases, dict(_on_clouds(runs, unread)), unread)
    measured = tuple(_measurements(home, rented, unread))
    named = ", ".join(dict.fromkeys(unread))
    problem = f"skipped, as it cannot be read: {named}" if unread else None
    return History(_sightings(rented), measured, problem, typical_start_seconds(home.starts))


def begun_precision(home: Home, recipe: Recipe) -> ConcretePrecision | None:
    """The precision of an unfinished run of this recipe, where the recipe leaves the precision to the planner.

    The same command after a crash continues that run, whatever a plan would choose by now.
    """
    if recipe.precision != AUTO or not home.database.exists():
        return None
    by_digest = {recipe.in_precision(precision).digest(): precision for precision in PRECISIONS}
    finished = {state.value for state in TERMINAL}
    try:
        with closing(_opened(home.database)) as database:
            runs = _rows(database, "SELECT * FROM runs ORDER BY CAST(created_at AS INTEGER), rowid")
    except (sqlite3.Error, *UNREADABLE):
        return None  # the launch itself opens the ledger, and says what is wrong with it
    begun = [by_digest.get(run["recipe_digest"]) for run in runs if run["state"] not in finished]
    return next((precision for precision in reversed(begun) if precision is not None), None)


# ---------------------------------------------------------------- the ledger


def _opened(path: Path) -> sqlite3.Connection:
    """For reading only: the ledger is neither created nor migrated by a plan.

    Raises:
        ValueError: A newer slm wrote them.
        sqlite3.Error: It is damaged, or no ledger at all.
    """
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=LEDGER_TIMEOUT_SECONDS)
    try:
        database.row_factory = sqlite3.Row
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise ValueError(f"format {version}, this slm knows up to {len(MIGRATIONS)}")
    except BaseException:
        database.close()
        raise
    return database


def _rows(database: sqlite3.Connection, query: str) -> list[sqlite3.Row]:
    return database.execute(query).fetchall()


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


@dataclass(frozen=True, slots=True)
class SettledSpeed:
    """Speed of a run's newest group of workers, once its first steps are over."""

    tokens_per_second: float
    """Over all devices."""
    world_size: int
    incarnation: int | None
    """The group of workers that trained; None where the progress does not say."""

    @property
    def per_device(self) -> float:
        return self.tokens_per_second / self.world_size


def settled_speed(read: Read) -> SettledSpeed | None:
    """From the newest progress in a run store; None while the run has measured too little.

    Raises:
        UNREADABLE: The progress is missing, damaged or of another version.
    """
    newest = unwrap(read(keys.PROGRESS), keys.PROGRESS)
    tokens_per_second, world_size = newest["tokens_per_second"], int(newest["world_size"])
    if newest["step"] < SETTLED_STEPS or tokens_per_second is None or not (0 < tokens_per_second < math.inf):
        return None
    return SettledSpeed(float(tokens_per_second), world_size, newest.get("incarnation"))


def training_lease(read: Read, speed: SettledSpeed) -> str:
    """The id of the lease whose nodes had this speed.

    Raises:
        UNREADABLE: The run store does not say.
    """
    if speed.incarnation is None:
        raise KeyError("incarnation")
    key = keys.incarnation(speed.incarnation)
    return str(unwrap(read(key), key)["lease_id"])


def measured_tokens_per_second(home: Home, recipe: Recipe) -> float | None:
    """Of the newest run of the recipe's shape on as many workers, over all of them; None where there is none."""
    found: list[tuple[float, float]] = []
    for progress in (home.root / "store").glob(f"*/{keys.PROGRESS}"):
        read = reader(progress.parents[1])
        try:
            speed = settled_speed(read)
            trained = unwrap(read(keys.SPEC), keys.SPEC)["recipe"]
            same = _shape(trained) == _shape(recipe.model_dump(mode="json"))
            written = progress.stat().st_mtime
        except UNREADABLE:
            continue
        if same and speed is not None and speed.world_size == recipe.nodes.max:
            found.append((written, speed.tokens_per_second))
    return max(found)[1] if found else None


def _shape(recipe: Mapping[str, Any]) -> Any:
    """What decides the speed."""
    training = {key: recipe["training"][key] for key in ("global_batch_size", "micro_batch_size", "num_threads")}
    return recipe["model"], recipe["optimizer"]["name"], recipe["precision"], recipe["training"]["compile"], training


def reader(store: Path) -> Read:
    """Reads a run store in a folder, which is not created where it is missing."""
    return lambda key: store.joinpath(*key.split("/")).read_bytes()


def _measurements(
    home: Home, rented: Mapping[str, tuple[Mapping[str, Any], list[_Rental]]], unread: list[str]
) -> Iterator[Measurement]:
    """The newest settled speed of each run that has one."""
    for run_id, (recipe, rentals) in rented.items():
        store = home.store_dir(run_id)
        if not (store / keys.PROGRESS).exists():
            continue
        try:
            found = _measurement(run_id, reader(store), recipe, {rental.lease_id: rental for rental in rentals})
        except UNREADABLE:
            unread.append(f"the progress of {run_id}")
            continue
        if found is not None:
            yield found


def _measurement(
    run_id: str, read: Read, trained: Mapping[str, Any], rentals: Mapping[str, _Rental]
) -> Measurement | None:
    """None where the run has measured too little, or not on whole nodes."""
    speed = settled_speed(read)
    if speed is None:
        return None
    offer = rentals[training_lease(read, speed)].offer
    recipe = Recipe.model_validate(trained)
    num_nodes, rest = divmod(speed.world_size, offer["gpus_per_node"])
    if rest or num_nodes < 1 or speed.world_size > recipe.training.global_batch_size:
        return None  # nodes that lost some of their GPUs are not in the price table
    network = cloud_terms(offer["cloud"]).network_bytes_per_second if num_nodes > 1 else 0.0
    return Measurement(
        run_id=run_id,
        work=recipe.workload(),
        cluster=Cluster(accelerator(offer["accelerator"]), offer["gpus_per_node"], num_nodes, network),
        micro_batch_size=recipe.training.micro_batch_size,
        software=our_trainer(optimizer=recipe.optimizer.name, compiled=recipe.training.compile),
        tokens_per_second=speed.tokens_per_second,
    )


# ---------------------------------------------------------------- the times to set up a node


def record_start(path: Path, *, cloud: str, seconds: float, parts: Mapping[str, float]) -> None:
    """Append the time from the request to a node that is set up; `parts` say where it went."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"cloud": cloud, "seconds": seconds, **parts}) + "\n")


def typical_start_seconds(path: Path) -> dict[str, float]:
    """By cloud, the median of the newest; a line that a kill has cut short is skipped."""
    found: dict[str, list[float]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            start = json.loads(line)
            found[str(start["cloud"])].append(float(start["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return {cloud: median(seconds[-NEWEST_STARTS:]) for cloud, seconds in sorted(found.items())}

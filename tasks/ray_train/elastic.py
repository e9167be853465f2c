"""Beside Ray Train's controller, on node 0: who may train now, when to form the group anew, and when to give up.

Ray Train restarts a broken group by itself; three things would make that slow or endless, and are put right here:
- its view of the cluster is up to 20 s old, so that it waits for nodes that are dead, drained or not yet known.
  `install_coordinator` puts an actor of the same name in place before Ray Train looks for it, which asks every time,
  leaves out nodes that are draining or not warm yet, and knocks at each node's door;
- for a node that joins it tears the group down, which loses the steps since the last checkpoint. `Keeper` asks the
  workers to save and to end the group by themselves (tasks.ray_train.workers.Regroup);
- it does not know a bug from a lost node. `Keeper` reads the failures that the workers recorded, and counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from cost.errors import SlmError
from tasks import run_store_keys as keys
from tasks.node.environment import NodeEnv
from tasks.node.ray_node import KV_NAMESPACE, KV_READY, NODE_RESOURCE, reachable
from tasks.ray_train.workers import Regroup, ask, first_line, newest_incarnation, receive
from tasks.spec import RunSpec
from tasks.stages.registry import stage_of, store_of_stage
from tasks.stores.opening import open_store
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import unwrap

KNOCK_SECONDS = 0.5
WATCH_SECONDS = 0.5
STUCK_SECONDS = 3.0
"""A group whose start takes longer than this, while one of its nodes is gone, is given up."""
WAITING_SECONDS = 0.2
MAX_RESTARTS_WITHOUT_PROGRESS = 6
MAX_WAIT_SECONDS = 300.0
"""So long the cluster may hold fewer workers than the run needs."""
EQUAL_FAILURES = 2
"""So many groups that fail alike at one step are a bug."""


class GaveUp(SlmError):
    """Training in this cluster makes no sense any more; the message says why."""


# -- who may train


def usable_nodes() -> list[dict[str, Any]]:
    """Ray's nodes that a group can be placed on at this moment."""
    import ray
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_list

    draining = state.get_draining_nodes()
    ready = {key.removeprefix(KV_READY).decode() for key in _internal_kv_list(KV_READY, namespace=KV_NAMESPACE)}
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] in ready
        and node["NodeID"] not in draining
        and node["Resources"].get(NODE_RESOURCE, 0) > 0
        and reachable(node["NodeManagerAddress"], node["NodeManagerPort"], KNOCK_SECONDS)
    ]


def install_coordinator() -> Any:
    """Put our coordinator in the place where Ray Train looks for its own; keep the handle, or it goes."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class FreshCoordinator(_AutoscalingCoordinatorActor):  # type: ignore[misc]
        """Ray's coordinator, never out of date."""

        def get_reserved_resources(self, requester_id: str, recompute: bool = True) -> Any:  # noqa: ARG002
            return super().get_reserved_resources(requester_id, recompute=True)

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(FreshCoordinator)
    return actor.options(
        name="AutoscalingCoordinator",
        namespace="AutoscalingCoordinator",
        get_if_exists=True,
        lifetime="detached",
        scheduling_strategy=here,
    ).remote(send_resources_request=_ask_nobody, get_cluster_nodes=usable_nodes)


def _ask_nobody(*_: object, **__: object) -> None:
    """No autoscaler listens: nodes are rented by the supervisor."""


# -- when to give up: pure


def repeated_failure(failures: Iterable[Mapping[str, Any]], lease_id: str) -> Mapping[str, Any] | None:
    """The newest failure that EQUAL_FAILURES groups of workers of this lease had at the same step."""
    groups: dict[tuple[str, int], set[int]] = {}
    found = None
    for failure in failures:
        if failure["lease_id"] != lease_id:
            continue
        same = groups.setdefault((failure["fingerprint"], failure["step"]), set())
        same.add(failure["group"])
        if len(same) >= EQUAL_FAILURES:
            found = failure
    return found


def read_failures(store: Store) -> list[dict[str, Any]]:
    """All that workers recorded, oldest first; what cannot be read is left out."""
    failures = []
    for key in store.list(keys.FAILURES):
        try:
            failures.append(unwrap(store.read(key), key))
        except (StoreKeyMissing, ValueError):
            continue
    return failures


class Progress:
    """Counts restarts that did not get past the same checkpoint."""

    def __init__(self) -> None:
        self.restarts = 0
        self._parent: object = None

    def restart(self, parent: object) -> int:
        """A group that had begun from checkpoint `parent` failed; how many in a row began from there."""
        self.restarts = self.restarts + 1 if parent == self._parent else 1
        self._parent = parent
        return self.restarts


# -- the callback


class Keeper(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Made by the driver, lives in the controller's process. Ray calls its hooks in the controller's thread."""

    def __init__(self, spec: RunSpec, stamps: list[tuple[str, float]]) -> None:
        self._spec = spec
        self._max_workers = spec.max_workers
        self._stamps = stamps
        self._reason = "start"
        self._number = 0
        self._group: Any = None
        self._group_nodes: frozenset[str] = frozenset()
        self._starting_since: float | None = None
        self._waiting_since: float | None = None
        self._asked = False
        self._progress = Progress()

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        self._env = NodeEnv.from_environ()
        self._store = store_of_stage(open_store(self._env.store_uri, create=False), stage_of(self._spec.stage))
        threading.Thread(target=self._watch, name="slm-keeper", daemon=True).start()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        error = getattr(current_state, "training_failed_error", None)
        if error is not None and type(previous_state) is not type(current_state):
            self._note(error)
        waits = type(current_state).__name__ in ("InitializingState", "RestartingState", "ReschedulingState")
        if not waits:
            self._waiting_since = None
        elif type(previous_state) is type(current_state):  # Ray asks again without a pause of its own
            self._wait_for_nodes()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002
        if self._starting_since is not None:  # a start that failed is not a group that failed
            return
        bug = repeated_failure(read_failures(self._store), self._env.lease_id)
        if bug is not None:
            raise GaveUp(
                f"two groups of workers failed alike at step {bug['step']}: {bug['message']}; it is not tried again."
            )
        restarts = self._progress.restart(self._parent())
        if restarts > MAX_RESTARTS_WITHOUT_PROGRESS:
            raise GaveUp(f"{restarts} groups in a row failed without a new checkpoint; this cluster is given up.")

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._number += 1
        self._starting_since = time.monotonic()
        self._stamp("decision")
        self._env.say(f"group {self._number}: starting {worker_group_context.num_workers} worker(s), {self._reason}")

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:  # noqa: ARG002
        self._stamp("workers")
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        import ray

        workers = worker_group.get_workers()
        self._stamp("process_group")
        group = {"number": self._number, "reason": self._reason, "stamps": self._stamps}
        ray.get([worker.execute_async(receive, group) for worker in workers])
        self._group_nodes = frozenset(worker.metadata.node_id for worker in workers)
        self._group, self._asked, self._starting_since = worker_group, False, None

    def before_worker_group_shutdown(self, worker_group: Any) -> None:  # noqa: ARG002
        self._group = None

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002
        self._stamp("shutdown")

    # -- in the controller's thread

    def _stamp(self, name: str) -> None:
        self._stamps.append((name, time.time()))

    def _note(self, error: Any) -> None:
        """Say why the group ended; the phases of the next start count from here."""
        failures = list(getattr(error, "worker_failures", {}).values())
        if self._starting_since is not None:
            self._reason = "after a start that failed"
            self._env.say(f"group {self._number} did not start: {first_line(error)}")
        elif failures and all(isinstance(failure, Regroup) for failure in failures):
            self._reason = f"regrouped {failures[0]}"
        else:
            self._reason = "after a loss"
            told = "; ".join(first_line(failure) for failure in failures) or first_line(error)
            self._env.say(f"group {self._number} broke: {told}")
        if self._starting_since is None:
            self._stamps = [("noticed", time.time())]
        self._starting_since = None

    def _wait_for_nodes(self) -> None:
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > MAX_WAIT_SECONDS:
            raise GaveUp(f"too few nodes for {MAX_WAIT_SECONDS:.0f} s; this cluster is given up.")
        time.sleep(WAITING_SECONDS)

    def _parent(self) -> object:
        """What the newest incarnation began from."""
        incarnation = newest_incarnation(self._store)
        if incarnation is None:
            return None
        key = keys.incarnation(incarnation)
        try:
            return unwrap(self._store.read(key), key)["parent"]
        except (StoreKeyMissing, ValueError, KeyError):
            return None

    # -- in a thread of its own

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                if self._starting_since is not None:
                    self._free_stuck_start(self._starting_since)
                elif self._group is not None and not self._asked:
                    self._look_for_change(self._group)
            except Exception as error:  # the group may end in the middle of any of this
                self._env.say(f"keeper: {first_line(error)}")

    def _look_for_change(self, group: Any) -> None:
        """Ask for a new group when a node has come that could train."""
        if len(group.get_workers()) >= self._max_workers:
            return
        new = [node for node in usable_nodes() if node["NodeID"] not in self._group_nodes]
        if new and self._group is group:
            self._asked = True
            for worker in group.get_workers():
                worker.execute_async(ask, f"{len(new)} more node(s) joined")

    def _free_stuck_start(self, since: float) -> None:
        """Ray waits without end for a worker whose node died before it began: take the placement away."""
        if time.monotonic() - since < STUCK_SECONDS:
            return
        import ray
        from ray._raylet import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

        for name, facts in placement_group_table().items():
            if facts["state"] == "RESCHEDULING" and self._starting_since == since:
                self._env.say(f"group {self._number}: a node was lost while it started")
                remove_placement_group(PlacementGroup(PlacementGroupID(ray._private.utils.hex_to_binary(name))))

"""The driver, on node 0: Ray Train's `TorchTrainer` over this lease's nodes, and what its end means.

Exit codes as in tasks.run_store_keys. Ray's own checkpoints are not used: the run store is the only memory of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.node.environment import NodeEnv
from tasks.node.ray_node import NODE_RESOURCE
from tasks.run_store_keys import EXIT_BROKEN, EXIT_BUG, EXIT_FINISHED, EXIT_STOPPED
from tasks.spec import RunSpec
from tasks.stages.manifest import finish
from tasks.stages.registry import stage_of, store_of_stage
from tasks.stores.opening import open_store
from trainer.run_store.base import StoreError

JOIN_SECONDS = 60.0
"""How long all nodes of the lease are waited for; then training begins with those that are there."""
GROUP_TIMEOUT_SECONDS = 600
"""Of one collective operation: longer than the longest that one rank does alone (a checkpoint's upload)."""
RESIZE_SECONDS = 3600.0
"""Ray's own check for more nodes, which would lose steps; tasks.ray_train.elastic sees them within a second."""


def main(argv: Sequence[str]) -> int:
    """`python -m tasks pretrain`, started by the node task of rank 0."""
    argparse.ArgumentParser(prog="python -m tasks pretrain", description="Drive training.").parse_args(argv)
    env = NodeEnv.from_environ()
    spec = RunSpec.load(env.spec_path)
    _end_with_node()
    stamps = [("begin", _stamp("SLM_NODE_STARTED")), ("ray", _stamp("SLM_RAY_STARTED")), ("driver", time.time())]
    _enter_empty_folder(env)
    import ray

    ray.init(address=env.head_address, _node_ip_address=env.node_ip, log_to_driver=False, logging_level="ERROR")
    try:
        return run(env, spec, stamps)
    finally:
        sys.stdout.flush()


def run(env: NodeEnv, spec: RunSpec, stamps: list[tuple[str, float]]) -> int:
    """Train in the connected cluster; the exit code."""
    from ray.train import TrainingFailedError

    from tasks.ray_train.elastic import install_coordinator, read_failures, repeated_failure

    coordinator = install_coordinator()
    stamps.append(("imports", time.time()))
    wait_for_nodes(env, spec)
    stamps.append(("join", time.time()))
    try:
        result = make_trainer(env, spec, stamps).fit()
    except TrainingFailedError as error:
        env.say(f"training ended: {str(error).strip().splitlines()[-1][:500]}")
        failures = read_failures(store_of_stage(open_store(env.store_uri, create=False), stage_of(spec.stage)))
        return EXIT_BUG if repeated_failure(failures, env.lease_id) else EXIT_BROKEN
    del coordinator
    end = result.return_value
    env.say(f"{end['outcome']} at step {end['step']}")
    if end["outcome"] == "finished":
        with contextlib.suppress(StoreError):  # the exit code says it too, to a supervisor that is there to hear it
            finish(open_store(env.store_uri, create=False), spec, {"step": end["step"]})
    return {"finished": EXIT_FINISHED, "stopped": EXIT_STOPPED}.get(end["outcome"], EXIT_BROKEN)


def wait_for_nodes(env: NodeEnv, spec: RunSpec) -> None:
    """Until all nodes are there, or the bound passed."""
    from tasks.ray_train.elastic import usable_nodes

    until = time.monotonic() + JOIN_SECONDS
    while (found := len(usable_nodes())) < spec.num_nodes and time.monotonic() < until:
        time.sleep(0.2)
    env.say(f"{found} of {spec.num_nodes} node(s) are there")


def make_trainer(env: NodeEnv, spec: RunSpec, stamps: list[tuple[str, float]]) -> Any:
    """Ray Train, elastic between the spec's bounds."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from tasks.ray_train.elastic import Keeper
    from tasks.ray_train.process_group import QuickTorchConfig
    from tasks.ray_train.workers import train_worker

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without actors that do nothing here: data sets are files, and this cluster ends with its driver."""

        def _create_default_callbacks(self) -> list[Any]:
            needless = (PlacementGroupCleanerCallback, DatasetsCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)]

    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    per_worker = {"CPU": 1, NODE_RESOURCE: 1} | ({"GPU": 1} if use_gpu else {})
    storage = env.node_dir / "ray-train"
    storage.mkdir(parents=True, exist_ok=True)
    return Trainer(
        train_worker,
        train_loop_config={"spec": spec.to_bytes().decode()},
        torch_config=QuickTorchConfig(timeout_s=GROUP_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(spec.min_workers, spec.max_workers),
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=env.lease_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1),
            callbacks=[Keeper(spec, stamps)],
        ),
    )


def _enter_empty_folder(env: NodeEnv) -> None:
    """Ray puts its driver's working folder first on the import path of every worker: let nothing be found there."""
    folder = env.node_dir / "driver"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


def _stamp(variable: str) -> float:
    return float(os.environ.get(variable) or time.time())


def _end_with_node() -> None:
    """End this process when the node task that asked for it is gone; it may be forked from another parent."""
    node_pid = int(os.environ.get("SLM_NODE_PID") or 0)
    if not node_pid:
        return

    def watch() -> None:
        while Path(f"/proc/{node_pid}").exists() if sys.platform == "linux" else _exists(node_pid):
            time.sleep(1.0)
        os._exit(EXIT_BROKEN)

    threading.Thread(target=watch, name="slm-node-watch", daemon=True).start()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True

"""Inside a Ray Train worker: Lightning Fabric over Ray's process group, the signals of the loop, and its failures.

The controller (tasks.ray_train.elastic) calls `receive` and `ask` in the worker's process: what a group was started
for, and what it is wanted to do. A wish to form the group anew becomes a checkpoint and then `Regroup` on every rank
at the same step, so that a node that comes or goes as announced costs no step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost.errors import SlmError
from tasks import run_store_keys as keys
from tasks.node.environment import NodeEnv, boottime
from tasks.node.notice import plan
from tasks.ray_train.compile_cache import CompileCache
from tasks.recipe.stages import StageOptions
from tasks.run_store_records import Command
from tasks.spec import RunSpec
from tasks.stages.registry import stage_of, store_of_stage
from tasks.stores.opening import open_store
from trainer.checkpoints.lineage import Superseded
from trainer.run_store.base import Store, StoreError, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer, unwrap, wrap

if TYPE_CHECKING:
    from trainer.loop import Result, Signal
    from trainer.objectives.base import Objective

CONTROL_SECONDS = 1.0
"""How often rank 0 looks for a command of the supervisor."""
NEWEST_STEPS = 16
NOTHING, REGROUP, HEAD_LEAVES, STOP = range(4)
"""Why a loop stopped early; where ranks differ the highest holds."""

_COLLATERAL = re.compile(
    r"gloo|nccl|ProcessGroup|TCPStore|Connection (closed|reset|refused)|Broken pipe|Socket Timeout|"
    r"Timed out waiting|peer (closed|gone)",
    re.IGNORECASE,
)
"""What a rank says when another died in the middle of a collective operation."""


class Regroup(Exception):
    """Not a failure: the group ends with a checkpoint to be formed anew of other nodes."""


@dataclass
class Asked:
    """What the controller told this process; a group's process serves one group."""

    group: dict[str, Any] = field(default_factory=dict)
    regroup: str = ""


ASKED = Asked()


def receive(group: dict[str, Any]) -> None:
    """The controller says which start of a group this is, and when what happened before it."""
    ASKED.group = group


def ask(reason: str) -> None:
    """The controller wants the group to be formed anew."""
    ASKED.regroup = reason


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker. Rank 0's return value is what the driver goes by."""
    phases = Phases(dict(ASKED.group))
    env = NodeEnv.from_environ()
    spec = RunSpec.from_bytes(config["spec"].encode())
    run_store = open_store(env.store_uri, create=False)
    store = store_of_stage(run_store, stage_of(spec.stage))
    step = StepCounter()
    try:
        from trainer.loop import train

        phases.mark("imports")
        fabric = make_fabric(spec)
        phases.mark("fabric")
        if fabric.global_rank == 0:
            env.say(f"attention: {attention_of(fabric, spec)}")
        signals = NodeSignals(env, run_store, store, fabric.global_rank, step)
        writes = fabric.global_rank == 0
        train_config = spec.train_config()
        compiled = None
        if train_config.execution.compile:
            compiled = CompileCache(run_store, env.node_dir / f"compiled-{fabric.local_rank}")
            phases.mark("compile_cache")
        start_seconds = phases.seconds()

        def phase(name: str) -> None:
            phases.mark(name)
            start_seconds.update(phases.seconds())
            if name == "first_step" and writes:
                phases.write(store, env, fabric.world_size)
                if compiled is not None:
                    threading.Thread(target=compiled.keep, name="slm-keep-compiled", daemon=True).start()

        result = train(
            train_config,
            objective=objective_of(spec.stage),
            fabric=fabric,
            data_dir=Path(spec.data_dir),
            store=store,
            lease_id=env.lease_id,
            signals=signals,
            phase=phase,
            start_seconds=start_seconds,
            stage=spec.stage.name,
        )
        return outcome(fabric, signals, result)
    except BaseException as error:
        if is_failure(error):
            record_failure(store, env, error, step.value)
        elif not isinstance(error, Regroup):
            env.say(f"worker at step {step.value}: {first_line(error)}")
        raise


def objective_of(stage: StageOptions) -> Objective:
    """What a stage that trains minimizes."""
    from trainer.objectives.pretrain import Pretrain

    return {"pretrain": Pretrain}[stage.kind]()


def attention_of(fabric: Any, spec: RunSpec) -> str:
    """Which kernels attention uses here."""
    import torch

    from trainer.model.attention import describe

    return describe(fabric.device, torch.bfloat16 if spec.train_config().precision == "bf16" else torch.float32)


def outcome(fabric: Any, signals: NodeSignals, result: Result) -> dict[str, Any]:
    """Why the loop returned, the same on all ranks.

    Raises:
        Regroup: It stopped only to go on in another group.
    """
    import torch

    if result.outcome == "finished":
        return {"outcome": "finished", "step": result.step}
    why = torch.tensor([signals.why, -fabric.global_rank], device=fabric.device)
    if fabric.world_size > 1:
        torch.distributed.all_reduce(why, op=torch.distributed.ReduceOp.MAX)
    kind = int(why[0])
    if kind == REGROUP:
        raise Regroup(f"at step {result.step}: {signals.reason or 'asked by another rank'}")
    return {"outcome": "leaving" if kind == HEAD_LEAVES else "stopped", "step": result.step}


# -- Fabric


def make_fabric(spec: RunSpec) -> Any:
    """Fabric over the process group that Ray Train has set up, on the device that Ray gave this worker."""
    import ray.train
    import ray.train.torch
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import ClusterEnvironment

    from trainer.parallel import fabric_precision, strategy_class, strategy_options

    context = ray.train.get_context()
    config = spec.train_config()

    class RayEnvironment(ClusterEnvironment):  # type: ignore[misc]
        """Ranks and addresses as Ray Train gave them."""

        creates_processes_externally = True

        @property
        def main_address(self) -> str:
            return os.environ["MASTER_ADDR"]

        @property
        def main_port(self) -> int:
            return int(os.environ["MASTER_PORT"])

        @staticmethod
        def detect() -> bool:
            return True

        def world_size(self) -> int:
            return int(context.get_world_size())

        def global_rank(self) -> int:
            return int(context.get_world_rank())

        def local_rank(self) -> int:
            return int(context.get_local_rank())

        def node_rank(self) -> int:
            return int(context.get_node_rank())

        def set_world_size(self, size: int) -> None:
            """Ray decides; nodes need not hold equally many workers, so Fabric's product may be wrong."""

        def set_global_rank(self, rank: int) -> None:
            """Ray decides."""

    class RayStrategy(strategy_class(config)):  # type: ignore[misc]
        """DDP or FSDP2 on Ray's device."""

        @property
        def root_device(self) -> Any:
            return ray.train.torch.get_device()

        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any]:
            return {"num_replicas": context.get_world_size(), "rank": context.get_world_rank()}

    device = ray.train.torch.get_device()
    strategy = RayStrategy(**strategy_options(config, context.get_world_size()))
    fabric = Fabric(
        accelerator="cuda" if device.type == "cuda" else "cpu",
        devices=context.get_local_world_size(),
        num_nodes=1,
        strategy=strategy,
        plugins=[RayEnvironment()],
        precision=fabric_precision(config),
    )
    fabric.launch()
    return fabric


# -- signals


@dataclass
class StepCounter:
    """The step that a worker is in, for the record of a failure."""

    value: int = 0


class NodeSignals:
    """What this worker knows of the outside: its node's notice, the controller's wish, the supervisor's command."""

    def __init__(self, env: NodeEnv, run_store: Store, stage_store: Store, global_rank: int, step: StepCounter) -> None:
        self.why = NOTHING
        self.reason = ""
        self._env = env
        self._run_store = run_store
        self._stage_store = stage_store
        self._reads_control = global_rank == 0
        self._step = step
        self._next_control = 0.0
        self._done_number: int | None = None
        self._noticed = False
        self._leave_at: float | None = None
        self._step_ends: deque[float] = deque(maxlen=NEWEST_STEPS)

    def poll(self, step: int) -> Signal:
        """Costs a stat of one file; rank 0 also reads the store about once per second."""
        from trainer.loop import Signal

        self._step.value = step
        self._step_ends.append(time.monotonic())
        checkpoint = self._look_for_notice()
        hold = self._noticed and not checkpoint
        if self._leave_at is not None and boottime() >= self._leave_at:
            self._stop(HEAD_LEAVES if self._env.is_head else REGROUP, f"the cloud takes node {self._env.rank}")
        if ASKED.regroup:
            self._stop(REGROUP, ASKED.regroup)
        if self._reads_control and time.monotonic() >= self._next_control:
            self._next_control = time.monotonic() + CONTROL_SECONDS
            checkpoint = self._obey() or checkpoint
        return Signal(checkpoint=checkpoint, stop=self.why != NOTHING, reason=self.reason, hold=hold)

    def _stop(self, why: int, reason: str) -> None:
        if why > self.why:
            self.why, self.reason = why, reason
            self._env.say(f"step {self._step.value}: checkpoint and stop, since {reason}")

    def _look_for_notice(self) -> bool:
        """Whether to save at once: said when the notice is first seen. Then it is decided when to leave, if at all."""
        if self._noticed or not self._env.notice_file.exists():
            return False
        try:
            deadline = float(json.loads(self._env.notice_file.read_bytes())["deadline_boottime"])
        except (OSError, ValueError, KeyError, TypeError):
            return False  # half written; the next step sees it whole
        self._noticed = True
        now, save_seconds, step_seconds = boottime(), self._save_seconds(), self._step_seconds()
        decided = plan(deadline - now, save_seconds, step_seconds)
        cost = f"a save takes {save_seconds:.1f} s, a step {step_seconds:.1f} s"
        if decided.leave_in_seconds is None:
            told = "too late for a checkpoint, none is begun"
        else:
            self._leave_at = now + decided.leave_in_seconds
            first = "checkpoint now, and the last" if decided.save_now else "the last checkpoint"
            told = f"{first} in {decided.leave_in_seconds:.0f} s"
        self._env.say(f"step {self._step.value}: node {self._env.rank} goes in {deadline - now:.0f} s: {told} ({cost})")
        return decided.save_now

    def _save_seconds(self) -> float:
        """What the newest save took, by rank 0's account, whichever group it was of; 0 where nobody knows."""
        try:
            progress = unwrap(self._stage_store.read(keys.PROGRESS), keys.PROGRESS)
            return float(progress["checkpoint_save_seconds"])
        except (StoreKeyMissing, StoreError, ValueError, KeyError, TypeError):
            return 0.0

    def _step_seconds(self) -> float:
        """The middle one of the newest steps, so that one with a save or an evaluation in it does not count."""
        ends = list(self._step_ends)
        return statistics.median(end - begin for begin, end in pairwise(ends)) if len(ends) > 1 else 0.0

    def _obey(self) -> bool:
        """Read the supervisor's newest command; whether it is a new wish for a checkpoint."""
        try:
            key = keys.control(self._env.lease_id)
            command = Command.parse(self._run_store.read(key), key)
        except (StoreKeyMissing, StoreError, RecordError):
            return False  # none yet; a store that is lost says so when the next checkpoint fails
        if command.command == "stop":
            self._stop(STOP, f"the supervisor said so ({command.reason})")
            return False
        if command.number == self._done_number:
            return False
        self._done_number = command.number
        return command.command == "checkpoint"


# -- failures


def is_failure(error: BaseException) -> bool:
    """Whether this is a bug or a refusal of the training code, and not the echo of something that ended elsewhere."""
    if isinstance(error, (Regroup, StoreError, Superseded)) or not isinstance(error, Exception):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return False
    import torch

    lost_peer = isinstance(error, torch.distributed.DistError)
    return not lost_peer and not (isinstance(error, RuntimeError) and _COLLATERAL.search(str(error)))


def fingerprint(error: BaseException) -> str:
    """The same for the same bug: type, innermost frame of ours, and the message without its numbers."""
    ours = ("trainer", "tasks", "cost")
    place = "unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        folders = Path(frame.filename).parts[:-1]
        package = next((at for at in range(len(folders) - 1, -1, -1) if folders[at] in ours), None)
        if package is not None:
            place = f"{'/'.join(folders[package:])}/{Path(frame.filename).name}:{frame.name}"
    message = re.sub(r"0x[0-9a-f]+|[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", str(error), flags=re.IGNORECASE)
    digest = hashlib.sha256(message.encode()).hexdigest()[:8]
    return f"{type(error).__name__} in {place} [{digest}]"


def record_failure(store: Store, env: NodeEnv, error: BaseException, step: int) -> None:
    """Write it under the next free number."""
    facts = {
        "lease_id": env.lease_id,
        "group": int(ASKED.group.get("number", 0)),
        "incarnation": newest_incarnation(store),
        "step": step,
        "fingerprint": fingerprint(error),
        "message": str(error) if isinstance(error, SlmError) else first_line(error),
        "traceback": "".join(traceback.format_exception(error)),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    env.say(f"failure at step {step}: {first_line(error)}\n{facts['traceback']}")
    number = len(store.list(keys.FAILURES))
    while not store.create(keys.failure(number), wrap(facts, Writer.NODE, indent=1)):
        number += 1


def newest_incarnation(store: Store) -> int | None:
    """The number of the newest group of workers that has begun."""
    numbers = (keys.incarnation_number(key) for key in store.list(keys.INCARNATIONS))
    return max((number for number in numbers if number is not None), default=None)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


# -- how long a start took


class Phases:
    """The seconds of one start, from what made it necessary to the first step, each part under a name."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._group = group
        self._stamps: list[tuple[str, float]] = list(group.get("stamps", []))
        self.mark("handover")

    def mark(self, name: str) -> None:
        """The part `name` ends now. Wall-clock time: the parts before were stamped by other processes."""
        self._stamps.append((name, time.time()))

    def seconds(self) -> dict[str, float]:
        """Length of each part but the first stamp, which is the beginning."""
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        return {name: round(max(0.0, at - before), 3) for (_, before), (name, at) in pairs}

    def write(self, store: Store, env: NodeEnv, world_size: int) -> None:
        """Under the next free number of the lease; not worth a training run if the store refuses."""
        began = self._stamps[0][1]
        facts = {
            "lease_id": env.lease_id,
            "incarnation": newest_incarnation(store),
            "world_size": world_size,
            "reason": self._group.get("reason", ""),
            "started_at": datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds"),
            "seconds": self.seconds(),
            "total_seconds": round(time.time() - began, 3),
        }
        number = int(self._group.get("number", 1))
        try:
            while not store.create(keys.phases(env.lease_id, number), wrap(facts, Writer.NODE, indent=1)):
                number += 1
        except StoreError as error:
            env.say(str(error))
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds().items())
        env.say(f"{world_size} worker(s) train after {facts['total_seconds']:.1f} s ({parts})")

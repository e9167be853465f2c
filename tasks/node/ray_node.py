"""The `node` task: our own Ray on every node of a lease, and on node 0 the driver. Also the `drain` task.

Rank 0 starts Ray's head and runs the program of the lease's stage against it, such as `python -m tasks pretrain`; other
ranks join it and stay until it ends. Exit codes: those of `tasks.run_store_keys`; of other ranks than 0 EXIT_FINISHED
after a notice took the node, else EXIT_BROKEN. SIGTERM is a notice too.

Invariants: many such nodes and foreign Ray clusters live on one machine. Every address and port is explicit or free,
Ray's files are in a temp dir of the node's own, no Ray variable of the caller's environment is obeyed, and only
processes that descend from this one are ever signalled. Nothing of the node outlives this process: the kernel ends
its children with it (Linux), and an orderly end also removes the temp dir.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cost.errors import SlmError
from tasks.node import forkserver
from tasks.node.environment import EVENTS_FILE, NodeEnv, boottime, log_line
from tasks.node.processes import Family, become_subreaper, make_temp_dir
from tasks.own_module import SAFE_PATH
from tasks.run_store_keys import EXIT_BROKEN, EXIT_BUG, EXIT_FINISHED, EXIT_NOTICE, EXIT_STOPPED
from tasks.spec import RunSpec
from tasks.stages.registry import stage_of

NODE_RESOURCE = "slm_node"
"""One unit per training worker that a node may hold."""
RANK_LABEL = "slm-rank"
NODE_FILE = "ray.json"
KV_NAMESPACE = b"slm"
KV_LEASE = b"lease"
KV_READY = b"ready/"
"""Followed by Ray's id of a node: its fork server has done its imports."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Only small messages pass through it; Ray's least is 75 MiB."""
CONTROL_CPUS = 3
"""A raylet starts at most as many processes at once as it has CPUs; controller and helpers start beside the workers."""
JOIN_SECONDS = 120.0
"""How long a node looks for its head before it gives up."""
WARM_SECONDS = 30.0
"""How long a node waits for its fork server before it does without."""
HEAD_GONE_SECONDS = 5.0
TERM_SECONDS = 25.0
"""Between SIGTERM and SIGKILL where SLM_TERM_SECONDS does not say: Kubernetes, Slurm and GCP leave 30."""
LEAST_SIGTERM_SECONDS = 4.0
"""With less, nothing can be saved: the node ends at once."""
CLEAN_SECONDS = 1.0
"""For ending what runs here and removing its files."""
TICK_SECONDS = 0.2
LOG_TAIL_CHARACTERS = 4000

# Chosen with bench/recovery_local.py, on 2 cores that others used too.
RAY_SETTINGS: Mapping[str, str] = {
    # A dead raylet refuses connections: found after 3 s. A silent one is given 3 x 5 s.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
    # Nothing idle is started, nothing is reported, and no other tenant's memory is held against our workers.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # tasks.ray_train.elastic watches for drains itself, without a process for it in every worker group.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
    # Ray names its processes in a way that overwrites the environment by which a node's processes are found.
    "SPT_NOENV": "1",
}


class ClusterError(SlmError):
    """Ray could not be started or joined; the message says what was waited for."""


class Stopped(BaseException):
    """SIGINT, or SIGTERM with no time for a checkpoint, arrived; nothing that handles errors may hold it up."""


def main(argv: Sequence[str]) -> int:
    """`python -m tasks node`: see the top of this file."""
    argparse.ArgumentParser(prog="python -m tasks node", description="Be one node of a lease.").parse_args(argv)
    env = NodeEnv.from_environ()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    with contextlib.suppress(Stopped), NodeProcesses(env) as node:
        signal.signal(signal.SIGTERM, node.on_sigterm)
        try:
            return node.run()
        except ClusterError as error:
            node.say(str(error))
            return EXIT_BROKEN
    return EXIT_BROKEN


def drain_main(argv: Sequence[str]) -> int:
    """`python -m tasks drain --seconds N`: tell Ray that this node goes in N seconds. Nothing where Ray is not up."""
    parser = argparse.ArgumentParser(prog="python -m tasks drain", description="Announce this node's end to Ray.")
    parser.add_argument("--seconds", type=float, required=True, help="until the node is taken")
    options = parser.parse_args(argv)
    node_dir = Path(os.environ.get("SLM_NODE_DIR", "."))
    try:
        facts = json.loads((node_dir / NODE_FILE).read_bytes())
    except (OSError, ValueError):
        sys.stdout.write(f"no Ray node is recorded in {node_dir / NODE_FILE}; nothing to drain.\n")
        return 0
    answer = drain(facts, options.seconds)
    sys.stdout.write(answer + "\n")
    return 0


def drain(facts: Mapping[str, Any], seconds: float) -> str:
    """Ask Ray to place nothing new on a node that goes in `seconds`. What was answered, in words."""
    if facts["head"]:
        return "node 0 holds Ray's head and cannot be drained; training sees the notice by itself."
    if not reachable(facts["gcs_ip"], facts["gcs_port"]):
        return "Ray's head is gone; nothing to drain."
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=f"{facts['gcs_ip']}:{facts['gcs_port']}")
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + max(1.0, seconds)) * 1000)
    accepted, why = client.drain_node(facts["node_id"], reason, "the cloud takes this node", deadline_ms)
    return "drain accepted" if accepted else f"drain refused: {why}"


def seconds_after_sigterm(environ: Mapping[str, str], node_dir: Path, now: float) -> float:
    """How long this node lives on after a SIGTERM: what the platform grants, and no longer than what is paid for."""
    try:
        granted = float(environ.get("SLM_TERM_SECONDS") or TERM_SECONDS)
    except ValueError:
        granted = TERM_SECONDS
    try:
        paid = float(json.loads((node_dir / "deadline.json").read_bytes())["deadline"]) - now
    except (OSError, ValueError, KeyError, TypeError):
        return granted
    return min(granted, paid)


def reachable(ip: str, port: int, timeout: float = 1.0) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((ip, port), timeout=timeout):
            return True
    except OSError:
        return False


def check_port_free(ip: str, port: int) -> None:
    """Ray would take half a minute to say less.

    Raises:
        ClusterError: Something listens there, or the address is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            raise ClusterError(
                f"Ray's head cannot listen at {ip}:{port} ({error.strerror}); the lease has to be started again "
                "on another port."
            ) from error


def _raise_stopped(_number: int, _frame: FrameType | None) -> None:
    raise Stopped


class NodeProcesses:
    """Everything that runs on one node, from start to end."""

    def __init__(self, env: NodeEnv) -> None:
        self.env = env
        self.temp_dir = make_temp_dir()
        self.forks = forkserver.ForkServer(self.temp_dir / "fork")
        self.ray_node: Any = None
        self.facts: dict[str, Any] = {}
        self.family = Family()
        self.events_read = 0
        self.drained = False
        self.may_train = False
        self.ends_at: float | None = None
        self.started = time.time()

    def __enter__(self) -> NodeProcesses:
        self.env.node_dir.mkdir(parents=True, exist_ok=True)
        become_subreaper()
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the end is already under way and bounded
        self.family.end()
        self._copy_events()
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def run(self) -> int:
        spec = RunSpec.load(self.env.spec_path)
        self._set_environment()
        self.forks.start()
        if self.env.is_head:
            check_port_free(self.env.head_ip, self.env.head_port)
        else:
            self._find_head()
        self._start_ray(spec)
        self.forks.wait_ready(WARM_SECONDS)  # the others stop for a node that joins: only once it can train
        self._announce()
        self.may_train = True
        if self.env.is_head:
            return self._run_driver(spec)
        return self._stay()

    def on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        """The platform's way to say that the node goes: a notice like any other, if there is time. Twice: the end."""
        seconds = seconds_after_sigterm(os.environ, self.env.node_dir, boottime())
        if not self.may_train or self.ends_at is not None or seconds < LEAST_SIGTERM_SECONDS:
            raise Stopped
        self.ends_at = boottime() + seconds - CLEAN_SECONDS
        if not self.env.notice_file.exists():
            facts = {"deadline_boottime": self.ends_at, "seconds": seconds, "source": "SIGTERM"}
            _write_json(self.env.notice_file, facts)

    def say(self, text: str) -> None:
        """One line to the node's log."""
        self._copy_events()
        sys.stdout.write(log_line(text))
        sys.stdout.flush()

    def _set_environment(self) -> None:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update({**RAY_SETTINGS, **SAFE_PATH})
        if ipaddress.ip_address(self.env.head_ip).is_loopback:
            # Ray otherwise turns a loopback address into the machine's own, where our head does not listen.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if forkserver.SUPPORTED:
            os.environ[forkserver.SOCKET_VARIABLE] = str(self.forks.socket_path)
        os.environ["SLM_NODE_STARTED"] = repr(self.started)

    def _find_head(self) -> None:
        """Wait until the head of this lease answers."""
        until = time.monotonic() + JOIN_SECONDS
        while not self._head_answers():
            if time.monotonic() > until:
                raise ClusterError(
                    f"node {self.env.rank}: no head of {self.env.lease_id} answered at {self.env.head_address} "
                    f"within {JOIN_SECONDS:.0f} s; the lease has to be started again."
                )
            time.sleep(TICK_SECONDS)

    def _head_answers(self) -> bool:
        if not reachable(self.env.head_ip, self.env.head_port):
            return False
        import ray
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            client = GcsClient(address=self.env.head_address)
            value = client.internal_kv_get(KV_LEASE, KV_NAMESPACE, timeout=2)
        except (ray.exceptions.RayError, OSError, RuntimeError):
            return False
        if value is not None and value.decode() != self.env.lease_id:
            raise ClusterError(
                f"the Ray head at {self.env.head_address} belongs to {value.decode()}, not to {self.env.lease_id}; "
                "the lease has to be started again on other ports."
            )
        return value is not None

    def _start_ray(self, spec: RunSpec) -> None:
        began, group = time.monotonic(), os.getpgrp()
        node_class, params = _ray_node(self.env, spec, self.temp_dir)
        try:
            self.ray_node = node_class(params, head=self.env.is_head, shutdown_at_exit=False, spawn_reaper=True)
        except Exception as error:  # Ray raises whatever its helpers raise
            raise ClusterError(
                f"Ray did not start on node {self.env.rank} ({type(error).__name__}: {error}); "
                f"is port {self.env.head_port} of {self.env.head_ip} free, and /tmp writable?"
            ) from error
        if os.getpgrp() != group:
            # Ray made us the leader of a group of its own; a SIGTERM to the command's group must reach this process,
            # and must not reach Ray's, which would end at once.
            os.setpgid(0, group)
        self.facts = {
            "head": self.env.is_head,
            "node_id": self.ray_node.node_id,
            "gcs_ip": self.env.head_ip,
            "gcs_port": self.env.head_port,
            "temp_dir": str(self.temp_dir),
        }
        if self.env.is_head:
            self._put(KV_LEASE, self.env.lease_id)
        _write_json(self.env.node_dir / NODE_FILE, self.facts)
        os.environ["SLM_RAY_STARTED"] = repr(time.time())
        verb = "started Ray's head" if self.env.is_head else f"joined {self.env.head_address}"
        self.say(f"node {self.env.rank} {verb} in {time.monotonic() - began:.1f} s")

    def _announce(self) -> None:
        """Tell the cluster that workers may be placed here."""
        try:
            self._put(KV_READY + self.facts["node_id"].encode(), str(self.env.rank))
        except Exception as error:  # whatever Ray's client raises when the head has just gone
            raise ClusterError(f"node {self.env.rank} lost Ray's head while it joined ({error}).") from error

    def _put(self, key: bytes, value: str) -> None:
        self.ray_node.get_gcs_client().internal_kv_put(key, value.encode(), True, KV_NAMESPACE)

    def _run_driver(self, spec: RunSpec) -> int:
        """Run the program of the stage until it, or Ray under it, ends."""
        driver = Driver(stage_of(spec.stage).command(None), self.forks, self.env.node_dir / "driver.log")
        driver.start()
        while (code := driver.poll()) is None:
            gone = self._dead_ray_process()
            if gone:
                self.say(f"Ray's {gone} died; the cluster is over.")
                return EXIT_BROKEN
            self._tick()
        self.say(f"the driver ended with exit code {code}" + (", as announced" if self.drained else ""))
        if code == EXIT_BROKEN and self.drained:
            return EXIT_NOTICE
        if code in (EXIT_FINISHED, EXIT_STOPPED, EXIT_BUG, EXIT_BROKEN):
            return code
        self.say(driver.last_lines())
        return EXIT_BROKEN

    def _stay(self) -> int:
        """Be there until the head is gone, or until this node has been drained."""
        last_seen = next_look = time.monotonic()
        while True:
            gone = self._dead_ray_process()
            if gone:
                self.say(f"Ray's {gone} ended" + (", as announced" if self.drained else ""))
                return EXIT_FINISHED if self.drained else EXIT_BROKEN
            now = time.monotonic()
            if now >= next_look:
                next_look = now + 1.0
                if reachable(self.env.head_ip, self.env.head_port):
                    last_seen = time.monotonic()
                elif time.monotonic() - last_seen > HEAD_GONE_SECONDS:
                    self.say(f"the head at {self.env.head_address} is gone")
                    return EXIT_BROKEN
            self._tick()

    def _tick(self) -> None:
        self._copy_events()
        self.family.remember()
        if self.ends_at is not None and boottime() >= self.ends_at:
            self.say("the time after SIGTERM is over")
            raise Stopped
        if not self.drained and self.env.notice_file.exists():
            self.drained = True
            self._drain_on_notice()
        time.sleep(TICK_SECONDS)

    def _drain_on_notice(self) -> None:
        try:
            seconds = json.loads(self.env.notice_file.read_bytes())["deadline_boottime"] - boottime()
        except (OSError, ValueError, KeyError, TypeError):
            seconds = 0.0
        try:
            answer = drain(self.facts, seconds)
        except Exception as error:  # a help to the scheduler, never worth the node's life
            answer = f"drain failed: {error}"
        self.say(f"notice: node {self.env.rank} goes in {seconds:.0f} s; {answer}")

    def _dead_ray_process(self) -> str:
        dead = self.ray_node.dead_processes()
        return str(dead[0][0]) if dead else ""

    def _copy_events(self) -> None:
        """Bring what workers and driver said to our standard output."""
        try:
            with (self.env.node_dir / EVENTS_FILE).open("rb") as file:
                file.seek(self.events_read)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        if whole:
            self.events_read += len(whole)
            sys.stdout.write(whole.decode(errors="replace"))
            sys.stdout.flush()


class Driver:
    """The program of the lease's stage, forked where there is a fork server. What Ray prints in it goes to a file."""

    def __init__(self, arguments: Sequence[str], forks: forkserver.ForkServer, log_path: Path) -> None:
        self._arguments = list(arguments)
        self._forks = forks
        self._log_path = log_path
        self._report: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = {**os.environ, "SLM_NODE_PID": str(os.getpid())}
        with self._log_path.open("ab") as log:
            if self._forks.wait_ready(WARM_SECONDS):
                with contextlib.suppress(OSError):
                    path = self._forks.socket_path
                    self._report = forkserver.run_forked(path, self._arguments, environ, log.fileno())
                    self._report.setblocking(False)
                    return
            command = [sys.executable, *self._arguments]
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        if self._report is None:
            return None if self._process is None else self._process.poll()
        try:
            line = self._report.recv(4096)
        except BlockingIOError:
            return None
        except OSError:
            return EXIT_BROKEN
        return int(json.loads(line)["exit_code"]) if line else EXIT_BROKEN

    def last_lines(self) -> str:
        """The end of what it printed."""
        return self._log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]


def _ray_node(env: NodeEnv, spec: RunSpec, temp_dir: Path) -> tuple[Any, Any]:
    """Ray's own node class without dashboard and autoscaler, and its parameters for this node."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):  # type: ignore[misc]
        def start_api_server(self, **_: object) -> None:
            """No dashboard: 1 s and 100 MB for pages that nobody sees."""

    where = {"gcs_server_port": env.head_port} if env.is_head else {"gcs_address": env.head_address}
    params = RayParams(
        node_ip_address=env.node_ip,
        num_cpus=spec.workers_per_node + CONTROL_CPUS,
        resources={NODE_RESOURCE: spec.workers_per_node},
        labels={RANK_LABEL: str(env.rank)},
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(temp_dir),
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        object_manager_port=0,
        metrics_agent_port=0,
        metrics_export_port=0,
        dashboard_agent_listen_port=0,
        runtime_env_agent_port=0,
        **({"setup_worker_path": forkserver.__file__} if forkserver.SUPPORTED else {}),
        **where,
    )
    return LeanNode, params


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    half = path.with_name(path.name + ".half")
    half.write_text(json.dumps(facts))
    half.replace(path)

"""Starting one node: a guard, a folder, a log and an environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cost.errors import UserError
from orchestrator.backends.local.records import Node
from tasks.guard.processes import KEEP_ENVIRONMENT
from tasks.node.guard_archive import write_guard_archive
from tasks.own_module import SAFE_PATH
from tasks.run_store_keys import SPEC
from tasks.stores.opening import open_store
from trainer.run_store.base import DirectoryStore

HOST = "127.0.0.1"
TERMINATORS = ("family", "provider-limit:market")
"""What ends a node of this cloud: its guard, and the market's own time limit."""
NODE_VARIABLES = (
    "SLM_SPEC",
    "SLM_STORE",
    "SLM_LEASE",
    "SLM_RANK",
    "SLM_NUM_NODES",
    "SLM_NODE_IP",
    "SLM_HEAD_IP",
    "SLM_HEAD_PORT",
    "SLM_NODE_DIR",
    "SLM_NODE_MARK",
    "SLM_NOTICE_FILE",
    "SLM_TERM_SECONDS",
)
STOP_SECONDS = 2.0
"""How long a node's command has to exit when its lease is stopped."""
NOT_INHERITED = (*NODE_VARIABLES, "RAY_ADDRESS", "RAY_TMPDIR", "RAY_JOB_ID")
"""Must not be inherited by a node or a market: another node's identity, another Ray cluster."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a lease is started with. TTL, grant and period are real seconds."""

    lease_id: str
    run_id: str
    num_nodes: int
    command: Sequence[str]
    usd_per_hour: str
    first_grant_seconds: float
    ttl_seconds: float
    store_uri: str
    market: str
    seed: int
    time_scale: float
    guard_period_seconds: float
    on_notice: str
    environment: Mapping[str, str]


def spawn(order: Order, node: Node, store: Path, head_port: int, metadata_url: str) -> subprocess.Popen[bytes]:
    """Start the guard, which starts the command; raises OSError."""
    Path(node.node_dir).mkdir(parents=True)
    Path(node.tmp_dir).mkdir(mode=0o700)
    log = store / "logs" / f"{node.lease_id}-{node.rank}.log"
    log.parent.mkdir(exist_ok=True)
    options = {
        "--store": str(store),
        "--lease": node.lease_id,
        "--rank": str(node.rank),
        "--first-grant": str(order.first_grant_seconds),
        "--period": str(order.guard_period_seconds),
        "--notice": f"url:{metadata_url}/{node.instance_id}/preemption",
        "--on-notice": order.on_notice,
        "--mark": node.instance_id,
        "--node-dir": node.node_dir,
    }
    arguments = [word for option, value in options.items() if value for word in (option, value)]
    arguments += [word for name in TERMINATORS for word in ("--terminator", name)]
    program = write_guard_archive(Path(node.node_dir))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), *arguments, "--", *order.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=node.node_dir,
            env=node_environment(order, node, store, head_port),
        )


def node_environment(order: Order, node: Node, store: Path, head_port: int) -> dict[str, str]:
    """The market's own environment, the order's, and the variables of every node."""
    return {
        "OMP_NUM_THREADS": "1",
        **clean_environment(),
        **KEEP_ENVIRONMENT,
        **SAFE_PATH,
        **order.environment,
        "TMPDIR": node.tmp_dir,
        "SLM_SPEC": str(store / SPEC),
        "SLM_STORE": order.store_uri,
        "SLM_LEASE": node.lease_id,
        "SLM_RANK": str(node.rank),
        "SLM_NUM_NODES": str(order.num_nodes),
        "SLM_NODE_IP": HOST,
        "SLM_HEAD_IP": HOST,
        "SLM_HEAD_PORT": str(head_port),
        "SLM_NODE_DIR": node.node_dir,
        "SLM_NODE_MARK": node.instance_id,
        "SLM_NOTICE_FILE": str(node.path("notice.json")),
        "SLM_TERM_SECONDS": str(STOP_SECONDS),
    }


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}


def store_root(order: Order) -> Path:
    """The folder of the run store, which must be there.

    Raises:
        SlmError: It is not a folder, or it is gone.
    """
    store = open_store(order.store_uri, create=False)
    if not isinstance(store, DirectoryStore):
        raise UserError(f"local nodes need a run store that is a folder, not {order.store_uri}.")
    return store.root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def short_folder() -> Path:
    """Where temporary folders go: Ray's socket paths below must stay under 104 characters."""
    return Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())

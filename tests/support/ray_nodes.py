"""Plays the backend for tests and bench/recovery_local.py: nodes as real process trees on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tasks.node.environment import boottime
from tasks.own_module import own_module
from tasks.recipe.load import load_recipe
from tasks.spec import RunSpec
from tests.support.hostile_folder import write_hostile_modules
from trainer.run_store.base import StoreKeyMissing, open_store

VOCABULARY = 1024
LEASE = "lease-1"


def write_data(folder: Path, num_tokens: int = 200_000) -> None:
    """Two splits of tokens that follow each other in a pattern, in the format of tasks.data.prepare."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    splits = {}
    for split in ("train", "heldout"):
        steps = rng.integers(1, 4, num_tokens)
        (np.cumsum(steps) % VOCABULARY).astype("<u2").tofile(folder / f"{split}-0.bin")
        shard = {"file": f"{split}-0.bin", "num_tokens": num_tokens, "sha256": ""}
        splits[split] = {"sources": [{"name": "text", "weight": 1.0, "shards": [shard]}]}
    index = {
        "version": 1,
        "vocab_size": VOCABULARY,
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": "0" * 64,
        "bytes_per_token": 1.0,
        "splits": splits,
        "heldout_unigram_entropy_nats": float(np.log(VOCABULARY)),
        "fingerprint": "pattern",
    }
    (folder / "index.json").write_text(json.dumps(index))


class Nodes:
    """A lease of nodes. Use as a context: afterwards nothing of it runs and its folder is gone."""

    def __init__(self, num_nodes: int = 2, *, settings: tuple[str, ...] = (), environ: dict[str, str] | None = None):
        self.root = Path(tempfile.mkdtemp(prefix="slm-nodes-"))
        self.num_nodes = num_nodes
        self.environ = environ or {}
        self.head_port = free_port()
        self.store = open_store(str(self.root / "store"))
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.marks: dict[int, str] = {}
        self.starts = 0
        write_data(self.root / "data")
        self.write_spec(settings)

    def write_spec(self, settings: tuple[str, ...] = (), min_workers: int = 1) -> None:
        fixed = ("training.num_steps=100000", f"nodes.max={self.num_nodes}", "checkpoint.every_steps=null")
        spec = RunSpec(
            run_id="run-1",
            lease_id=LEASE,
            attempt=1,
            recipe=load_recipe("demo", ["precision=bf16", *fixed, *settings]),
            store_uri=self.store.uri,
            data_dir=str(self.root / "data"),
            num_nodes=self.num_nodes,
            min_workers=min_workers,
            max_workers=self.num_nodes,
            checkpoint_interval_seconds=5.0,
        )
        spec.dump(self.root / "spec.json")

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in list(self.marks):
            self.kill(rank)
        shutil.rmtree(self.root, ignore_errors=True)

    def node_dir(self, rank: int) -> Path:
        return self.root / f"node-{rank}"

    def start(self, rank: int) -> None:
        """A fresh node of this rank, as a backend would start it."""
        shutil.rmtree(self.node_dir(rank), ignore_errors=True)
        self.node_dir(rank).mkdir()
        write_hostile_modules(self.node_dir(rank))
        self.marks[rank] = f"{LEASE}-{rank}-{uuid.uuid4().hex[:8]}"
        self.starts += 1
        environ = {
            **os.environ,
            "SLM_SPEC": str(self.root / "spec.json"),
            "SLM_STORE": self.store.uri,
            "SLM_LEASE": LEASE,
            "SLM_RANK": str(rank),
            "SLM_NUM_NODES": str(self.num_nodes),
            "SLM_NODE_IP": "127.0.0.1",
            "SLM_HEAD_IP": "127.0.0.1",
            "SLM_HEAD_PORT": str(self.head_port),
            "SLM_NODE_DIR": str(self.node_dir(rank)),
            "SLM_NODE_MARK": self.marks[rank],
            "SLM_NOTICE_FILE": str(self.node_dir(rank) / "notice.json"),
            "SPT_NOENV": "1",
            **self.environ,
        }
        with self.log_path(rank).open("ab") as log:
            self.processes[rank] = subprocess.Popen(
                own_module("tasks", "node"),
                env=environ,
                cwd=self.node_dir(rank),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log_path(self, rank: int) -> Path:
        return self.root / f"node-{rank}.log"

    def log(self, rank: int) -> str:
        return self.log_path(rank).read_text(errors="replace")

    def family(self, rank: int) -> list[psutil.Process]:
        """All processes that carry this node's mark."""
        return marked(self.marks[rank])

    def kill(self, rank: int) -> None:
        """SIGKILL to everything of a node at once, as when a cloud takes it."""
        until = time.monotonic() + 10
        while time.monotonic() < until and (family := self.family(rank)):
            for process in family:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            self.processes[rank].poll()
            time.sleep(0.02)
        self.processes[rank].wait(timeout=5)

    def terminate(self, rank: int) -> None:
        self.processes[rank].send_signal(signal.SIGTERM)

    def notice(self, rank: int, seconds: float) -> None:
        """What the guard writes when the cloud announces that it takes the node."""
        path = self.node_dir(rank) / "notice.json"
        half = path.with_suffix(".half")
        half.write_text(json.dumps({"deadline_boottime": boottime() + seconds, "seconds": seconds}))
        half.replace(path)

    def command(self, command: str, number: int) -> None:
        facts = {"command": command, "number": number, "reason": "test"}
        self.store.write(f"control/{LEASE}.json", json.dumps(facts).encode())

    def read(self, key: str) -> dict[str, Any]:
        """A JSON object of the store; empty while there is none."""
        try:
            return dict(json.loads(self.store.read(key)))
        except StoreKeyMissing:
            return {}

    def progress(self) -> dict[str, Any]:
        return self.read("progress/latest.json")

    def phases(self) -> list[dict[str, Any]]:
        return [self.read(key) for key in self.store.list("phases/")]

    def incarnations(self) -> list[dict[str, Any]]:
        keys = sorted(self.store.list("incarnations/"), key=lambda key: int(Path(key).stem))
        return [self.read(key) for key in keys]

    def checkpoints(self) -> list[tuple[int, int]]:
        """(incarnation, step) of every whole checkpoint."""
        found = []
        for key in self.store.list("checkpoints/"):
            if key.endswith("manifest.json"):
                _, incarnation, step, _ = key.split("/")
                found.append((int(incarnation.split("=")[1]), int(step.split("=")[1])))
        return sorted(found)

    def trains(self, world_size: int, incarnation_after: int = -1) -> bool:
        """Whether a group of that size has made a step in an incarnation after `incarnation_after`."""
        now = self.progress()
        made_a_step = now.get("loss") is not None
        return made_a_step and now["world_size"] == world_size and now["incarnation"] > incarnation_after

    def wait(self, what: str, condition: Callable[[], Any], seconds: float) -> float:
        """Seconds until `condition` holds; with the nodes' logs in the error when it does not in time."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                logs = "\n".join(f"--- node {rank}\n{self.log(rank)[-6000:]}" for rank in self.processes)
                raise AssertionError(f"not within {seconds:.0f} s: {what}; progress {self.progress()}\n{logs}")
            time.sleep(0.05)
        return time.monotonic() - began


def marked(mark: str) -> list[psutil.Process]:
    """Processes whose environment carries a node's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLM_NODE_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

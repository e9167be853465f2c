"""What a backend tells a node through its environment, the node's clock, and the node's log lines.

Standard library only: read by the node task, the driver, and every Ray worker, which inherit the same variables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cost.errors import UserError

EVENTS_FILE = "events.log"
"""Lines of workers and driver; the node task copies them to its standard output, which is the node's log."""


@dataclass(frozen=True)
class NodeEnv:
    """One node of a lease. Rank 0 runs Ray's head and the driver."""

    spec_path: Path
    store_uri: str
    lease_id: str
    rank: int
    num_nodes: int
    node_ip: str
    head_ip: str
    head_port: int
    node_dir: Path
    notice_file: Path

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> NodeEnv:
        """Read the variables that every backend sets.

        Raises:
            UserError: One is missing or is no number where one is needed.
        """

        def text(name: str) -> str:
            value = environ.get(name, "")
            if not value:
                raise UserError(f"{name} is not set; `python -m tasks node` is started by a backend, which sets it.")
            return value

        def number(name: str) -> int:
            try:
                return int(text(name))
            except ValueError:
                raise UserError(f"{name}={environ[name]!r} is no whole number; the backend sets it wrongly.") from None

        node_dir = Path(text("SLM_NODE_DIR"))
        return cls(
            spec_path=Path(text("SLM_SPEC")),
            store_uri=text("SLM_STORE"),
            lease_id=text("SLM_LEASE"),
            rank=number("SLM_RANK"),
            num_nodes=number("SLM_NUM_NODES"),
            node_ip=text("SLM_NODE_IP"),
            head_ip=text("SLM_HEAD_IP"),
            head_port=number("SLM_HEAD_PORT"),
            node_dir=node_dir,
            notice_file=Path(environ.get("SLM_NOTICE_FILE") or node_dir / "notice.json"),
        )

    @property
    def is_head(self) -> bool:
        return self.rank == 0

    @property
    def head_address(self) -> str:
        return f"{self.head_ip}:{self.head_port}"

    def say(self, text: str) -> None:
        """Add one line to the node's log, from any process of the node; a failing disk is not worth dying for."""
        line = log_line(text).encode()
        try:
            handle = os.open(self.node_dir / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            os.write(handle, line)
        except OSError:
            pass
        finally:
            os.close(handle)


def log_line(text: str) -> str:
    """One line, with the time in UTC to the tenth of a second."""
    now = datetime.now(UTC)
    return f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 100_000}Z {text.rstrip()}\n"


def boottime() -> float:
    """Seconds since boot, counting suspend where the system can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

"""The guard with real processes: sleepers as the command, grants of a second or two."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from tasks import run_store_keys as keys
from tasks.guard.agent import UNGUARDED_EXIT_CODE
from tasks.guard.clock import boottime
from tasks.guard.files import read_json, write_json
from tasks.guard.processes import MARK_VARIABLE, start_time
from tests.support.guarded import (
    GRANTS,
    LEASE,
    SLACK_SECONDS,
    SLEEPER,
    Node,
    node,
    until,
)

__all__ = ["node"]

# Children that a group kill misses: one in a session of its own that ignores SIGTERM, one without environment.
ESCAPING = textwrap.dedent("""
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; sleep 600; true"], start_new_session=True)
    bare = subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)
    with open(sys.argv[1], "w") as file:
        file.write(f"{deaf.pid} {bare.pid}\\n")
    time.sleep(600)
""")


def test_an_unrenewed_node_ends_with_all_its_processes(node: Callable[..., Node], tmp_path: Path) -> None:
    told = tmp_path / "pids"
    foreign = subprocess.Popen(SLEEPER, env={**os.environ, MARK_VARIABLE: "test-another-node"})
    try:
        unpaid = node([sys.executable, "-S", "-c", ESCAPING, str(told)], first_grant=2.5)
        until(lambda: told.exists() and told.read_text().endswith("\n"))
        children = [int(pid) for pid in told.read_text().split()]
        assert all(start_time(pid) for pid in children)
        until(lambda: not unpaid.alive())
        assert 2.5 <= boottime() - unpaid.started < 2.5 + SLACK_SECONDS
        assert not any(start_time(pid) for pid in children)
        assert unpaid.events()[0] == "armed"
        assert {"command asked to stop", "deadline", "processes ended"} <= set(unpaid.events())
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_grants_keep_a_node_until_the_store_vanishes(node: Callable[..., Node]) -> None:
    paid = node(SLEEPER, first_grant=2.0)
    command = paid.pid_of("command")
    number = paid.grant(4.0)
    until(lambda: paid.deadline() > 3.0)
    before = paid.deadline()
    paid.grant(600.0, fencing_token=0, number=number)  # a replaced supervisor
    paid.grant(600.0, number=number + 1000)  # a request that was never sent
    seen = paid.request()["number"]
    until(lambda: paid.request()["number"] >= seen + 4)
    assert paid.deadline() == before
    lost = paid.store.rename(paid.store.with_name("elsewhere"))
    until(lambda: not paid.alive())
    assert before <= boottime() - paid.started < before + SLACK_SECONDS
    assert start_time(command) is None
    assert lost.exists() and not paid.store.exists()


def test_a_killed_guard_is_restarted_and_the_command_lives_on(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=30.0)
    command, first = kept.pid_of("command"), kept.pid_of("deadline")
    kept.grant(20.0, fencing_token=3)
    until(lambda: read_json(str(kept.dir / "deadline.json"))["fencing_token"] == 3)
    os.kill(first, signal.SIGKILL)
    kept.process.wait()
    assert until(lambda: kept.pid_of("deadline")) != first
    assert kept.pid_of("command") == command
    assert kept.deadline() < 30.0  # what was granted, not a new first grant
    kept.grant(600.0, fencing_token=2)
    seen = kept.request()["number"]
    until(lambda: kept.request()["number"] >= seen + 4)
    assert kept.deadline() < 30.0  # the replaced supervisor is still refused
    os.kill(command, signal.SIGKILL)
    until(lambda: kept.request()["state"] == "exited")
    assert kept.request()["exit_code"] == 137


def test_a_node_of_another_boot_ends_at_once(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    write_json(str(tmp_path / "node/deadline.json"), {"deadline": boottime() + 600, "boot_id": "before"})
    rebooted = node(SLEEPER, first_grant=600.0)
    until(lambda: not rebooted.alive() and rebooted.process.poll() is not None)


def test_a_store_that_hangs_does_not_hold_up_the_end(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "store" / "grants" / LEASE).mkdir(parents=True)
    os.mkfifo(tmp_path / "store" / GRANTS)  # whoever opens it to read waits for ever
    stuck = node(SLEEPER, first_grant=2.0)
    until(lambda: stuck.alive())
    until(lambda: not stuck.alive())
    assert boottime() - stuck.started < 2.0 + SLACK_SECONDS


def test_a_full_disk_does_not_hold_up_the_end(node: Callable[..., Node]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # inherited: every write of the node fails
    try:
        full = node(SLEEPER, first_grant=2.0)
        until(lambda: full.alive())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    until(lambda: not full.alive())
    assert 2.0 <= boottime() - full.started < 2.0 + SLACK_SECONDS
    assert not (full.dir / "deadline.json").exists()


def test_a_refusal_to_start_has_the_exit_code_that_the_supervisor_knows() -> None:
    assert UNGUARDED_EXIT_CODE == keys.EXIT_UNGUARDED

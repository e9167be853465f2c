"""Parts of the node task that need no Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cost.errors import UserError
from tasks.__main__ import main as tasks_main
from tasks.node import forkserver
from tasks.node import ray_node as cluster
from tasks.node.environment import NodeEnv, log_line
from tasks.node.processes import Family, make_temp_dir
from tasks.node.ray_node import ClusterError, NodeProcesses, check_port_free, drain, drain_main, seconds_after_sigterm
from tests.support.ray_nodes import free_port


def environ(folder: Path, **changes: str) -> dict[str, str]:
    return {
        "SLM_SPEC": str(folder / "spec.json"),
        "SLM_STORE": str(folder / "store"),
        "SLM_LEASE": "lease-1",
        "SLM_RANK": "1",
        "SLM_NUM_NODES": "2",
        "SLM_NODE_IP": "127.0.0.1",
        "SLM_HEAD_IP": "127.0.0.1",
        "SLM_HEAD_PORT": str(free_port()),
        "SLM_NODE_DIR": str(folder / "node"),
    } | changes


def test_a_node_knows_its_place_from_the_environment(tmp_path: Path) -> None:
    env = NodeEnv.from_environ(environ(tmp_path, SLM_HEAD_PORT="6001"))
    assert (env.rank, env.is_head, env.head_address) == (1, False, "127.0.0.1:6001")
    assert env.notice_file == tmp_path / "node" / "notice.json"


def test_a_missing_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SLM_LEASE is not set"):
        NodeEnv.from_environ(environ(tmp_path, SLM_LEASE=""))


def test_a_rank_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SLM_RANK='first' is no whole number"):
        NodeEnv.from_environ(environ(tmp_path, SLM_RANK="first"))


def test_a_line_of_the_log_says_when_in_utc() -> None:
    assert log_line("two\n").endswith("Z two\n")
    assert log_line("two")[10] == "T"


def test_lines_of_all_processes_reach_the_nodes_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = NodeEnv.from_environ(environ(tmp_path))
    with NodeProcesses(env) as node:
        env.say("from a worker")
        node.say("from the node")
        env.say("at the end")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["from a worker", "from the node", "at the end"]


def test_an_unknown_task_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_main(["trian"]) == 2
    message = capsys.readouterr().err
    assert "no task is called 'trian'; one of: prepare, node, rented-node, drain, time-processor, pretrain" in message
    assert tasks_main([]) == 2


def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLM_NODE_DIR", raising=False)
    assert tasks_main(["node"]) == 2
    assert capsys.readouterr().err == (
        "SLM_NODE_DIR is not set; `python -m tasks node` is started by a backend, which sets it.\n"
    )


def test_no_head_within_the_bound_is_said_and_safe_to_relaunch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 0.1)
    env = NodeEnv.from_environ(environ(tmp_path))
    with (
        NodeProcesses(env) as node,
        pytest.raises(ClusterError, match=f"no head of lease-1 answered at 127.0.0.1:{env.head_port}"),
    ):
        node._find_head()


class NoRay:
    """Stands where Ray's node class does when Ray cannot start."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("no shared memory")

    def get_gcs_client(self) -> object:
        raise RuntimeError("gone")


def test_ray_that_does_not_start_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ray_node", lambda *_: (NoRay, None))
    with NodeProcesses(NodeEnv.from_environ(environ(tmp_path))) as node:
        with pytest.raises(ClusterError, match=r"did not start on node 1 \(RuntimeError: no shared memory\)"):
            node._start_ray(None)  # type: ignore[arg-type]
        node.ray_node, node.facts = NoRay.__new__(NoRay), {"node_id": "n"}
        with pytest.raises(ClusterError, match="node 1 lost Ray's head while it joined"):
            node._announce()


def test_a_port_in_use_is_found_before_ray_is_started() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ClusterError, match="Ray's head cannot listen at"):
            check_port_free("127.0.0.1", taken.getsockname()[1])
    check_port_free("127.0.0.1", free_port())


def test_nothing_is_drained_where_ray_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_NODE_DIR", str(tmp_path))
    assert drain_main(["--seconds", "30"]) == 0
    assert "no Ray node is recorded" in capsys.readouterr().out
    (tmp_path / "ray.json").write_text(json.dumps({"head": False, "gcs_ip": "127.0.0.1", "gcs_port": free_port()}))
    assert drain_main(["--seconds", "30"]) == 0
    assert "head is gone; nothing to drain" in capsys.readouterr().out


def test_the_head_is_never_drained() -> None:
    assert "cannot be drained" in drain({"head": True}, 30.0)


def test_every_descendant_is_ended_also_one_that_lost_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; from tasks.node.processes import Family, become_subreaper\n"
        "become_subreaper(); family = Family()\n"
        "subprocess.Popen(['sh', '-c', 'sleep 60 & sleep 60 & echo; trap : TERM; wait; sleep 60']).stdout\n"
        "parent = subprocess.Popen(['sh', '-c', 'sleep 61 & exec sleep 0.3']); time.sleep(0.2); family.remember()\n"
        "parent.wait(); family.end()\n"
    )
    mark = f"mark-{tmp_path.name}"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "SLM_TEST_MARK": mark}, check=True, timeout=30)
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLM_TEST_MARK") == mark:
                left.append(process)
        except psutil.Error:
            continue
    assert left == []


def test_folders_of_killed_nodes_are_removed_and_others_kept() -> None:
    mine = make_temp_dir()
    dead = mine.with_name("slm-ray-999999999.1700000000-abc")
    foreign = mine.with_name("slm-ray-of-somebody.else-abc")
    dead.mkdir()
    foreign.mkdir()
    try:
        other = make_temp_dir()
        assert other.exists()
        other.rmdir()
        assert mine.exists()
        assert not dead.exists()
        assert foreign.exists()
    finally:
        mine.rmdir()
        foreign.rmdir()


# -- the fork server


def request_of(*arguments: str) -> dict[str, object] | None:
    return forkserver._fork_request(["/ray/default_worker.py", "--language=PYTHON", *arguments])


def test_a_plain_worker_is_forked_with_its_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    context = json.dumps({"env_vars": {"ADDED": "2"}, "command_prefix": [], "py_executable": sys.executable})
    request = request_of("--node-id=x", f"--serialized-runtime-env-context={context}")
    assert request is not None
    assert request["argv"] == ["/ray/default_worker.py", "--node-id=x"]
    environment = request["env"]
    assert isinstance(environment, dict)
    assert (environment["KEPT"], environment["ADDED"]) == ("1", "2")


@pytest.mark.parametrize(
    "context",
    [
        {"command_prefix": ["nice"]},
        {"py_executable": "/usr/bin/python0"},
        {"override_worker_entrypoint": "/elsewhere.py"},
        {"env_vars": {"PATH": "/x:${PATH}"}},
    ],
)
def test_what_a_fork_could_not_imitate_is_left_to_ray(context: dict[str, object]) -> None:
    assert request_of(f"--serialized-runtime-env-context={json.dumps(context)}") is None


@pytest.mark.skipif(not forkserver.SUPPORTED, reason="forks of a process with frameworks loaded: Linux only")
def test_a_fork_runs_any_python_program_and_reports_its_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ['Q'], [name in sys.modules for name in ('torch', 'ray')])\n"
        "sys.exit(7)\n"
    )
    server = forkserver.ForkServer(tmp_path / "socket")
    server.start()
    assert server.wait_ready(60)
    try:
        with (tmp_path / "out").open("wb") as out:
            argv = [str(program), "one"]
            report = forkserver.run_forked(tmp_path / "socket", argv, {**os.environ, "Q": "!"}, out.fileno())
        report.settimeout(20)
        assert json.loads(report.recv(100)) == {"exit_code": 7}
        assert (tmp_path / "out").read_text() == "['one'] ! [True, False]\n"
    finally:
        assert server.process is not None
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(timeout=10)
    assert not server.alive
    with pytest.raises(OSError, match="refused"):
        forkserver.run_forked(tmp_path / "socket", ["-c"], {}, 1)


def test_family_end_waits_for_nothing_when_there_is_nothing() -> None:
    began = time.monotonic()
    Family().end()
    assert time.monotonic() - began < 2


def test_sigterm_leaves_the_time_that_is_granted_and_paid_for(tmp_path: Path) -> None:
    assert seconds_after_sigterm({}, tmp_path, 1000.0) == cluster.TERM_SECONDS
    assert seconds_after_sigterm({"SLM_TERM_SECONDS": "90"}, tmp_path, 1000.0) == 90.0
    assert seconds_after_sigterm({"SLM_TERM_SECONDS": "soon"}, tmp_path, 1000.0) == cluster.TERM_SECONDS
    (tmp_path / "deadline.json").write_text('{"deadline": 1001.5}')  # the guard's
    assert seconds_after_sigterm({"SLM_TERM_SECONDS": "90"}, tmp_path, 1000.0) == 1.5


def test_sigterm_is_a_notice_once_training_may_run_and_the_end_before_and_when_repeated(tmp_path: Path) -> None:
    env = NodeEnv.from_environ(environ(tmp_path))
    with NodeProcesses(env) as node:
        with pytest.raises(cluster.Stopped):
            node.on_sigterm(signal.SIGTERM, None)
        node.may_train = True
        node.on_sigterm(signal.SIGTERM, None)
        told = json.loads(env.notice_file.read_bytes())
        assert told["source"] == "SIGTERM"
        assert told["deadline_boottime"] == node.ends_at
        with pytest.raises(cluster.Stopped):
            node.on_sigterm(signal.SIGTERM, None)


def test_sigterm_without_time_for_a_checkpoint_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_TERM_SECONDS", "2")
    env = NodeEnv.from_environ(environ(tmp_path))
    with NodeProcesses(env) as node:
        node.may_train = True
        with pytest.raises(cluster.Stopped):
            node.on_sigterm(signal.SIGTERM, None)
    assert not env.notice_file.exists()

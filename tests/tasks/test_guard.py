"""The guard with real processes: sleepers as the command, terms of a second or two."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import guard
from tasks.guard import KILL, RESTART, TERMINATE, WAIT, Answer, State, decide, decide_fuse, issue, parse_answer
from tests.support.guarded import GRANTS, LEASE, SLACK_SECONDS, SLEEPER, Node, node, until

__all__ = ["node"]

# -- the decision ----------------------------------------------------------------------------------


def asked(*moments: float, deadline: float) -> State:
    """A guard that sent request 1 at the first moment, 2 at the second, and so on."""
    state = State(deadline=deadline)
    for moment in moments:
        state, _ = issue(state, moment, 1)
    return state


def test_a_grant_counts_from_the_moment_of_its_request() -> None:
    state, action = decide(asked(100.0, 102.0, deadline=110.0), 109.0, Answer(1, 1, 30.0), term_seconds=1.0)
    assert (state.deadline, action) == (130.0, WAIT)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(2, 3, 60.0),  # a request that was never sent
        Answer(2, 1, 60.0),  # older than what was accepted
        Answer(1, 2, 60.0),  # from a supervisor that was replaced
    ],
)
def test_stale_answers_are_ignored(answer: Answer) -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(2, 2, 20.0))
    state, _ = decide(accepted, 104.0, answer)
    assert state.deadline == 122.0


def test_a_new_supervisor_may_answer_an_older_request() -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(1, 2, 20.0))
    state, _ = decide(accepted, 104.0, Answer(2, 1, 15.0))
    assert (state.deadline, state.epoch) == (115.0, 2)


def test_a_newer_grant_may_shorten() -> None:
    accepted, _ = decide(asked(100.0, 102.0, deadline=110.0), 103.0, Answer(1, 1, 60.0))
    state, action = decide(accepted, 104.0, Answer(1, 2, 1.0))
    assert (state.deadline, action) == (103.0, KILL)


def test_the_command_is_asked_to_end_before_it_is_killed_and_then_no_answer_helps() -> None:
    state = asked(100.0, deadline=110.0)
    assert decide(state, 108.9, None, term_seconds=1.0)[1] == WAIT
    ending, action = decide(state, 109.0, None, term_seconds=1.0)
    assert action == TERMINATE
    still, action = decide(ending, 109.5, Answer(1, 1, 600.0), term_seconds=1.0)
    assert (still.deadline, action) == (110.0, TERMINATE)
    assert decide(ending, 110.0, Answer(1, 1, 600.0))[1] == KILL


def test_an_answer_that_is_read_after_the_deadline_comes_too_late() -> None:
    assert decide(asked(100.0, deadline=110.0), 110.0, Answer(1, 1, 600.0))[1] == KILL


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.builds(Answer, st.integers(0, 3), st.integers(0, 12), st.floats(0, 50)),
        ),
        max_size=12,
    )
)
def test_a_node_never_lives_longer_than_the_longest_valid_grant(answers: list[Answer | None]) -> None:
    state, paid = State(deadline=10.0), 10.0
    for moment, answer in enumerate(answers):
        state, number = issue(state, float(moment), 1)
        assert number == moment + 1
        if answer is not None and 1 <= answer.number <= number:
            paid = max(paid, answer.number - 1 + answer.duration_seconds)
        state, action = decide(state, moment + 0.5, answer)
        assert state.deadline <= paid
        assert (action == KILL) == (moment + 0.5 >= state.deadline)
        if action == KILL:
            return


def test_request_numbers_only_rise() -> None:
    state, first = issue(State(deadline=1.0), 0.0, 1000)
    state, second = issue(state, 1.0, 5)
    assert (first, second) == (1000, 1001)
    assert issue(State(deadline=1.0, accepted=2000), 0.0, 1)[1] == 2001


@pytest.mark.parametrize(
    ("now", "guard_alive", "action"),
    [(9.0, True, WAIT), (9.0, False, RESTART), (11.9, True, WAIT), (12.0, True, KILL), (12.0, False, KILL)],
)
def test_the_fuse_restarts_a_dead_guard_and_ends_what_a_hung_one_left(
    now: float, guard_alive: bool, action: str
) -> None:
    assert decide_fuse(10.0, now, guard_alive, margin_seconds=2.0) == action


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1]",
        b"null",
        b'{"epoch": 1, "number": 1}',
        b'{"epoch": 1, "number": 1, "duration_seconds": NaN}',
        b'{"epoch": 1, "number": 1, "duration_seconds": Infinity}',
        b'{"epoch": 1, "number": 1, "duration_seconds": -1}',
        b'{"epoch": 1, "number": 1, "duration_seconds": "9"}',
        b'{"epoch": 1, "number": true, "duration_seconds": 9}',
    ],
)
def test_what_is_not_a_grant_grants_nothing(data: bytes) -> None:
    assert parse_answer(data) is None


def test_a_grant_is_read() -> None:
    assert parse_answer(b'{"epoch": 2, "number": 7, "duration_seconds": 9}') == Answer(2, 7, 9.0)


def test_the_guard_needs_only_an_old_python_and_its_standard_library() -> None:
    tree = ast.parse(Path(guard.__file__).read_text(), feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def other_pythons() -> list[str]:
    """One interpreter of each version on this machine, from 3.8 on, other than ours."""
    names = [f"python3.{minor}" for minor in range(8, 20)]
    paths = [Path("/usr/bin/python3"), *(Path(found) for name in names if (found := shutil.which(name)))]
    paths += sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python"))
    by_version = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            said = subprocess.run([path, "-c", ASK_VERSION], capture_output=True, text=True, timeout=20, check=True)
            by_version.setdefault(int(said.stdout), str(path))
    return [by_version[minor] for minor in sorted(by_version) if minor >= 8 and minor != sys.version_info.minor]


ASK_VERSION = "import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)"


def test_any_python_of_this_machine_runs_a_node_to_its_end(tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no python on this machine but the one that runs the tests")
    for number, python in enumerate(pythons):
        root = tmp_path / str(number)
        root.mkdir()
        each = Node(root, SLEEPER, first_grant=3.0, python=python)
        try:
            command = each.pid_of("command")
            each.grant(4.0)
            until(lambda each=each: each.deadline() > 3.5)
            until(lambda each=each: not each.alive())
            assert guard.start_time(command) is None
            assert each.events()[-1] == "killed"
        finally:
            guard.kill_family(each.mark)
            each.process.wait()
            each.log.close()


# -- with processes --------------------------------------------------------------------------------


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
    foreign = subprocess.Popen(SLEEPER, env={**os.environ, guard.MARK_VARIABLE: "test-another-node"})
    try:
        unpaid = node([sys.executable, "-S", "-c", ESCAPING, str(told)], first_grant=2.5)
        until(lambda: told.exists() and told.read_text().endswith("\n"))
        children = [int(pid) for pid in told.read_text().split()]
        assert all(guard.start_time(pid) for pid in children)
        until(lambda: not unpaid.alive())
        assert 2.5 <= guard.boottime() - unpaid.started < 2.5 + SLACK_SECONDS
        assert not any(guard.start_time(pid) for pid in children)
        assert unpaid.events()[0] == "armed"
        assert {"terminate", "deadline", "killed"} <= set(unpaid.events())
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_who_was_known_by_pid_and_start_time_belongs_to_the_node_without_mark_or_parent() -> None:
    orphan = subprocess.Popen(["sleep", "600"], env={})
    try:
        start = until(lambda: guard.start_time(orphan.pid))
        assert guard.family("test-no-such-mark", {(orphan.pid, start)}) == {(orphan.pid, start)}
        assert guard.family("test-no-such-mark", {(orphan.pid, start + "0")}) == set()
        assert guard.kill_family("test-no-such-mark", {(orphan.pid, start)}) == {(orphan.pid, start)}
        assert orphan.wait(timeout=10) == -signal.SIGKILL
    finally:
        orphan.kill()
        orphan.wait()


def test_grants_keep_a_node_until_the_store_vanishes(node: Callable[..., Node]) -> None:
    paid = node(SLEEPER, first_grant=2.0)
    command = paid.pid_of("command")
    number = paid.grant(4.0)
    until(lambda: paid.deadline() > 3.0)
    before = paid.deadline()
    paid.grant(600.0, epoch=0, number=number)  # a replaced supervisor
    paid.grant(600.0, number=number + 1000)  # a request that was never sent
    seen = paid.request()["number"]
    until(lambda: paid.request()["number"] >= seen + 4)
    assert paid.deadline() == before
    lost = paid.store.rename(paid.store.with_name("elsewhere"))
    until(lambda: not paid.alive())
    assert before <= guard.boottime() - paid.started < before + SLACK_SECONDS
    assert guard.start_time(command) is None
    assert lost.exists() and not paid.store.exists()


def test_a_killed_guard_is_restarted_and_the_command_lives_on(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=30.0)
    command, first = kept.pid_of("command"), kept.pid_of("deadline")
    kept.grant(20.0, epoch=3)
    until(lambda: guard.read_json(str(kept.dir / "deadline.json"))["epoch"] == 3)
    os.kill(first, signal.SIGKILL)
    kept.process.wait()
    assert until(lambda: kept.pid_of("deadline")) != first
    assert kept.pid_of("command") == command
    assert kept.deadline() < 30.0  # what was granted, not a new first grant
    kept.grant(600.0, epoch=2)
    seen = kept.request()["number"]
    until(lambda: kept.request()["number"] >= seen + 4)
    assert kept.deadline() < 30.0  # the replaced supervisor is still refused
    os.kill(command, signal.SIGKILL)
    until(lambda: kept.request()["state"] == "exited")
    assert kept.request()["exit_code"] == 137


def test_the_exit_code_is_told_though_the_guard_was_killed(node: Callable[..., Node], tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait_then_seven = f"import os, sys, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\nsys.exit(7)"
    kept = node([sys.executable, "-S", "-c", wait_then_seven], first_grant=30.0)
    kept.pid_of("command")
    os.kill(kept.pid_of("deadline"), signal.SIGKILL)
    kept.process.wait()
    go.touch()
    until(lambda: kept.request().get("state") == "exited")
    assert kept.request()["exit_code"] == 7
    assert guard.read_json(str(kept.dir / "exit.json")) == {"exit_code": 7}
    assert guard.alive(guard.recorded(str(kept.dir / "deadline.json")))  # billing goes on, so the guard does too


def test_a_killed_fuse_is_restarted(node: Callable[..., Node]) -> None:
    kept = node(SLEEPER, first_grant=30.0)
    first = kept.pid_of("fuse")
    os.kill(first, signal.SIGKILL)
    until(lambda: kept.pid_of("fuse") != first)
    until(lambda: "fuse restarted" in kept.events())


def test_the_fuse_ends_what_a_stopped_guard_left(node: Callable[..., Node]) -> None:
    hung = node(SLEEPER, first_grant=2.0)
    assert hung.pid_of("command") != hung.pid_of("fuse")
    os.kill(hung.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: not hung.alive())
    assert guard.boottime() - hung.started < 2.0 + guard.FUSE_MARGIN_SECONDS + SLACK_SECONDS


def test_a_node_of_another_boot_ends_at_once(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    guard.write_json(str(tmp_path / "node/deadline.json"), {"deadline": guard.boottime() + 600, "boot_id": "before"})
    rebooted = node(SLEEPER, first_grant=600.0)
    until(lambda: not rebooted.alive() and rebooted.process.poll() is not None)


def test_a_notice_is_written_down_and_its_command_run_once(node: Callable[..., Node], tmp_path: Path) -> None:
    answers: list[int | None] = [None, None]

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = answers.pop(0) if answers else 25
            self.send_response(404 if seconds is None else 200)
            self.end_headers()
            if seconds is not None:
                self.wfile.write(json.dumps({"seconds": seconds}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/preemption"
        told = tmp_path / "told"
        on_notice = f"/bin/sh -c 'echo {{seconds}} >> {told}'"
        warned = node(SLEEPER, "--notice", f"url:{url}", "--on-notice", on_notice, first_grant=30.0)
        until(lambda: told.exists() and told.read_text())
        os.kill(warned.pid_of("deadline"), signal.SIGKILL)
        warned.process.wait()
        number = warned.request()["number"]
        warned.pid_of("deadline")
        until(lambda: warned.request()["number"] > number)
        server.shutdown()
    notice = guard.read_json(str(warned.dir / "notice.json"))
    assert notice["seconds"] == 25
    assert notice["deadline_boottime"] == pytest.approx(warned.started + 25, abs=10)
    assert told.read_text() == "25\n"


def test_a_store_that_hangs_does_not_hold_up_the_end(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "store" / "grants" / LEASE).mkdir(parents=True)
    os.mkfifo(tmp_path / "store" / GRANTS)  # whoever opens it to read waits for ever
    stuck = node(SLEEPER, first_grant=2.0)
    until(lambda: stuck.alive())
    until(lambda: not stuck.alive())
    assert guard.boottime() - stuck.started < 2.0 + SLACK_SECONDS


def test_a_full_disk_does_not_hold_up_the_end(node: Callable[..., Node]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # inherited: every write of the node fails
    try:
        full = node(SLEEPER, first_grant=2.0)
        until(lambda: full.alive())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    until(lambda: not full.alive())
    assert 2.0 <= guard.boottime() - full.started < 2.0 + SLACK_SECONDS
    assert not (full.dir / "deadline.json").exists()


# As `ps -axEww -o pid=,ppid=,stat=,lstart=,command=` prints it on macOS.
LISTING = """\
    1     0 Ss   Mon Nov 23 09:00:00 2026     /sbin/launchd
  501     1 S    Mon Nov 23 10:00:00 2026     python3 guard.py --mark m1 PATH=/bin SLM_NODE_MARK=m1 HOME=/u
  502   501 R+   Mon Nov 23 10:00:01 2026     sleep 600
  503     1 Z    Mon Nov 23 10:00:02 2026     (python3) SLM_NODE_MARK=m1
  504     1 S    Mon Nov 23 10:00:03 2026     python3 guard.py SLM_NODE_MARK=m12
"""


def test_processes_are_read_from_ps_where_there_is_no_proc() -> None:
    processes = guard.parse_ps(LISTING, "SLM_NODE_MARK=m1")
    assert [(process.pid, process.parent, process.marked) for process in processes] == [
        (1, 0, False),
        (501, 1, True),
        (502, 501, False),
        (504, 1, False),
    ]
    assert processes[1].start == "Mon-Nov-23-10:00:00-2026"


def test_a_command_that_cannot_be_run_is_told(node: Callable[..., Node]) -> None:
    wrong = node(["/no/such/program"], first_grant=30.0)
    until(lambda: wrong.request().get("exit_code") == 127)


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        guard.parse(
            ["--store", "s", "--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d"]
        )
    assert "a command must follow after --" in capsys.readouterr().err

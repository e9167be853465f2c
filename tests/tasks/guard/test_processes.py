"""Which processes belong to a node, by mark, by descent, and by pid and start time."""

from __future__ import annotations

import signal
import subprocess

from tasks.guard.processes import family, kill_family, parse_ps, start_time
from tests.support.guarded import (
    until,
)


def test_a_process_known_by_pid_and_start_time_belongs_to_the_node_without_mark_or_parent() -> None:
    orphan = subprocess.Popen(["sleep", "600"], env={})
    try:
        start = until(lambda: start_time(orphan.pid))
        assert family("test-no-such-mark", {(orphan.pid, start)}) == {(orphan.pid, start)}
        assert family("test-no-such-mark", {(orphan.pid, start + "0")}) == set()
        assert kill_family("test-no-such-mark", {(orphan.pid, start)}) == {(orphan.pid, start)}
        assert orphan.wait(timeout=10) == -signal.SIGKILL
    finally:
        orphan.kill()
        orphan.wait()


# As `ps -axEww -o pid=,ppid=,stat=,lstart=,command=` prints it on macOS.
LISTING = """\
    1     0 Ss   Mon Nov 23 09:00:00 2026     /sbin/launchd
  501     1 S    Mon Nov 23 10:00:00 2026     python3 guard.pyzz --mark m1 PATH=/bin SLM_NODE_MARK=m1 HOME=/u
  502   501 R+   Mon Nov 23 10:00:01 2026     sleep 600
  503     1 Z    Mon Nov 23 10:00:02 2026     (python3) SLM_NODE_MARK=m1
  504     1 S    Mon Nov 23 10:00:03 2026     python3 guard.pyzz SLM_NODE_MARK=m12
"""


def test_processes_are_read_from_ps_where_there_is_no_proc() -> None:
    processes = parse_ps(LISTING, "SLM_NODE_MARK=m1")
    assert [(process.pid, process.parent, process.marked) for process in processes] == [
        (1, 0, False),
        (501, 1, True),
        (502, 501, False),
        (504, 1, False),
    ]
    assert processes[1].start == "Mon-Nov-23-10:00:00-2026"

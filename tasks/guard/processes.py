"""The node's processes: which belong to it, which live, and how they are signalled and started.

A node's processes carry a mark in their environment. With /proc and its Linux names, or with `ps` where there is none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

MARK_VARIABLE = "SLM_NODE_MARK"
KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
"""Without this, a process title (Ray sets one) overwrites the environment that the mark is read from."""
Identity = Tuple[int, str]
"""A process: its pid and its start time, since a pid alone is used again."""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    start: str
    marked: bool


def start_time(pid: int) -> Optional[str]:
    """When a live process began, None for a dead one or a zombie."""
    if os.path.isdir("/proc/self"):
        stat = _stat(pid)
        return stat[1] if stat else None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    listed = _ps("-p", str(pid), "-o", "stat=,lstart=").split()
    return None if not listed or listed[0].startswith("Z") else "-".join(listed[1:6])


def alive(identity: Optional[Identity]) -> bool:
    return identity is not None and start_time(identity[0]) == identity[1]


def family(mark: str, known: Iterable[Identity] = ()) -> Set[Identity]:
    """Every live process with our mark in its environment, all its descendants, and those of `known` that live."""
    table = {process.pid: process for process in _processes(f"{MARK_VARIABLE}={mark}")}
    members = {process.pid for process in table.values() if process.marked}
    members |= {pid for pid, start in known if pid in table and table[pid].start == start}
    grown = True
    while grown:
        children = {process.pid for process in table.values() if process.parent in members} - members
        members |= children
        grown = bool(children)
    return {(pid, table[pid].start) for pid in members if pid > 1}


def kill_family(mark: str, known: Iterable[Identity] = (), first: Sequence[Identity] = ()) -> Set[Identity]:
    """SIGKILL everything of `family` but the caller, `first` before the others; returns what it found."""
    found = {identity for identity in family(mark, known) if identity[0] != os.getpid()}
    for pid, _ in [*first, *found]:
        send(pid, signal.SIGKILL)
    return found


def send(pid: int, number: int, group: bool = False) -> None:
    """Send a signal; a process that is gone, or somebody else's, is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, number)


def process_group(pid: int) -> Optional[int]:
    """The process group of a pid; None for a dead process."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _processes(entry: str) -> List[Process]:
    if not os.path.isdir("/proc/self"):
        return _processes_by_ps(entry)
    needle, processes = b"\0" + entry.encode() + b"\0", []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        stat = _stat(int(name))
        if stat is None:
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                marked = needle in b"\0" + file.read() + b"\0"
        except OSError:  # ended meanwhile, or somebody else's
            marked = False
        processes.append(Process(int(name), stat[0], stat[1], marked))
    return processes


def _stat(pid: int) -> Optional[Tuple[int, str]]:
    """Parent and start time out of /proc, None if dead."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[1]), fields[19].decode()


def _processes_by_ps(entry: str) -> List[Process]:
    """The same where there is no /proc: `ps -E` prints the environment behind the command."""
    return parse_ps(_ps("-axEww", "-o", "pid=,ppid=,stat=,lstart=,command="), entry)


def parse_ps(listing: str, entry: str) -> List[Process]:
    """Live processes out of lines of pid, parent, state, start (five words), command and environment."""
    processes = []
    for line in listing.splitlines():
        fields = line.split()
        if len(fields) > 8 and not fields[2].startswith("Z"):
            processes.append(Process(int(fields[0]), int(fields[1]), "-".join(fields[3:8]), entry in fields[8:]))
    return processes


def _ps(*arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(["ps", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return done.stdout.decode(errors="replace")


def own_command(arguments: Sequence[str]) -> List[str]:
    """The command line that runs the archive this module was loaded from: isolated, with the standard library only."""
    return [sys.executable, "-I", "-S", own_archive(), *arguments]


def own_archive() -> str:
    """The zipapp, or the folder, that holds this package."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def spawn_self(arguments: Sequence[str], environment: Dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(own_command(arguments), stdin=subprocess.DEVNULL, start_new_session=True, env=environment)

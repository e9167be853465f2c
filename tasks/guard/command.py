"""The node's command: started once per node, found again by mark and start time, its exit code kept on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Dict, Optional, Sequence

from .clock import boottime
from .files import read_json, recorded, write_json
from .processes import Identity, alive, family, process_group, send

COMMAND_START_SECONDS = 10.0
"""A command whose shell has not been seen for so long after the guard's start never began."""
KILLED_EXIT_CODE = 128 + signal.SIGKILL

COMMAND_SCRIPT = """
mkdir "$1/started" 2>/dev/null || exit 0
echo $$ > "$1/command.tmp" && mv "$1/command.tmp" "$1/command.pid"
node_dir=$1
shift
trap : TERM INT HUP
"$@"
code=$?
printf '{"exit_code": %d}\\n' "$code" > "$node_dir/exit.tmp" && mv "$node_dir/exit.tmp" "$node_dir/exit.json"
exit "$code"
"""
"""Runs the command once per node, whoever starts it, and writes its exit code even if the guard is dead by then."""


class NodeCommand:
    """The command of one node, as the guard that runs now sees it."""

    def __init__(self, words: Sequence[str], node_dir: str, mark: str, environment: Dict[str, str]) -> None:
        self.words, self.node_dir, self.mark, self.environment = words, node_dir, mark, environment
        self.shell: Optional[Identity] = None
        self.guard_began = boottime()

    def start(self) -> Optional[subprocess.Popen[bytes]]:
        """Start it unless a guard before has."""
        if os.path.exists(self._path("started")):
            return None
        script = ["/bin/sh", "-c", COMMAND_SCRIPT, "slm-node", self.node_dir, *self.words]
        return subprocess.Popen(script, stdin=subprocess.DEVNULL, start_new_session=True, env=self.environment)

    def ended(self) -> Optional[int]:
        """Its exit code, None while it runs; raises OSError."""
        exit_file = self._path("exit.json")
        if self.shell is None:
            self.shell = self._find()
        never_began = self.shell is None and boottime() > self.guard_began + COMMAND_START_SECONDS
        gone = never_began or (self.shell is not None and not alive(self.shell))
        if gone and not os.path.exists(exit_file):
            # Its shell was killed. What it had started is ended too, so that "exited" is true.
            for pid, _ in family(self.mark):
                if self.shell is not None and process_group(pid) == self.shell[0]:
                    send(pid, signal.SIGKILL)
            write_json(exit_file, {"exit_code": KILLED_EXIT_CODE})
        if not os.path.exists(exit_file):
            return None
        return int(read_json(exit_file).get("exit_code", KILLED_EXIT_CODE))

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""
        if self.shell is not None and alive(self.shell):
            send(self.shell[0], number, group=True)

    def _find(self) -> Optional[Identity]:
        """The shell of the command: as recorded, or by the pid that it wrote if that process carries our mark."""
        known = recorded(self._path("command.json"))
        if known is not None:
            return known
        try:
            with open(self._path("command.pid")) as file:
                pid = int(file.read())
        except (OSError, ValueError):
            return None
        for identity in family(self.mark):
            if identity[0] == pid:
                write_json(self._path("command.json"), {"pid": pid, "start": identity[1]})
                return identity
        return (pid, "ended before it was seen")

    def _path(self, name: str) -> str:
        return os.path.join(self.node_dir, name)

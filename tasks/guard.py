"""Ends a rented node when nobody has paid for it any longer.

Runs on the node before anything else, on any python3 >= 3.8, with the standard library only and nothing of ours:

    python3 guard.py --store DIR --lease NAME --rank R --first-grant SECONDS --mark MARK --node-dir DIR -- COMMAND...

Invariant: the node is alive only until `deadline`, which is the guard's start + the first grant, and later the moment
of a request of ours + the duration that the newest answer granted. All times are those of CLOCK_BOOTTIME, which counts
suspend and knows no wall-clock jump. No contact means no renewal means the end. Store and network are only touched by
threads, so that nothing that hangs there can hold up the deadline.

Two processes watch each other: the guard, and the fuse (`guard.py fuse`), which starts a dead guard again and ends the
node itself when the deadline passed and the guard did not act. `decide` and `decide_fuse` are pure.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

MARK_VARIABLE = "SLM_NODE_MARK"
TICK_SECONDS = 0.2
TERM_SECONDS = 1.0
"""How long before the deadline the command is asked to end by itself."""
FUSE_MARGIN_SECONDS = 1.5
"""How long after the deadline the fuse waits for the guard to have done it."""
RESTART_SECONDS = 1.0
"""The least time between two attempts to start a dead partner."""
COMMAND_START_SECONDS = 10.0
FAMILY_SECONDS = 5.0
"""How often descendants are recorded, for those that lose both their mark and their parent."""
MAX_ISSUED = 256
WAIT, TERMINATE, KILL, RESTART = "wait", "terminate", "kill", "restart"

# A process title (Ray sets one) overwrites the environment that the mark is read from, unless this is set.
KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}

# Runs the command once per node, whoever asks, and leaves its exit code behind even if the guard is dead by then.
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

Identity = Tuple[int, str]
"""A process: its pid and its start time, since a pid alone is used again."""


# -- the decision: pure --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the supervisor granted: `duration_seconds` from the moment of request `number`."""

    epoch: int
    number: int
    duration_seconds: float


@dataclass(frozen=True)
class State:
    """All that decides when the node ends. `issued` holds (number, boottime) of our latest requests."""

    deadline: float
    issued: Tuple[Tuple[int, float], ...] = ()
    epoch: int = 0
    accepted: int = 0
    ending: bool = False


def issue(state: State, now: float, at_least: int) -> Tuple[State, int]:
    """A new request at `now`; its number is above all before it and not below `at_least`."""
    number = max([at_least, state.accepted + 1] + [number + 1 for number, _ in state.issued])
    return replace(state, issued=(*state.issued, (number, now))[-MAX_ISSUED:]), number


def decide(state: State, now: float, answer: Optional[Answer], term_seconds: float = TERM_SECONDS) -> Tuple[State, str]:
    """Take a valid answer into account, then say WAIT, TERMINATE (ask the command to end) or KILL.

    Valid answers a request of ours, comes from no older supervisor than the newest heard, and is not older than what
    was accepted. It may also shorten: the supervisor has paid for the longest that it ever granted. Once the command
    was told to end, or the deadline passed, no answer helps any more.
    """
    if now >= state.deadline:
        return replace(state, ending=True), KILL
    if answer is not None and not state.ending:
        moments = dict(state.issued)
        newer = (answer.epoch, answer.number) >= (state.epoch, state.accepted)
        if newer and answer.number in moments:
            deadline = moments[answer.number] + answer.duration_seconds
            state = replace(state, deadline=deadline, epoch=answer.epoch, accepted=answer.number)
    if now >= state.deadline:
        return replace(state, ending=True), KILL
    if now >= state.deadline - term_seconds:
        return replace(state, ending=True), TERMINATE
    return state, WAIT


def decide_fuse(deadline: float, now: float, guard_alive: bool, margin_seconds: float = FUSE_MARGIN_SECONDS) -> str:
    """What the fuse does: KILL what the guard should have ended, RESTART a dead guard, or WAIT."""
    if now >= deadline + margin_seconds:
        return KILL
    return WAIT if guard_alive else RESTART


def parse_answer(data: bytes) -> Optional[Answer]:
    """The grant in a file of the store; None for anything that is not exactly one."""
    try:
        fields = json.loads(data)
        epoch, number, duration = fields["epoch"], fields["number"], fields["duration_seconds"]
    except (ValueError, KeyError, TypeError):
        return None
    if type(epoch) is not int or type(number) is not int or type(duration) not in (int, float):
        return None
    return Answer(epoch, number, float(duration)) if math.isfinite(duration) and duration >= 0 else None


# -- clock and processes: the only places that know the operating system ---------------------------------


def boottime() -> float:
    """Seconds that also pass in suspend: CLOCK_BOOTTIME on Linux, CLOCK_MONOTONIC on macOS."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def boot_id() -> str:
    """Differs after every boot; boottimes of two boots cannot be compared."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()


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
    """Every live process with our mark in its environment, all that descend from one, and those of `known` alive."""
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
    """SIGKILL everything of `family` but the caller, `first` before the others; returns whom it found."""
    found = {identity for identity in family(mark, known) if identity[0] != os.getpid()}
    for pid, _ in [*first, *found]:
        send(pid, signal.SIGKILL)
    return found


def send(pid: int, number: int, group: bool = False) -> None:
    """A signal to whoever is left to hear it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, number)


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


# -- files ---------------------------------------------------------------------------------------------


def write_json(path: str, value: object) -> None:
    """Replace a file in one step."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def read_json(path: str) -> Dict[str, Any]:
    """The object in a file; empty if there is none or it is broken."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class DirectoryStore:
    """The run store as a folder. A root that vanished is an error and is never made anew."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, key: str) -> Optional[bytes]:
        try:
            with open(os.path.join(self.root, key), "rb") as file:
                return file.read()
        except FileNotFoundError:
            if not os.path.isdir(self.root):
                raise
            return None

    def write(self, key: str, value: object) -> None:
        write_json(self._place(key), value)

    def append(self, key: str, line: str) -> None:
        with open(self._place(key), "a") as file:
            file.write(line)

    def _place(self, key: str) -> str:
        folder = self.root
        for part in key.split("/")[:-1]:
            folder = os.path.join(folder, part)
            if not os.path.isdir(folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)
        return os.path.join(self.root, key)


def only_one(path: str) -> Optional[int]:
    """An exclusive lock that lasts as long as this process; None if another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


# -- the guard -----------------------------------------------------------------------------------------


class Guard:
    """The process that `run` is the main thread of."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.arguments = options, list(arguments)
        self.node_dir: str = options.node_dir
        self.store = DirectoryStore(options.store)
        self.place = f"{options.lease}/{options.rank}"
        self.environment = {**os.environ, **KEEP_ENVIRONMENT}
        self.notice_file = os.environ.get("SLM_NOTICE_FILE") or self._path("notice.json")
        self.lock = threading.Lock()
        self.contact_now = threading.Event()
        self.log_lines: deque[str] = deque(maxlen=1000)
        self.answer: Optional[Answer] = None
        self.exit_code: Optional[int] = None
        self.known: Set[Identity] = set()
        self.children: List[subprocess.Popen[bytes]] = []
        self.fuse: Optional[subprocess.Popen[bytes]] = None
        self.fuse_since = -math.inf
        self.command: Optional[Identity] = None
        self.command_since = boottime()
        self.state = self._first_state()

    def run(self) -> None:
        self._save()
        self._keep_fuse(boottime())
        self._start_command()
        for work in (self._contact, self._watch_notice):
            threading.Thread(target=work, daemon=True).start()
        next_family = 0.0
        while True:
            now = boottime()
            with self.lock:
                before = self.state
                self.state, action = decide(before, now, self.answer)
            if self.state.deadline != before.deadline or self.state.ending != before.ending:
                self._save()
            if action == KILL:
                self._end()
            if action == TERMINATE and not before.ending:
                self.log("terminate", left_seconds=self.state.deadline - now)
                self._signal_command(signal.SIGTERM)
            try:
                self._watch_command()
                self._keep_fuse(now)
            except OSError as error:  # a full disk, no more processes: the deadline must be met all the same
                self.log("trouble on the node", error=str(error))
            self.children = [child for child in self.children if child.poll() is None]
            if now >= next_family:
                next_family = now + FAMILY_SECONDS
                self.known = family(self.options.mark, self.known)
            time.sleep(max(0.0, min(TICK_SECONDS, self.state.deadline - boottime())))

    def log(self, event: str, **facts: object) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.log_lines.append(json.dumps({"at": at, "boottime": boottime(), "event": event, **facts}) + "\n")

    def _path(self, name: str) -> str:
        return os.path.join(self.node_dir, name)

    def _first_state(self) -> State:
        """A first grant from now on for a fresh node; for a guard started again, what the one before left behind."""
        if not os.path.exists(self._path("deadline.json")):
            self.log("armed", first_grant_seconds=self.options.first_grant)
            return State(deadline=boottime() + self.options.first_grant)
        saved = read_json(self._path("deadline.json"))
        if saved.get("boot_id") != boot_id():  # rebooted, or unreadable: nobody knows what is paid for
            self.log("deadline of another boot")
            return State(deadline=boottime(), ending=True)
        self.log("restarted", deadline=saved["deadline"])
        return State(saved["deadline"], (), saved["epoch"], saved["accepted"], saved["ending"])

    def _save(self) -> None:
        """Tell the fuse. If that fails it fires at the deadline that it knows, which is the safe side."""
        state = self.state
        facts = {"deadline": state.deadline, "epoch": state.epoch, "accepted": state.accepted, "ending": state.ending}
        me = {"boot_id": boot_id(), "pid": os.getpid(), "start": start_time(os.getpid())}
        try:
            write_json(self._path("deadline.json"), {**facts, **me})
        except OSError as error:
            self.log("cannot write to the node's disk", error=str(error))

    # -- the command

    def _start_command(self) -> None:
        if not os.path.exists(self._path("started")):
            script = ["/bin/sh", "-c", COMMAND_SCRIPT, "slm-node", self.node_dir, *self.options.command]
            self.children.append(
                subprocess.Popen(script, stdin=subprocess.DEVNULL, start_new_session=True, env=self.environment)
            )

    def _watch_command(self) -> None:
        """Find out whether the command has ended, and how; its process is known by mark and start time only."""
        exit_file = self._path("exit.json")
        if self.exit_code is not None:
            return
        if self.command is None:
            self.command = self._find_command()
        never_began = self.command is None and boottime() > self.command_since + COMMAND_START_SECONDS
        gone = never_began or (self.command is not None and not alive(self.command))
        if gone and not os.path.exists(exit_file):
            # Its shell was killed; what it had started is ended too, so that "exited" is true.
            for pid, _ in family(self.options.mark):
                if self.command is not None and _group(pid) == self.command[0]:
                    send(pid, signal.SIGKILL)
            write_json(exit_file, {"exit_code": 128 + signal.SIGKILL})
        if os.path.exists(exit_file):
            self.exit_code = int(read_json(exit_file).get("exit_code", 128 + signal.SIGKILL))
            self.log("command ended", exit_code=self.exit_code)
            self.contact_now.set()

    def _find_command(self) -> Optional[Identity]:
        """The shell of the command: as recorded, or by its own word if it carries our mark."""
        known = recorded(self._path("command.json"))
        if known is not None:
            return known
        try:
            with open(self._path("command.pid")) as file:
                pid = int(file.read())
        except (OSError, ValueError):
            return None
        for identity in family(self.options.mark):
            if identity[0] == pid:
                write_json(self._path("command.json"), {"pid": pid, "start": identity[1]})
                return identity
        return (pid, "ended before it was seen")

    def _signal_command(self, number: int) -> None:
        if self.command is not None and alive(self.command):
            send(self.command[0], number, group=True)

    # -- the store: a thread of its own

    def _contact(self) -> None:
        reachable = True
        while True:
            try:
                self._exchange()
                while self.log_lines:
                    self.store.append(f"guard/{self.place}/log.jsonl", self.log_lines[0])
                    self.log_lines.popleft()
                if not reachable:
                    self.log("store is back")
                reachable = True
            except Exception as error:  # whatever it is, it must not end the guard: no contact, no renewal
                if reachable:
                    self.log("store is lost", error=str(error))
                reachable = False
            self.contact_now.wait(self.options.period)
            self.contact_now.clear()

    def _exchange(self) -> None:
        """Send a numbered request and read the newest answer."""
        key, exit_code, at_least = f"guard/{self.place}/request.json", self.exit_code, 1
        if not self.state.issued:
            # A node that had this rank before may have left answers: begin above the numbers that it used.
            last = read_json(os.path.join(self.store.root, key)).get("number", 0)
            at_least = max(int(time.time() * 1000), last + 1)
        with self.lock:
            now = boottime()
            self.state, number = issue(self.state, now, at_least)
            deadline = self.state.deadline
        condition = "running" if exit_code is None else "exited"
        request = {"number": number, "boottime": now, "state": condition, "exit_code": exit_code}
        noticed = os.path.exists(self.notice_file)
        self.store.write(key, {**request, "grant_deadline": deadline, "noticed": noticed})
        data = self.store.read(f"grants/{self.place}.json")
        answer = parse_answer(data) if data is not None else None
        with self.lock:
            self.answer = answer

    # -- the cloud's notice: a thread of its own

    def _watch_notice(self) -> None:
        import urllib.request

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self.options.metadata and not os.path.exists(self.notice_file):
            try:
                with opener.open(self.options.metadata, timeout=2) as reply:
                    seconds = float(json.loads(reply.read())["seconds"])
                self._announce(seconds)
            except Exception:  # 404 is the usual answer; any other means that there is no notice to be had
                time.sleep(min(1.0, self.options.period))

    def _announce(self, seconds: float) -> None:
        write_json(self.notice_file, {"deadline_boottime": boottime() + seconds, "seconds": seconds})
        self.log("notice", seconds=seconds)
        if self.options.on_notice:
            command = shlex.split(self.options.on_notice.replace("{seconds}", str(max(0, int(seconds)))))
            code = subprocess.call(command, stdin=subprocess.DEVNULL, start_new_session=True, env=self.environment)
            self.log("on-notice command ended", exit_code=code)

    # -- the fuse, and the end

    def _keep_fuse(self, now: float) -> None:
        if (self.fuse is not None and self.fuse.poll() is None) or now < self.fuse_since + RESTART_SECONDS:
            return
        if alive(recorded(self._path("fuse.json"))):
            return
        if os.path.exists(self._path("fuse.json")):
            self.log("fuse restarted")
        rest = ["--mark", self.options.mark, "--node-dir", self.node_dir, "--deadline", str(self.state.deadline)]
        self.fuse_since = now
        self.fuse = _spawn_self(["fuse", *rest, "--", *self.arguments], self.environment)

    def _end(self) -> None:
        self.log("deadline", late_seconds=boottime() - self.state.deadline)
        ended: Set[Identity] = set()
        quiet = 0
        while quiet < 2:
            found = kill_family(self.options.mark, self.known)
            ended |= found
            quiet = 0 if found else quiet + 1
            for child in [*self.children, *([self.fuse] if self.fuse else [])]:
                child.poll()
            time.sleep(0.03)
        self.log("killed", processes=len(ended))
        self.contact_now.set()
        until = boottime() + 0.5
        while self.log_lines and boottime() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)


# -- the fuse ------------------------------------------------------------------------------------------


def fuse(options: argparse.Namespace) -> None:
    """Watch the guard; never touch store or network."""
    me = {"pid": os.getpid(), "start": start_time(os.getpid())}
    with contextlib.suppress(OSError):  # on a full disk the guard still knows it as its child
        write_json(os.path.join(options.node_dir, "fuse.json"), me)
    path, deadline = os.path.join(options.node_dir, "deadline.json"), options.deadline
    guard: Optional[subprocess.Popen[bytes]] = None
    restarted = -math.inf
    while True:
        deadline = read_json(path).get("deadline", deadline)
        identity = recorded(path)
        guard_alive = alive(identity) or (guard is not None and guard.poll() is None)
        action = decide_fuse(deadline, boottime(), guard_alive)
        if action == KILL:
            quiet = 0
            while quiet < 2:
                first = [identity] if identity is not None and alive(identity) else []
                quiet = 0 if kill_family(options.mark, first=first) else quiet + 1
                if guard is not None:
                    guard.poll()
                time.sleep(0.03)
            os.kill(os.getpid(), signal.SIGKILL)
        if action == RESTART and boottime() > restarted + RESTART_SECONDS:
            restarted = boottime()
            guard = _spawn_self(options.command, dict(os.environ))
        time.sleep(TICK_SECONDS)


def _group(pid: int) -> Optional[int]:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def recorded(path: str) -> Optional[Identity]:
    """Whom a file of the node's folder names."""
    facts = read_json(path)
    return (facts["pid"], facts["start"]) if facts.get("pid") and facts.get("start") else None


def _spawn_self(arguments: Sequence[str], environment: Dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Everything behind `--` is the command (of the fuse: the guard's own arguments)."""
    parser = argparse.ArgumentParser(prog="guard.py", description="End this node when its grant expires.")
    parser.add_argument("--mark", required=True, help=f"value of {MARK_VARIABLE} in all processes of this node")
    parser.add_argument("--node-dir", required=True, help="scratch folder of this node")
    if arguments[:1] == ["fuse"]:
        parser.add_argument("fuse")
        parser.add_argument("--deadline", type=float, required=True, help="boottime")
    else:
        parser.add_argument("--store", required=True, help="the run store: a folder")
        parser.add_argument("--lease", required=True)
        parser.add_argument("--rank", type=int, required=True)
        parser.add_argument("--first-grant", type=float, required=True, metavar="SECONDS")
        parser.add_argument("--period", type=float, default=2.0, metavar="SECONDS", help="between two requests")
        parser.add_argument("--metadata", metavar="URL", help="answers 404, or a preemption notice as JSON")
        parser.add_argument("--on-notice", metavar="CMD", help="run once at a notice; {seconds} is replaced")
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(list(arguments)[:cut])
    options.command = list(arguments)[cut + 1 :]
    if not options.command:
        parser.error("a command must follow after --")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if os.environ.get(MARK_VARIABLE) != options.mark:  # what others read is the environment at exec
        environment = {**os.environ, MARK_VARIABLE: options.mark}
        os.execve(sys.executable, [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments], environment)
    is_fuse = arguments[0] == "fuse"
    os.makedirs(options.node_dir, exist_ok=True)
    if only_one(os.path.join(options.node_dir, "fuse.lock" if is_fuse else "guard.lock")) is None:
        return 0
    if is_fuse:
        fuse(options)
    else:
        Guard(options, arguments).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

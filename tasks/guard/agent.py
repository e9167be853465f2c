"""The guard process: starts the node's command, asks for grants, and ends the node at its deadline.

Store and network are only touched by threads, so that nothing that hangs there can hold up the deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from .clock import boot_id, boottime
from .command import NodeCommand
from .credentials import Metadata
from .decision import END_NODE, STOP_COMMAND, WAIT, Answer, State, decide, issue, parse_answer
from .files import ACTING, RESTART_SECONDS, TICK_SECONDS, Pulse, beat, read_json, recorded, write_json
from .notices import notice_source
from .processes import KEEP_ENVIRONMENT, Identity, alive, family, send, spawn_self, start_time
from .stores import ENVELOPE, DirectoryStore, grant_key, log_folder, open_store, request_key
from .terminator import SCHEDULE
from .terminators import end_node, named_terminators, unarmed
from .timer import PowerOffTimer

FAMILY_SECONDS = 5.0
"""How often descendants are recorded, for those that lose both their mark and their parent."""
LAST_WORDS_SECONDS, LAST_WORDS_BY_NET_SECONDS = 0.5, 2.0
"""How long a guard whose node has ended waits for its log to reach the store: a folder, or over the network."""
NOT_SENT_PERIODS = 2.0
"""After so many periods without contact, requests are still written to the node's disk, to be answered by ssh."""
MAX_LOG_LINES = 1000
"""How many lines wait for a store that cannot be reached; older ones are dropped."""
UNGUARDED_EXIT_CODE = 3
"""The guard refused to start: fewer than two kinds of terminators would work."""


class Guard:
    """The state of the guard process; `run` is its main thread."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.arguments = options, list(arguments)
        self.node_dir: str = options.node_dir
        self.store = open_store(options)
        self.terminators = named_terminators(options)
        self.environment = {**os.environ, **KEEP_ENVIRONMENT}
        self.notice_file = os.environ.get("SLM_NOTICE_FILE") or self._path("notice.json")
        self.notice_lock, self.log_lock, self.lock = threading.Lock(), threading.Lock(), threading.Lock()
        self.contact_now = threading.Event()
        self.log_lines: List[str] = []
        self.answer: Optional[Answer] = None
        self.sigterm_seen = False
        self.exit_code: Optional[int] = None
        self.known: Set[Identity] = set()
        self.children: List[subprocess.Popen[bytes]] = []
        self.watchdog: Optional[subprocess.Popen[bytes]] = None
        self.watchdog_since = -math.inf
        self.watchdog_pulse = Pulse(self._path("watchdog.beat"))
        self.command = NodeCommand(options.command, self.node_dir, options.mark, self.environment)
        self.began = boottime()
        self.at_least = int(time.time() * 1000)
        self.timer = (
            PowerOffTimer(options.timer, options.mark, self._path("timer.json"), self.log) if options.timer else None
        )
        self.is_fresh = not os.path.exists(self._path("deadline.json"))
        self.state = self._first_state()

    def run(self) -> int:
        """Returns only where it refuses to start."""
        if self.is_fresh and not self._is_armed():
            return UNGUARDED_EXIT_CODE
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._save()
        self._keep_watchdog(boottime())
        shell = self.command.start()
        if shell is not None:
            self.children.append(shell)
        for work in self._threads():
            threading.Thread(target=work, daemon=True).start()
        next_family = 0.0
        while True:
            now = boottime()
            beat(self._path("guard.beat"))
            action = self._decide(now)
            if action == END_NODE:
                self._end()
            try:
                self._watch_command()
                self._keep_watchdog(now)
                if now - self._last_asked() > NOT_SENT_PERIODS * self.options.period:
                    self._ask()
            except OSError as error:  # a full disk, no more processes: the deadline must be met all the same
                self.log("trouble on the node", error=str(error))
            self.children = [child for child in self.children if child.poll() is None]
            if now >= next_family:
                next_family = now + FAMILY_SECONDS
                self.known = family(self.options.mark, self.known)
            time.sleep(max(0.0, min(TICK_SECONDS, self.state.deadline - boottime())))

    def _decide(self, now: float) -> str:
        """Judge the newest answers of the store and of `renew`, and ask the command to stop when it is time."""
        taken = self._path("answer.taken.json")
        handed = take_answer(self._path("answer.json"), taken)
        with self.lock:
            before, action = self.state, WAIT
            # The newest first: an older answer must not end the node before the newer one is judged.
            for answer in sorted([self.answer, handed], key=_age, reverse=True):
                self.state, action = decide(self.state, now, answer)
                if action == END_NODE:
                    break
        if replace(self.state, issued=()) != replace(before, issued=()):
            self._save()
        if self.timer is not None and self.state.deadline != before.deadline:
            self.timer.move(self.state.deadline)
        if handed is not None:
            accepted = (self.state.fencing_token, self.state.accepted) == (handed.fencing_token, handed.number)
            judged = "accepted" if accepted else "ignored"
            self.log("answer by command", number=handed.number, fencing_token=handed.fencing_token, judged=judged)
        with contextlib.suppress(OSError):
            os.unlink(taken)
        if action == STOP_COMMAND and not before.ending:
            self.log("command asked to stop", left_seconds=self.state.deadline - now)
            self.command.signal(signal.SIGTERM)
        return action

    def log(self, event: str, **facts: object) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"at": at, "boottime": boottime(), "event": event, **facts}) + "\n"
        with self.log_lock:
            self.log_lines = [*self.log_lines, line][-MAX_LOG_LINES:]

    def _path(self, name: str) -> str:
        return os.path.join(self.node_dir, name)

    def _first_state(self) -> State:
        """The first grant for a fresh node; for a restarted guard, the state that the one before saved."""
        if self.is_fresh:
            return State(deadline=boottime() + self.options.first_grant)
        saved = read_json(self._path("deadline.json"))
        if saved.get("boot_id") != boot_id():  # rebooted, or unreadable: what is paid for is unknown
            self.log("deadline of another boot")
            return State(deadline=boottime(), ending=True)
        self.log("restarted", deadline=saved["deadline"])
        return State(saved["deadline"], (), saved["fencing_token"], saved["accepted"], saved["ending"])

    def _is_armed(self) -> bool:
        """Whether terminators of two different kinds would work; writes to stderr what is missing."""
        why = unarmed(self.terminators)
        kinds = {terminator.kind for terminator in self.terminators if terminator.name not in why}
        names = [terminator.name for terminator in self.terminators if terminator.name not in why]
        if self.timer is not None:
            try:
                self.timer.arm(self.state.deadline)
                kinds.add(SCHEDULE)
                names.append(f"timer:{self.options.timer}")
            except Exception as error:  # whatever the error is, the timer does not count
                why[f"timer:{self.options.timer}"] = str(error)
        facts = {"terminators": names, "kinds": sorted(kinds), "unarmed": why}
        if len(kinds) >= 2 or self.options.allow_unguarded:
            self.log("armed", first_grant_seconds=self.options.first_grant, **facts)
            with contextlib.suppress(OSError):
                write_json(self._path("armed.json"), facts)
            return True
        missing = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        sys.stderr.write(
            f"guard: a node needs terminators of two kinds, and {len(kinds)} would work here "
            f"({', '.join(names) or 'none'}){'. Not armed: ' if missing else ''}{missing}. "
            "Add one with --terminator or --timer, or start anyway with --allow-unguarded.\n"
        )
        self.log("refused", **facts)
        with contextlib.suppress(Exception):
            self._send_log()
        return False

    def _threads(self) -> List[Callable[[], None]]:
        looks = [functools.partial(self._watch_notice, word) for word in self.options.notice]
        return [self._contact, *looks, *([self.timer.run] if self.timer is not None else [])]

    def _save(self) -> None:
        """Tell the watchdog. If that fails, it ends the node at the deadline that it knows, which is the safe side."""
        state = self.state
        facts = {
            "deadline": state.deadline,
            "fencing_token": state.fencing_token,
            "accepted": state.accepted,
            "ending": state.ending,
        }
        me = {"boot_id": boot_id(), "pid": os.getpid(), "start": start_time(os.getpid())}
        try:
            write_json(self._path("deadline.json"), {**facts, **me})
        except OSError as error:
            self.log("cannot write to the node's disk", error=str(error))

    def _watch_command(self) -> None:
        """Report once that the command has ended, and how."""
        if self.exit_code is None:
            self.exit_code = self.command.ended()
            if self.exit_code is not None:
                self.log("command ended", exit_code=self.exit_code)
                self.contact_now.set()

    # -- the store: a thread of its own

    def _contact(self) -> None:
        reachable, asked = True, False
        while True:
            try:
                if not asked:
                    # A node that had this rank before may have left answers: begin above the numbers that it used.
                    last = self.store.read(request_key(self.options.lease, self.options.rank))
                    with self.lock:
                        self.at_least = max(self.at_least, _number_of(last) + 1)
                    asked = True
                self._exchange()
                self._send_log()
                if not reachable:
                    self.log("store is back")
                reachable = True
            except Exception as error:  # whatever the error is, it must not end the guard: no contact, no renewal
                if reachable:
                    self.log("store is lost", error=str(error))
                reachable = False
            self.contact_now.wait(self.options.period)
            self.contact_now.clear()

    def _exchange(self) -> None:
        """Send a numbered request and read the newest answer."""
        key = request_key(self.options.lease, self.options.rank)
        self.store.write(key, {**ENVELOPE, **self._ask()})
        data = self.store.read(grant_key(self.options.lease, self.options.rank))
        answer = parse_answer(data) if data is not None else None
        with self.lock:
            self.answer = answer

    def _ask(self) -> Dict[str, Any]:
        """A new numbered request; it is also on the node's disk, to be answered by `renew`."""
        exit_code = self.exit_code
        with self.lock:
            now = boottime()
            self.state, number = issue(self.state, now, self.at_least)
            deadline = self.state.deadline
        condition = "running" if exit_code is None else "exited"
        request = {"number": number, "boottime": now, "state": condition, "exit_code": exit_code}
        request.update(grant_deadline=deadline, noticed=os.path.exists(self.notice_file))
        with contextlib.suppress(OSError):  # a full disk: the request still reaches the store
            write_json(self._path("request.json"), request)
        return request

    def _last_asked(self) -> float:
        with self.lock:
            return self.state.issued[-1][1] if self.state.issued else self.began

    def _send_log(self) -> None:
        """Lines leave the list when the store has them, so an empty list means that the store has all."""
        with self.log_lock:
            lines = self.log_lines
        if lines:
            self.store.append(log_folder(self.options.lease, self.options.rank), "".join(lines))
            with self.log_lock:
                self.log_lines = self.log_lines[len(lines) :]

    # -- the cloud's notice: threads of their own

    def _watch_notice(self, word: str) -> None:
        look, pause = notice_source(word)
        metadata, silent = Metadata(self.options.metadata_base), False
        while not os.path.exists(self.notice_file):
            try:
                seconds = look(metadata)
                silent = False
            except Exception as error:  # a metadata service that fails has no notice to give
                if not silent:
                    self.log("notices cannot be read", source=word, error=str(error))
                seconds, silent = None, True
            if seconds is None:
                time.sleep(max(1.0, pause) if silent else min(pause, self.options.notice_period))
            else:
                self._announce(seconds, word)

    def _on_sigterm(self, *_: object) -> None:
        """Slurm, Kubernetes and a power-off warn by SIGTERM: a notice. The deadline stays."""
        if not self.sigterm_seen:
            self.sigterm_seen = True
            work = functools.partial(self._announce, self.options.sigterm_notice, "SIGTERM")
            threading.Thread(target=work, daemon=True).start()

    def _announce(self, seconds: float, source: str) -> None:
        """Write the notice for the training loop and run the command for it, once."""
        with self.notice_lock:
            if os.path.exists(self.notice_file):
                return
            write_json(self.notice_file, {"deadline_boottime": boottime() + seconds, "seconds": seconds})
        self.log("notice", seconds=seconds, source=source)
        self.contact_now.set()
        if self.options.on_notice:
            command = shlex.split(self.options.on_notice.replace("{seconds}", str(max(0, int(seconds)))))
            code = subprocess.call(command, stdin=subprocess.DEVNULL, start_new_session=True, env=self.environment)
            self.log("on-notice command ended", exit_code=code)

    # -- the watchdog, and the end

    def _keep_watchdog(self, now: float) -> None:
        """Start a watchdog if none is alive, and replace one that hangs."""
        if now < self.watchdog_since + RESTART_SECONDS:
            return
        identity = recorded(self._path("watchdog.json"))
        pids = [identity[0]] if identity is not None and alive(identity) else []
        if self.watchdog is not None and self.watchdog.poll() is None and self.watchdog.pid not in pids:
            pids.append(self.watchdog.pid)
        if pids and self.watchdog_pulse.beats():
            return
        for pid in pids:
            self.log("watchdog hangs", pid=pid)
            send(pid, signal.SIGKILL)
        if os.path.exists(self._path("watchdog.json")):
            self.log("watchdog restarted")
        self.watchdog_pulse.forget()
        rest = ["--mark", self.options.mark, "--node-dir", self.node_dir, "--deadline", str(self.state.deadline)]
        self.watchdog_since = now
        self.watchdog = spawn_self(["watchdog", *rest, "--", *self.arguments], self.environment)

    def _end(self) -> None:
        """Fire the terminators. While we move, the watchdog waits: two at once would mix up their order."""
        self.log("deadline", late_seconds=boottime() - self.state.deadline)
        beat(self._path(ACTING))
        self.contact_now.set()

        def log(event: str, **facts: object) -> None:
            self.log(event, **facts)
            self.contact_now.set()  # sent at once: there may be no later

        end_node(self.terminators, self.options.mark, self.options.escalate, log, self.known, tick=self._tick)
        by_net = not isinstance(self.store, DirectoryStore)
        until = boottime() + (LAST_WORDS_BY_NET_SECONDS if by_net else LAST_WORDS_SECONDS)
        while self.log_lines and boottime() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    def _tick(self) -> None:
        beat(self._path("guard.beat"))
        for child in [*self.children, *([self.watchdog] if self.watchdog else [])]:
            child.poll()


def take_answer(path: str, taken: str) -> Optional[Answer]:
    """The answer that `renew` wrote, moved aside until it is judged."""
    try:
        os.replace(path, taken)
        with open(taken, "rb") as file:
            return parse_answer(file.read())
    except OSError:
        return None


def _age(answer: Optional[Answer]) -> Tuple[int, int]:
    """Newer answers are greater."""
    return (answer.fencing_token, answer.number) if answer is not None else (-1, -1)


def _number_of(request: Optional[bytes]) -> int:
    try:
        return int(json.loads(request or b"{}").get("number", 0))
    except (ValueError, TypeError, AttributeError):
        return 0

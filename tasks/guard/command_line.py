"""The command line: run a node's guard, renew its grant by hand, or show what it lives on.

python3 guard.pyz --store STORE --lease NAME --rank R --first-grant SECONDS --mark MARK --node-dir DIR
    --terminator NAME --terminator NAME [--notice aws|gcp|azure|url:URL] -- COMMAND...
python3 guard.pyz renew --node-dir DIR --number N --duration SECONDS --fencing-token T
python3 guard.pyz status --node-dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Mapping, Sequence

from .agent import Guard
from .clock import boottime
from .credentials import Metadata
from .decision import Answer, parse_answer, why_ignored
from .files import hold_lock, read_json, recorded, write_json
from .notices import notice_source
from .processes import MARK_VARIABLE, alive, own_command
from .terminators import TERMINATOR_NAMES, named_terminators
from .watchdog import watch_guard

DESCRIPTION = "End this node when its grant expires. The words behind -- are the node's command."
EPILOG = "Other uses: `guard.pyz status --help`, `guard.pyz renew --help`."


def main(arguments: Sequence[str]) -> int:
    """Run a verb; the exit code."""
    options = parse(arguments)
    if options.verb in ("renew", "status"):
        return renew(options) if options.verb == "renew" else status(options)
    if os.environ.get(MARK_VARIABLE) != options.mark:  # others read the environment that was given to exec
        environment = {**os.environ, MARK_VARIABLE: options.mark}
        os.execve(sys.executable, own_command(arguments), environment)
    os.makedirs(options.node_dir, exist_ok=True)
    if hold_lock(os.path.join(options.node_dir, f"{options.verb}.lock")) is None:
        return 0
    if options.verb == "watchdog":
        watch_guard(options, parse(options.command))
    return Guard(options, arguments).run()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb; what follows `--` is the command (of the watchdog: the guard's own arguments)."""
    verb = arguments[0] if arguments[:1] and arguments[0] in ("watchdog", "renew", "status") else "guard"
    parser = argparse.ArgumentParser(prog="guard.pyz", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--node-dir", required=True, help="scratch folder of this node")
    if verb in ("guard", "watchdog"):
        parser.add_argument("--mark", required=True, help=f"value of {MARK_VARIABLE} in all processes of this node")
    if verb == "guard":
        add_guard_options(parser)
    elif verb == "watchdog":
        parser.add_argument("--deadline", type=float, required=True, help="boot time in seconds")
    elif verb == "renew":
        parser.add_argument("--number", type=int, required=True, help="of the request that is answered")
        parser.add_argument(
            "--duration", type=float, required=True, metavar="SECONDS", help="from the moment of the request"
        )
        parser.add_argument(
            "--fencing-token", type=int, required=True, metavar="T", help="of the supervisor that answers"
        )
        parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="how long to wait for the guard")
    words = list(arguments[1:] if verb != "guard" else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.verb, options.command = verb, words[cut + 1 :]
    if verb in ("guard", "watchdog") and not options.command:
        parser.error("a command must follow after --")
    if verb == "guard":
        try:
            named_terminators(options)
            for word in options.notice:
                notice_source(word)
        except ValueError as error:
            parser.error(str(error))
    return options


def add_guard_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--store", default="", help="run store: a folder, s3://BUCKET/PREFIX, or presigned:FILE; default: none")
    add("--lease", required=True, help="name of the lease that the node belongs to")
    add("--rank", type=int, required=True, help="of the node in its lease, from 0")
    add("--first-grant", type=float, required=True, metavar="SECONDS", help="how long the node lives without an answer")
    add("--period", type=float, default=2.0, metavar="SECONDS", help="between two requests for a grant")
    add(
        "--terminator",
        action="append",
        default=[],
        metavar="NAME",
        help="means of ending the node, repeated in the order in which they fire: " + ", ".join(TERMINATOR_NAMES),
    )
    add(
        "--escalate",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="how long the node may outlive a terminator before the next fires",
    )
    add("--timer", choices=("systemd-run", "shutdown"), help="also have init power the node off at the deadline")
    add("--allow-unguarded", action="store_true", help="start with fewer than two kinds of terminators")
    add("--notice", action="append", default=[], metavar="SOURCE", help="aws, gcp, azure or url:URL")
    add(
        "--notice-period",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="longest pause between two looks for a notice",
    )
    add(
        "--sigterm-notice", type=float, default=30.0, metavar="SECONDS", help="notice that a SIGTERM to the guard gives"
    )
    add("--on-notice", metavar="CMD", help="command that a notice runs once; {seconds} is replaced")
    add("--credentials", default="", metavar="FILE", help="AWS keys, as JSON or as in ~/.aws/credentials")
    add("--region", default="", help="AWS region of the store")
    add("--endpoint-url", default="", metavar="URL", help="of an S3-compatible store")
    add("--path-style", action="store_true", help="put the bucket into the URL's path; implied by --endpoint-url")
    add(
        "--metadata-base",
        default="",
        metavar="URL",
        help=f"of the cloud's metadata service; default {Metadata.ADDRESS}",
    )


def renew(options: argparse.Namespace) -> int:
    """Hand an answer to the guard of this node, and print whether the guard accepted it."""
    path = os.path.join(options.node_dir, "answer.json")
    answer = Answer(options.fencing_token, options.number, options.duration)
    if not guard_is_alive(options.node_dir):
        tell({"accepted": False, "reason": f"no guard runs in {options.node_dir}"})
        return 1
    fields = {
        "fencing_token": answer.fencing_token,
        "number": answer.number,
        "duration_seconds": answer.duration_seconds,
    }
    if parse_answer(json.dumps(fields).encode()) is None:
        tell({"accepted": False, "reason": "a duration is a finite number of seconds, at least 0"})
        return 1
    write_json(path, fields)
    until = time.monotonic() + options.wait
    files = [path, os.path.join(options.node_dir, "answer.taken.json")]
    while any(os.path.exists(name) for name in files) and time.monotonic() < until:
        time.sleep(0.02)
    state = read_json(os.path.join(options.node_dir, "deadline.json"))
    accepted = (state.get("fencing_token"), state.get("accepted")) == (answer.fencing_token, answer.number)
    reason = "" if accepted else why_ignored(answer, state, read_json(os.path.join(options.node_dir, "request.json")))
    if os.path.exists(path):
        accepted, reason = False, f"the guard did not read it within {options.wait:g} s"
    left = state.get("deadline", 0.0) - boottime()
    tell({"accepted": accepted, "deadline_in_seconds": round(left, 3), "reason": reason})
    return 0 if accepted else 1


def status(options: argparse.Namespace) -> int:
    """Print the newest request, the deadline and the state of guard and watchdog, as JSON."""
    state, request, armed, ended = (
        read_json(os.path.join(options.node_dir, f"{name}.json")) for name in ("deadline", "request", "armed", "exit")
    )
    if not state:
        tell({"error": f"no guard has run in {options.node_dir}"})
        return 1
    now = boottime()
    facts = {
        "boottime": now,
        "deadline": state["deadline"],
        "deadline_in_seconds": round(state["deadline"] - now, 3),
        "fencing_token": state.get("fencing_token", 0),
        "accepted": state.get("accepted", 0),
        "ending": state.get("ending", False),
        "guard_alive": guard_is_alive(options.node_dir),
        "watchdog_alive": alive(recorded(os.path.join(options.node_dir, "watchdog.json"))),
        "exit_code": ended.get("exit_code"),
        "terminators": armed.get("terminators", []),
        "request": request,
    }
    tell(facts)
    return 0


def guard_is_alive(node_dir: str) -> bool:
    return alive(recorded(os.path.join(node_dir, "deadline.json")))


def tell(facts: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")

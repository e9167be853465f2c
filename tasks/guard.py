"""Ends a rented node when nobody has paid for it any longer.

Runs on the node before anything else, on any python3 >= 3.8, with the standard library only and nothing of ours:

    python3 guard.py --store STORE --lease NAME --rank R --first-grant SECONDS --mark MARK --node-dir DIR
        --kill KILLER --kill KILLER [--notice aws|gcp|azure|url:URL] -- COMMAND...
    python3 guard.py renew --node-dir DIR --number N --duration SECONDS --epoch E
    python3 guard.py status --node-dir DIR

Invariant: the node is alive only until `deadline`, which is the guard's start + the first grant, and later the moment
of a request of ours + the duration that the newest answer granted. All times are those of CLOCK_BOOTTIME, which counts
suspend and knows no wall-clock jump. No contact means no renewal means the end. Store and network are only touched by
threads, so that nothing that hangs there can hold up the deadline.

Two processes watch each other: the guard, and the fuse (`guard.py fuse`), which replaces a guard that is dead or no
longer moves, and ends the node itself when the deadline passed and the guard did not act. `decide`, `decide_fuse` and
all functions that build a request or read a reply are pure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

MARK_VARIABLE = "SLM_NODE_MARK"
TICK_SECONDS = 0.2
TERM_SECONDS = 1.0
"""How long before the deadline the command is asked to end by itself."""
FUSE_MARGIN_SECONDS = 1.5
"""How long after the deadline the fuse waits for the guard to have done it."""
RESTART_SECONDS = 1.0
"""The least time between two attempts to start a dead partner."""
HUNG_TICKS = 25
"""A partner that did not move during so many ticks of the watcher hangs; ticks, so that a suspend blames nobody."""
COMMAND_START_SECONDS = 10.0
FAMILY_SECONDS = 5.0
"""How often descendants are recorded, for those that lose both their mark and their parent."""
LAST_WORDS_SECONDS, LAST_WORDS_BY_NET_SECONDS = 0.5, 2.0
"""How long a guard whose node is dead waits for its log to reach the store."""
CHECK_SECONDS = 8.0
"""How long the killers have to show that they would work, before the command starts."""
HTTP_SECONDS = 10.0
NOT_SENT_PERIODS = 2.0
"""After so many periods without contact the node asks on its own disk only, for who reaches it by ssh."""
MAX_ISSUED, MAX_LOG_LINES = 256, 1000
WAIT, TERMINATE, KILL, RESTART = "wait", "terminate", "kill", "restart"
PROCESS, POWER, SCHEDULE, PROVIDER, COMMAND = "process", "power", "schedule", "provider", "command"
"""Kinds of killers: ours ends processes, the guest's kernel, its init at a set time, the provider, whatever else."""
UNGUARDED_EXIT_CODE = 3

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
    newest = state.issued[-1][0] if state.issued else 0
    number = max(at_least, state.accepted + 1, newest + 1)
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
        asked = next((moment for number, moment in reversed(state.issued) if number == answer.number), None)
        newer = (answer.epoch, answer.number) >= (state.epoch, state.accepted)
        if newer and asked is not None:
            deadline = asked + answer.duration_seconds
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


def beat(path: str) -> None:
    """Show that the caller moves. Needs no room on the disk once the file is there."""
    now = boottime()
    with contextlib.suppress(OSError):
        try:
            os.utime(path, (now, now))
        except FileNotFoundError:
            with open(path, "a"):
                pass


class Pulse:
    """Whether the partner behind a beat file still moves, asked once a tick."""

    def __init__(self, path: str) -> None:
        self.path, self.seen, self.still = path, 0, 0

    def beats(self) -> bool:
        try:
            moment = os.stat(self.path).st_mtime_ns
        except OSError:  # not there yet, or a disk without room: nothing to judge by
            return True
        self.still = 0 if moment != self.seen else self.still + 1
        self.seen = moment
        return self.still < HUNG_TICKS

    def forget(self) -> None:
        """For a new partner."""
        self.still = 0
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def only_one(path: str) -> Optional[int]:
    """An exclusive lock that lasts as long as this process; None if another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


# -- requests: built and signed by pure functions, sent by one -------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def checked(self) -> Reply:
        """Itself, or an OSError with what the other side said."""
        if 200 <= self.status < 300:
            return self
        raise OSError(f"HTTP {self.status}: {' '.join(self.body.decode(errors='replace').split())[:300]}")

    def json(self) -> Any:
        return json.loads(self.checked().body)


def call(request: Request, timeout: float = HTTP_SECONDS) -> Reply:
    """Send a request as it stands: no proxy, no redirect, no header but Host and lengths; header names lower-case."""
    import http.client  # twice as long as all the rest together, and a node's first seconds are billed

    url = urlsplit(request.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=timeout)
    try:
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request(request.method, target, body=request.body or None, headers=dict(request.headers))
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error!r}") from error
    finally:
        connection.close()


@dataclass(frozen=True)
class Credentials:
    access_key: str
    secret_key: str
    token: str = ""


def signed(request: Request, credentials: Credentials, region: str, service: str, now: float) -> Request:
    """The request with an AWS Signature Version 4 in its headers.

    Source: "Create a signed AWS API request", AWS Identity and Access Management User Guide; for S3 the path is encoded
    once and the hash of the body is a header.
    """
    import hashlib
    import hmac

    url = urlsplit(request.url)
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    body_hash = hashlib.sha256(request.body).hexdigest()
    headers = {name.lower(): " ".join(value.split()) for name, value in request.headers.items()}
    headers.update({"host": host_header(request.url), "x-amz-date": moment})
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    if service == "s3":
        headers["x-amz-content-sha256"] = body_hash
    names = ";".join(sorted(headers))
    path = (url.path or "/") if service == "s3" else quote(url.path or "/", safe="/-_.~")
    encoded = sorted((_encoded(name), _encoded(value)) for name, value in parse_qsl(url.query, keep_blank_values=True))
    query = "&".join(f"{name}={value}" for name, value in encoded)
    canonical_headers = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join([request.method, path, query, canonical_headers, names, body_hash])
    scope = f"{moment[:8]}/{region}/{service}/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = ("AWS4" + credentials.secret_key).encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    who = f"Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return replace(request, headers={**headers, "authorization": f"AWS4-HMAC-SHA256 {who}"})


def host_header(url: str) -> str:
    """As http.client writes it: with the port unless that is the scheme's own."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return (parts.hostname or "") + (f":{parts.port}" if parts.port not in (None, default) else "")


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")


class Metadata:
    """The cloud's own service on the node: AWS (IMDSv2), GCP and Azure answer at the same address."""

    ADDRESS = "http://169.254.169.254"
    GCP, AZURE = {"Metadata-Flavor": "Google"}, {"Metadata": "true"}

    def __init__(self, base: str = "") -> None:
        self.base = base.rstrip("/") or self.ADDRESS

    def aws(self, path: str, timeout: float = 2.0) -> Reply:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = call(Request("PUT", f"{self.base}/latest/api/token", ttl), timeout).checked().body.decode()
        return call(Request("GET", f"{self.base}/latest/{path}", {"X-aws-ec2-metadata-token": token}), timeout)

    def gcp(self, path: str, timeout: float = 2.0) -> Reply:
        return call(Request("GET", f"{self.base}/computeMetadata/v1/{path}", self.GCP), timeout)

    def azure(self, path: str, timeout: float = 5.0) -> Reply:
        return call(Request("GET", f"{self.base}/metadata/{path}", self.AZURE), timeout)

    def aws_text(self, path: str) -> str:
        return self.aws(path).checked().body.decode().strip()

    def gcp_text(self, path: str) -> str:
        return self.gcp(path).checked().body.decode().strip()


class Aws:
    """Whom requests to AWS are signed as: a file, the environment, the user's own file, or the role of the instance."""

    def __init__(self, metadata: Metadata, credentials_file: str = "", region: str = "") -> None:
        self.metadata, self.file, self._region = metadata, credentials_file, region

    def credentials(self) -> Credentials:
        """Read anew each time: short-lived ones are replaced where they lie."""
        if self.file:
            return read_credentials(self.file)
        environment = os.environ
        if environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY"):
            token = environment.get("AWS_SESSION_TOKEN", "")
            return Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], token)
        shared = os.path.expanduser(environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
        if os.path.exists(shared):
            return read_credentials(shared)
        folder = "meta-data/iam/security-credentials/"
        role = json.loads(self.metadata.aws_text(folder + self.metadata.aws_text(folder).split()[0]))
        return Credentials(role["AccessKeyId"], role["SecretAccessKey"], role["Token"])

    def region(self) -> str:
        named = self._region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not named:
            try:
                named = self.metadata.aws_text("meta-data/placement/region")
            except OSError:
                named = "us-east-1"
            self._region = named
        return named


def read_credentials(path: str) -> Credentials:
    """A JSON object, or a file as the AWS command line writes it (profile AWS_PROFILE, else default)."""
    with open(path) as file:
        text = file.read()
    import configparser

    fields: Mapping[str, str]
    if text.lstrip().startswith("{"):
        fields = json.loads(text)
    else:
        parser = configparser.RawConfigParser()
        parser.read_string(text)
        profile = os.environ.get("AWS_PROFILE", "default")
        if not parser.has_section(profile):
            raise OSError(f"{path} has no section [{profile}]")
        fields = dict(parser.items(profile))
    key, secret = fields.get("aws_access_key_id"), fields.get("aws_secret_access_key")
    if not key or not secret:
        raise OSError(f"{path} has no aws_access_key_id and aws_secret_access_key")
    return Credentials(key, secret, fields.get("aws_session_token") or "")


# -- the run store: a folder, a bucket, or signed URLs ----------------------------------------------------


class DirectoryStore:
    """A folder. A root that vanished is an error and is never made anew."""

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

    def append(self, folder: str, lines: str) -> None:
        """To `log.jsonl` in a folder of the store."""
        with open(self._place(f"{folder}/log.jsonl"), "a") as file:
            file.write(lines)

    def _place(self, key: str) -> str:
        folder = self.root
        for part in key.split("/")[:-1]:
            folder = os.path.join(folder, part)
            if not os.path.isdir(folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder)
        return os.path.join(self.root, key)


class S3Store:
    """`s3://bucket/prefix?endpoint_url=URL`: the object of a key is prefix/key. Needs no client library.

    The endpoint is the option, else the URI's, else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS itself.
    """

    def __init__(self, uri: str, aws: Aws, endpoint: str = "", path_style: bool = False) -> None:
        parts = urlsplit(uri)
        self.bucket, self.prefix, self.aws = parts.netloc, unquote(parts.path).strip("/"), aws
        named = [endpoint, dict(parse_qsl(parts.query)).get("endpoint_url")]
        named += [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
        self.endpoint = next((url for url in named if url), "")
        self.path_style = path_style or bool(self.endpoint) or "." in self.bucket
        self.skew = 0.0
        self.part = 0

    def url(self, key: str, region: str) -> str:
        place = quote("/".join(part for part in (self.prefix, key) if part), safe="/-_.~")
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        base = self.endpoint.rstrip("/") or f"https://s3.{region}.{domain}"
        if self.path_style:
            return f"{base}/{self.bucket}/{place}"
        return f"{base.replace('://', f'://{self.bucket}.', 1)}/{place}"

    def read(self, key: str) -> Optional[bytes]:
        reply = self._call("GET", key)
        if reply.status == 404 and b"NoSuchBucket" in reply.body:
            reply.checked()
        # Who may not list a bucket is told 403 for what is not there; that nothing may be written shows in `write`.
        return None if reply.status in (403, 404) else reply.checked().body

    def write(self, key: str, value: object) -> None:
        self._call("PUT", key, json.dumps(value).encode()).checked()

    def append(self, folder: str, lines: str) -> None:
        """Objects cannot grow: each call is a part of its own, and the parts' names sort in the order of writing."""
        self.part = max(self.part + 1, int(time.time() * 1000))
        self._call("PUT", f"{folder}/log/{self.part:015d}.jsonl", lines.encode()).checked()

    def _call(self, method: str, key: str, body: bytes = b"") -> Reply:
        region = self.aws.region()
        request = Request(method, self.url(key, region), {"content-type": "application/json"} if body else {}, body)
        reply = self._signed(request, region)
        if reply.status == 403 and b"RequestTimeTooSkewed" in reply.body and "date" in reply.headers:
            self.skew = http_moment(reply.headers["date"]) - time.time()  # the node's wall clock is wrong
            reply = self._signed(request, region)
        return reply

    def _signed(self, request: Request, region: str) -> Reply:
        return call(signed(request, self.aws.credentials(), region, "s3", time.time() + self.skew))


class PresignedStore:
    """A JSON file {"get": {key: url}, "put": {key: url}}, read anew each time: URLs expire and are replaced.

    The log is one object, `log.jsonl`, written whole each time.
    """

    def __init__(self, path: str) -> None:
        self.path, self.log = path, ""

    def read(self, key: str) -> Optional[bytes]:
        url = self._urls("get").get(key)
        if url is None:
            return None
        reply = call(Request("GET", url, {}))
        return None if reply.status == 404 else reply.checked().body

    def write(self, key: str, value: object) -> None:
        self._put(key, json.dumps(value).encode())

    def append(self, folder: str, lines: str) -> None:
        key = f"{folder}/log.jsonl"
        if not self.log:
            self.log = (self.read(key) or b"").decode()
        self._put(key, (self.log + lines).encode())
        self.log += lines

    def _put(self, key: str, body: bytes) -> None:
        url = self._urls("put").get(key)
        if url is None:
            raise OSError(f"{self.path} has no URL to put {key}")
        call(Request("PUT", url, {}, body)).checked()

    def _urls(self, verb: str) -> Dict[str, str]:
        with open(self.path) as file:
            return dict(json.load(file).get(verb, {}))


def open_store(options: argparse.Namespace) -> Any:
    """The store that the options name; without one, a folder on the node for whoever reaches it by ssh."""
    if options.store.startswith("s3://"):
        aws = Aws(Metadata(options.metadata_base), options.credentials, options.region)
        return S3Store(options.store, aws, options.endpoint_url, options.path_style)
    if options.store.startswith("presigned:"):
        return PresignedStore(options.store[len("presigned:") :])
    if not options.store:
        os.makedirs(os.path.join(options.node_dir, "store"), exist_ok=True)
        return DirectoryStore(os.path.join(options.node_dir, "store"))
    is_uri = options.store.startswith("file:")
    return DirectoryStore(unquote(urlsplit(options.store).path) if is_uri else options.store)


def http_moment(date: str) -> float:
    """Seconds since the epoch of a date as HTTP and Azure write it."""
    import email.utils

    return email.utils.parsedate_to_datetime(date).timestamp()


# -- killers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Killer:
    """One means to end the node. `fire` and `check` say what happened in words, or raise.

    Neither: the provider's own limit, which is armed elsewhere and counted here.
    """

    name: str
    kind: str
    fire: Optional[Callable[[], str]] = None
    check: Callable[[], object] = lambda: None


FAMILY = "family"
ACTING = "acting"
"""The file by which a guard says that it fires the killers."""


def killers_of(options: argparse.Namespace) -> List[Killer]:
    """The killers that the options name, in the order in which they fire; raises ValueError."""
    metadata, found = Metadata(options.metadata_base), []
    for word in options.kill:
        name, _, argument = word.partition(":")
        if name == FAMILY:
            found.append(Killer(FAMILY, PROCESS))
        elif name == "provider-limit" and argument:
            found.append(Killer(word, PROVIDER))
        elif name == "poweroff" and argument in ("", *POWER_OFF):
            found += [power_off(means) for means in ([argument] if argument else POWER_OFF)]
        elif name == "command" and argument:
            found.append(Killer(word, COMMAND, functools.partial(run_words, ["/bin/sh", "-c", argument])))
        elif name == "terminate-ec2":
            found.append(ec2_killer(Aws(metadata, options.credentials, options.region), argument))
        elif name == "terminate-gcp":
            found.append(gcp_killer(metadata, argument or GCP_API))
        elif name == "terminate-azure":
            found.append(azure_killer(metadata, argument or AZURE_API))
        elif name == "runpod":
            found.append(runpod_killer(argument or RUNPOD_API))
        elif name == "vast":
            found.append(vast_killer(argument or VAST_API))
        else:
            raise ValueError(f"no killer is called {word!r}; there are {', '.join(KILLER_NAMES)}")
    return found


KILLER_NAMES = (
    *("family", "poweroff[:systemctl|shutdown|sysrq]", "terminate-ec2", "terminate-gcp", "terminate-azure"),
    *("runpod", "vast", "command:WORDS", "provider-limit:NAME"),
)
GCP_API = "https://compute.googleapis.com/compute/v1"
AZURE_API = "https://management.azure.com"
RUNPOD_API = "https://api.runpod.io/graphql"
VAST_API = "https://console.vast.ai/api/v0"
SYSRQ = "/proc/sysrq-trigger"
POWER_OFF: Dict[str, List[str]] = {
    "systemctl": ["systemctl", "poweroff"],
    "shutdown": ["shutdown", "-P", "now"],
    "sysrq": ["/bin/sh", "-c", f"sync & sleep 1; echo o > {SYSRQ}"],
}


def power_off(means: str) -> Killer:
    """By systemd, by the classic command, or by the kernel itself; all need root."""

    def check() -> None:
        if os.geteuid() != 0:
            raise OSError("not root")
        if means == "sysrq" and not os.access(SYSRQ, os.W_OK):
            raise OSError(f"{SYSRQ} cannot be written")
        if shutil.which(POWER_OFF[means][0]) is None:
            raise OSError(f"no {means} on this node")

    return Killer(f"poweroff:{means}", POWER, functools.partial(run_words, POWER_OFF[means]), check)


def run_words(words: Sequence[str]) -> str:
    """Run a command to its end; its output must be short. Raises OSError unless it exits with 0."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    said = " ".join(done.stdout.decode(errors="replace").split())[:300]
    if done.returncode != 0:
        raise OSError(f"{words[0]} exited with {done.returncode}: {said}")
    return f"exit code 0 {said}".strip()


def ec2_terminate(
    credentials: Credentials, region: str, instance_id: str, now: float, endpoint: str = "", dry_run: bool = False
) -> Request:
    """TerminateInstances (EC2 API Reference, 2016-11-15); a dry run is refused either as allowed or as forbidden."""
    fields = {"Action": "TerminateInstances", "InstanceId.1": instance_id, "Version": "2016-11-15"}
    if dry_run:
        fields["DryRun"] = "true"
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    url = (endpoint or f"https://ec2.{region}.{domain}").rstrip("/") + "/"
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
    return signed(Request("POST", url, headers, urlencode(fields).encode()), credentials, region, "ec2", now)


def ec2_killer(aws: Aws, endpoint: str) -> Killer:
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_EC2", "")

    def request(dry_run: bool) -> Request:
        instance_id = aws.metadata.aws_text("meta-data/instance-id")
        return ec2_terminate(aws.credentials(), aws.region(), instance_id, time.time(), endpoint, dry_run)

    def check() -> None:
        reply = call(request(dry_run=True))
        if b"DryRunOperation" not in reply.body:
            reply.checked()

    return Killer("terminate-ec2", PROVIDER, lambda: _said(call(request(dry_run=False))), check)


def gcp_delete(api: str, place: str, token: str) -> Request:
    """instances.delete (Compute Engine API v1); `place` is projects/P/zones/Z/instances/N."""
    return Request("DELETE", f"{api}/{place}", {"Authorization": f"Bearer {token}"})


def gcp_may_delete(api: str, place: str, token: str) -> Request:
    """instances.testIamPermissions: which of the named permissions the caller has."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    body = json.dumps({"permissions": ["compute.instances.delete"]}).encode()
    return Request("POST", f"{api}/{place}/testIamPermissions", headers, body)


def gcp_killer(metadata: Metadata, api: str) -> Killer:
    def place_and_token() -> Tuple[str, str]:
        project, zone = metadata.gcp_text("project/project-id"), metadata.gcp_text("instance/zone").rpartition("/")[2]
        token = json.loads(metadata.gcp_text("instance/service-accounts/default/token"))["access_token"]
        return f"projects/{project}/zones/{zone}/instances/{metadata.gcp_text('instance/name')}", token

    def check() -> None:
        if not call(gcp_may_delete(api, *place_and_token())).json().get("permissions"):
            raise OSError("the node's service account may not delete it (compute.instances.delete)")

    return Killer("terminate-gcp", PROVIDER, lambda: _said(call(gcp_delete(api, *place_and_token()))), check)


def azure_delete(api: str, resource_id: str, token: str) -> Request:
    """Virtual Machines - Delete (Azure Compute REST API); a power-off alone would go on being billed."""
    url = f"{api}{resource_id}?api-version=2024-07-01&forceDeletion=true"
    return Request("DELETE", url, {"Authorization": f"Bearer {token}"})


def azure_killer(metadata: Metadata, api: str) -> Killer:
    def request() -> Request:
        resource_id = metadata.azure("instance?api-version=2021-02-01").json()["compute"]["resourceId"]
        audience = quote(AZURE_API + "/", safe="")
        path = f"identity/oauth2/token?api-version=2018-02-01&resource={audience}"
        return azure_delete(api, resource_id, metadata.azure(path).json()["access_token"])

    return Killer("terminate-azure", PROVIDER, lambda: _said(call(request())), request)


def runpod_terminate(api: str, pod_id: str, key: str) -> Request:
    """podTerminate (RunPod GraphQL API)."""
    return _runpod(api, key, "mutation($input: PodTerminateInput!) { podTerminate(input: $input) }", pod_id)


def runpod_pod(api: str, pod_id: str, key: str) -> Request:
    return _runpod(api, key, "query($input: PodFilter) { pod(input: $input) { id } }", pod_id)


def _runpod(api: str, key: str, query: str, pod_id: str) -> Request:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return Request(
        "POST", api, headers, json.dumps({"query": query, "variables": {"input": {"podId": pod_id}}}).encode()
    )


def runpod_killer(api: str) -> Killer:
    def me() -> Tuple[str, str, str]:
        return api, container_variable("RUNPOD_POD_ID"), container_variable("RUNPOD_API_KEY")

    def ask(request: Request) -> Dict[str, Any]:
        answer = call(request).json()
        if answer.get("errors"):  # GraphQL tells them in a reply with status 200
            raise OSError(json.dumps(answer["errors"])[:300])
        return answer.get("data") or {}

    def fire() -> str:
        return f"answered {json.dumps(ask(runpod_terminate(*me())))}"

    def check() -> None:
        if not ask(runpod_pod(*me())).get("pod"):
            raise OSError("RUNPOD_API_KEY does not see this pod")

    return Killer("runpod", PROVIDER, fire, check)


def vast_destroy(api: str, instance_id: str, key: str) -> Request:
    """destroy instance (Vast API, DELETE /api/v0/instances/{id}/)."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return Request("DELETE", f"{api}/instances/{instance_id}/", headers, b"{}")


def vast_instance(api: str, instance_id: str, key: str) -> Request:
    return Request("GET", f"{api}/instances/{instance_id}/", {"Authorization": f"Bearer {key}"})


def vast_killer(api: str) -> Killer:
    def me() -> Tuple[str, str, str]:
        return api, container_variable("CONTAINER_ID"), container_variable("CONTAINER_API_KEY")

    return Killer(
        "vast",
        PROVIDER,
        lambda: _said(call(vast_destroy(*me()))),
        lambda: call(vast_instance(*me())).checked(),
    )


def container_variable(name: str, first_process: str = "/proc/1/environ") -> str:
    """What the provider told the container: its first process has it, an ssh session does not inherit it."""
    value = os.environ.get(name)
    if not value:
        with contextlib.suppress(OSError), open(first_process, "rb") as file:
            lines = file.read().decode(errors="replace").split("\0")
            value = dict(line.partition("=")[::2] for line in lines).get(name)
    if not value:
        raise OSError(f"{name} is not in the environment of this container")
    return value


def _said(reply: Reply) -> str:
    reply.checked()
    return f"HTTP {reply.status}"


def unarmed(killers: Sequence[Killer], seconds: float = CHECK_SECONDS) -> Dict[str, str]:
    """Killers that would not work now, and why; all are asked at the same time."""
    why: Dict[str, str] = {killer.name: f"no answer within {seconds:.0f} s" for killer in killers}

    def ask(killer: Killer) -> None:
        try:
            killer.check()
            why.pop(killer.name, None)
        except Exception as error:  # whatever it is, this killer does not count
            why[killer.name] = str(error) or repr(error)

    threads = [threading.Thread(target=ask, args=(killer,), daemon=True) for killer in killers]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(why)


def end_node(
    killers: Sequence[Killer],
    mark: str,
    escalate_seconds: float,
    log: Callable[..., None],
    known: Iterable[Identity] = (),
    first: Sequence[Identity] = (),
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Fire one killer after the other, over and over, until nothing is left; returns only where processes are all.

    That the caller still runs is the sign that the node lives. The next killer follows when the one before failed, or
    when the node still lives `escalate_seconds` later. `tick` is called all the while.
    """
    firing = [killer for killer in killers if killer.fire is not None or killer.name == FAMILY]
    only_family = all(killer.kind == PROCESS for killer in firing)
    attempt = 0
    while True:
        attempt += 1
        for killer in firing or [Killer(FAMILY, PROCESS)]:
            log("kill", killer=killer.name, kind=killer.kind, attempt=attempt)
            if killer.kind == PROCESS:
                ended = _end_family(mark, math.inf if only_family else escalate_seconds, known, first, tick)
                log("killed", killer=killer.name, processes=ended)
                if only_family:
                    return
            else:
                _fire(killer, escalate_seconds, log, tick)
        time.sleep(1.0)


def _end_family(
    mark: str, seconds: float, known: Iterable[Identity], first: Sequence[Identity], tick: Callable[[], None]
) -> int:
    """Kill until two looks in a row find nobody, or for so long where other means are left; how many were ended."""
    ended: Set[Identity] = set()
    quiet, until = 0, boottime() + seconds
    while quiet < 2 and boottime() < until:
        found = kill_family(mark, known, [identity for identity in first if alive(identity)])
        ended |= found
        quiet = 0 if found else quiet + 1
        tick()
        time.sleep(0.03)
    return len(ended)


def _fire(killer: Killer, seconds: float, log: Callable[..., None], tick: Callable[[], None]) -> None:
    """In a thread, since it may hang; back as soon as it failed, else after `seconds`."""
    failed = threading.Event()

    def work() -> None:
        began = boottime()
        try:
            assert killer.fire is not None
            result, ok = killer.fire(), True
        except Exception as error:  # the next one must have its turn whatever happened
            result, ok = str(error) or repr(error), False
        log("kill result", killer=killer.name, ok=ok, result=result, seconds=round(boottime() - began, 3))
        if not ok:
            failed.set()

    threading.Thread(target=work, daemon=True).start()
    until = boottime() + seconds
    while boottime() < until and not failed.wait(0.1):
        tick()


class PowerOffTimer:
    """A power-off at the deadline that init carries out, whoever of us is dead by then; moved with every deadline."""

    def __init__(self, means: str, mark: str, path: str, log: Callable[..., None]) -> None:
        self.means, self.path, self.log = means, path, log
        self.name = "slm-" + "".join(letter if letter.isalnum() else "-" for letter in mark)
        self.standing: List[float] = read_json(path).get("deadlines", [])
        self.target = self.standing[-1] if self.standing else 0.0
        self.moved = threading.Event()

    def arm(self, deadline: float) -> None:
        """Now, waiting for it; raises OSError."""
        if os.geteuid() != 0:
            raise OSError("not root")
        new, old = timer_commands(self.means, self.name, deadline, boottime(), self.standing)
        if not new:
            raise OSError("less than a minute is left, and shutdown counts in minutes")
        self._remember([*self.standing, deadline])  # before: a timer that nobody knows of would fire too early
        run_words(new)
        for words in old:
            try:
                run_words(words)
            except OSError as error:  # it may be gone already
                self.log("timer not removed", error=str(error))
        self._remember([deadline])

    def _remember(self, deadlines: List[float]) -> None:
        self.standing = deadlines
        with contextlib.suppress(OSError):  # a full disk
            write_json(self.path, {"deadlines": deadlines})

    def move(self, deadline: float) -> None:
        """Soon, in the timer's own thread."""
        self.target = deadline
        self.moved.set()

    def keep(self) -> None:
        while True:
            self.moved.wait()
            self.moved.clear()
            target = self.target
            if self.standing[-1:] == [target]:
                continue
            try:
                self.arm(target)
            except Exception as error:  # the timer that stands fires early, which is the safe side
                self.log("timer not moved", error=str(error))


def timer_commands(
    means: str, name: str, deadline: float, now: float, standing: Sequence[float]
) -> Tuple[List[str], List[List[str]]]:
    """What arms a power-off at the deadline, or somewhat before it, and what then takes the ones that stand away.

    `shutdown` counts in minutes: rounded down, so that nothing runs that is not paid for, and nothing under a minute,
    when the one that stands is left to fire. A second `shutdown` replaces the first.
    """
    left = deadline - now
    if means == "shutdown":
        return (["shutdown", "-P", f"+{int(left // 60)}"], []) if left >= 60 else ([], [])
    unit = f"--unit={_timer_unit(name, deadline)}"
    new = ["systemd-run", "--quiet", "--collect", unit, f"--on-active={max(0, int(left))}s"]
    new += ["--timer-property=AccuracySec=1s", "systemctl", "poweroff"]
    return new, [["systemctl", "stop", f"{_timer_unit(name, one)}.timer"] for one in standing if one != deadline]


def _timer_unit(name: str, deadline: float) -> str:
    return f"{name}-{int(deadline * 1000)}"


# -- notices: each returns seconds until the cloud takes the node, or None --------------------------------


def aws_notice(metadata: Metadata) -> Optional[float]:
    """`spot/instance-action` of the metadata service. A rebalance recommendation is no notice."""
    reply = metadata.aws("meta-data/spot/instance-action")
    if reply.status == 404:
        return None
    now = http_moment(reply.headers["date"]) if "date" in reply.headers else time.time()
    return seconds_of_instance_action(reply.json(), now)


def seconds_of_instance_action(document: Mapping[str, str], now: float) -> float:
    """From {"action": "terminate", "time": "2017-09-18T08:22:00Z"}, at most the two minutes that AWS gives."""
    moment = datetime.datetime.strptime(document["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return min(120.0, max(0.0, moment.timestamp() - now))


class GcpNotice:
    """`instance/preempted`: the first look asks, the next ones wait for a change. Compute Engine gives 30 seconds."""

    SECONDS, WAIT_SECONDS = 30.0, 60

    def __init__(self) -> None:
        self.etag = ""

    def __call__(self, metadata: Metadata) -> Optional[float]:
        wait = f"?wait_for_change=true&timeout_sec={self.WAIT_SECONDS}&last_etag={self.etag}" if self.etag else ""
        reply = metadata.gcp(f"instance/preempted{wait}", timeout=self.WAIT_SECONDS + 10.0)
        self.etag = reply.checked().headers.get("etag", "")
        return self.SECONDS if reply.body.strip() == b"TRUE" else None


class AzureNotice:
    """Scheduled events of type Preempt or Terminate that name this machine."""

    def __init__(self) -> None:
        self.name = ""

    def __call__(self, metadata: Metadata) -> Optional[float]:
        if not self.name:
            self.name = metadata.azure("instance?api-version=2021-02-01").json()["compute"]["name"]
        # The first answer may take two minutes: Azure switches the service on when it is first asked.
        reply = metadata.azure("scheduledevents?api-version=2020-07-01", timeout=130.0)
        now = http_moment(reply.headers["date"]) if "date" in reply.headers else time.time()
        return seconds_of_azure_events(reply.json(), self.name, now)


def seconds_of_azure_events(document: Mapping[str, Any], name: str, now: float) -> Optional[float]:
    """Until the earliest of the events that end machine `name`; an event that has started has no NotBefore."""
    ends = [
        max(0.0, http_moment(event["NotBefore"]) - now) if event.get("NotBefore") else 0.0
        for event in document.get("Events", [])
        if event.get("EventType") in ("Preempt", "Terminate") and name in event.get("Resources", [])
    ]
    return min(ends) if ends else None


def url_notice(url: str, _: Metadata) -> Optional[float]:
    """{"seconds": S} at a URL that answers 404 while there is nothing to tell."""
    reply = call(Request("GET", url, {}), 2.0)
    return None if reply.status == 404 else float(reply.json()["seconds"])


def notice_source(word: str) -> Tuple[Callable[[Metadata], Optional[float]], float]:
    """How to look, and the pause between two looks; raises ValueError."""
    if word.startswith("url:http"):
        return functools.partial(url_notice, word[len("url:") :]), 1.0
    sources: Dict[str, Tuple[Callable[[Metadata], Optional[float]], float]]
    sources = {"aws": (aws_notice, 5.0), "gcp": (GcpNotice(), 0.2), "azure": (AzureNotice(), 1.0)}
    if word not in sources:
        raise ValueError(f"no notice is called {word!r}; there are aws, gcp, azure and url:URL")
    return sources[word]


# -- the guard -----------------------------------------------------------------------------------------


class Guard:
    """The process that `run` is the main thread of."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.arguments = options, list(arguments)
        self.node_dir: str = options.node_dir
        self.store = open_store(options)
        self.killers = killers_of(options)
        self.place = f"{options.lease}/{options.rank}"
        self.environment = {**os.environ, **KEEP_ENVIRONMENT}
        self.notice_file = os.environ.get("SLM_NOTICE_FILE") or self._path("notice.json")
        self.notice_lock, self.log_lock, self.lock = threading.Lock(), threading.Lock(), threading.Lock()
        self.contact_now = threading.Event()
        self.log_lines: List[str] = []
        self.answer: Optional[Answer] = None
        self.told_to_end = False
        self.exit_code: Optional[int] = None
        self.known: Set[Identity] = set()
        self.children: List[subprocess.Popen[bytes]] = []
        self.fuse: Optional[subprocess.Popen[bytes]] = None
        self.fuse_since = -math.inf
        self.fuse_pulse = Pulse(self._path("fuse.beat"))
        self.command: Optional[Identity] = None
        self.command_since = boottime()
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
        self._keep_fuse(boottime())
        self._start_command()
        for work in self._threads():
            threading.Thread(target=work, daemon=True).start()
        next_family = 0.0
        while True:
            now = boottime()
            beat(self._path("guard.beat"))
            action = self._decide(now)
            if action == KILL:
                self._end()
            try:
                self._watch_command()
                self._keep_fuse(now)
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
        """Judge what the store and the command line last said, and ask the command to end when it is time."""
        taken = self._path("answer.taken.json")
        handed = take_answer(self._path("answer.json"), taken)
        with self.lock:
            before, action = self.state, WAIT
            # The newest first: an older one must not end the node before it is heard.
            for answer in sorted(
                [self.answer, handed], key=lambda one: (one.epoch, one.number) if one else (-1, -1), reverse=True
            ):
                self.state, action = decide(self.state, now, answer)
                if action == KILL:
                    break
        if replace(self.state, issued=()) != replace(before, issued=()):
            self._save()
        if self.timer is not None and self.state.deadline != before.deadline:
            self.timer.move(self.state.deadline)
        if handed is not None:
            judged = (
                "accepted" if (self.state.epoch, self.state.accepted) == (handed.epoch, handed.number) else "ignored"
            )
            self.log("answer by command", number=handed.number, epoch=handed.epoch, judged=judged)
        with contextlib.suppress(OSError):
            os.unlink(taken)
        if action == TERMINATE and not before.ending:
            self.log("terminate", left_seconds=self.state.deadline - now)
            self._signal_command(signal.SIGTERM)
        return action

    def log(self, event: str, **facts: object) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"at": at, "boottime": boottime(), "event": event, **facts}) + "\n"
        with self.log_lock:
            self.log_lines = [*self.log_lines, line][-MAX_LOG_LINES:]

    def _path(self, name: str) -> str:
        return os.path.join(self.node_dir, name)

    def _first_state(self) -> State:
        """A first grant from now on for a fresh node; for a guard started again, what the one before left behind."""
        if self.is_fresh:
            return State(deadline=boottime() + self.options.first_grant)
        saved = read_json(self._path("deadline.json"))
        if saved.get("boot_id") != boot_id():  # rebooted, or unreadable: nobody knows what is paid for
            self.log("deadline of another boot")
            return State(deadline=boottime(), ending=True)
        self.log("restarted", deadline=saved["deadline"])
        return State(saved["deadline"], (), saved["epoch"], saved["accepted"], saved["ending"])

    def _is_armed(self) -> bool:
        """Whether two killers of different kinds would work; says what is missing."""
        why = unarmed(self.killers)
        kinds = {killer.kind for killer in self.killers if killer.name not in why}
        names = [killer.name for killer in self.killers if killer.name not in why]
        if self.timer is not None:
            try:
                self.timer.arm(self.state.deadline)
                kinds.add(SCHEDULE)
                names.append(f"timer:{self.options.timer}")
            except Exception as error:  # whatever it is, it does not count
                why[f"timer:{self.options.timer}"] = str(error)
        facts = {"killers": names, "kinds": sorted(kinds), "unarmed": why}
        if len(kinds) >= 2 or self.options.allow_unguarded:
            self.log("armed", first_grant_seconds=self.options.first_grant, **facts)
            with contextlib.suppress(OSError):
                write_json(self._path("armed.json"), facts)
            return True
        missing = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        sys.stderr.write(
            f"guard: a node needs killers of two kinds, and {len(kinds)} would work here ({', '.join(names) or 'none'}"
            f"){'. Not armed: ' if missing else ''}{missing}. Name another with --kill or --timer, or run without by "
            "--allow-unguarded.\n"
        )
        self.log("refused", **facts)
        with contextlib.suppress(Exception):
            self._send_log()
        return False

    def _threads(self) -> List[Callable[[], None]]:
        looks = [functools.partial(self._watch_notice, word) for word in self.options.notice]
        return [self._contact, *looks, *([self.timer.keep] if self.timer is not None else [])]

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
        reachable, asked = True, False
        while True:
            try:
                if not asked:
                    # A node that had this rank before may have left answers: begin above the numbers that it used.
                    last = self.store.read(f"guard/{self.place}/request.json")
                    with self.lock:
                        self.at_least = max(self.at_least, _number_of(last) + 1)
                    asked = True
                self._exchange()
                self._send_log()
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
        self.store.write(f"guard/{self.place}/request.json", self._ask())
        data = self.store.read(f"grants/{self.place}.json")
        answer = parse_answer(data) if data is not None else None
        with self.lock:
            self.answer = answer

    def _ask(self) -> Dict[str, Any]:
        """A new numbered request; it also lies on the node, for who answers by `guard.py renew`."""
        exit_code = self.exit_code
        with self.lock:
            now = boottime()
            self.state, number = issue(self.state, now, self.at_least)
            deadline = self.state.deadline
        condition = "running" if exit_code is None else "exited"
        request = {"number": number, "boottime": now, "state": condition, "exit_code": exit_code}
        request.update(grant_deadline=deadline, noticed=os.path.exists(self.notice_file))
        with contextlib.suppress(OSError):  # a full disk: the store hears of it all the same
            write_json(self._path("request.json"), request)
        return request

    def _last_asked(self) -> float:
        with self.lock:
            return self.state.issued[-1][1] if self.state.issued else self.command_since

    def _send_log(self) -> None:
        """A line leaves the list when the store has it: who waits for an empty list waits for that."""
        with self.log_lock:
            lines = self.log_lines
        if lines:
            self.store.append(f"guard/{self.place}", "".join(lines))
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
                    self.log("no notices to be had", source=word, error=str(error))
                seconds, silent = None, True
            if seconds is None:
                time.sleep(max(1.0, pause) if silent else min(pause, self.options.notice_period))
            else:
                self._announce(seconds, word)

    def _on_sigterm(self, *_: object) -> None:
        """Slurm, Kubernetes and a power-off warn by signal; the node is not ended here, its deadline stands."""
        if not self.told_to_end:
            self.told_to_end = True
            work = functools.partial(self._announce, self.options.sigterm_notice, "SIGTERM")
            threading.Thread(target=work, daemon=True).start()

    def _announce(self, seconds: float, source: str) -> None:
        """Write the notice down for the training loop, and run the command for it, once."""
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

    # -- the fuse, and the end

    def _keep_fuse(self, now: float) -> None:
        """Start a fuse where none is alive, and in the place of one that does not move."""
        if now < self.fuse_since + RESTART_SECONDS:
            return
        identity = recorded(self._path("fuse.json"))
        pids = [identity[0]] if identity is not None and alive(identity) else []
        if self.fuse is not None and self.fuse.poll() is None and self.fuse.pid not in pids:
            pids.append(self.fuse.pid)
        if pids and self.fuse_pulse.beats():
            return
        for pid in pids:
            self.log("fuse hangs", pid=pid)
            send(pid, signal.SIGKILL)
        if os.path.exists(self._path("fuse.json")):
            self.log("fuse restarted")
        self.fuse_pulse.forget()
        rest = ["--mark", self.options.mark, "--node-dir", self.node_dir, "--deadline", str(self.state.deadline)]
        self.fuse_since = now
        self.fuse = _spawn_self(["fuse", *rest, "--", *self.arguments], self.environment)

    def _end(self) -> None:
        """Fire the killers. As long as this moves, the fuse leaves it to us: two at once would mix up their order."""
        self.log("deadline", late_seconds=boottime() - self.state.deadline)
        beat(self._path(ACTING))
        self.contact_now.set()

        def log(event: str, **facts: object) -> None:
            self.log(event, **facts)
            self.contact_now.set()  # told at once: there may be no later

        end_node(self.killers, self.options.mark, self.options.escalate, log, self.known, tick=self._tick)
        by_net = not isinstance(self.store, DirectoryStore)
        until = boottime() + (LAST_WORDS_BY_NET_SECONDS if by_net else LAST_WORDS_SECONDS)
        while self.log_lines and boottime() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    def _tick(self) -> None:
        beat(self._path("guard.beat"))
        for child in [*self.children, *([self.fuse] if self.fuse else [])]:
            child.poll()


def take_answer(path: str, taken: str) -> Optional[Answer]:
    """What `guard.py renew` left, moved aside until it is judged."""
    try:
        os.replace(path, taken)
        with open(taken, "rb") as file:
            return parse_answer(file.read())
    except OSError:
        return None


def _number_of(request: Optional[bytes]) -> int:
    try:
        return int(json.loads(request or b"{}").get("number", 0))
    except (ValueError, TypeError, AttributeError):
        return 0


# -- the fuse ------------------------------------------------------------------------------------------


def fuse(options: argparse.Namespace) -> None:
    """Watch the guard; touch store and network only to end the node."""
    me = {"pid": os.getpid(), "start": start_time(os.getpid())}
    with contextlib.suppress(OSError):  # on a full disk the guard still knows it as its child
        write_json(os.path.join(options.node_dir, "fuse.json"), me)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path, deadline = os.path.join(options.node_dir, "deadline.json"), options.deadline
    pulse = Pulse(os.path.join(options.node_dir, "guard.beat"))
    guard: Optional[subprocess.Popen[bytes]] = None
    restarted = -math.inf
    while True:
        beat(os.path.join(options.node_dir, "fuse.beat"))
        deadline = read_json(path).get("deadline", deadline)
        identity = recorded(path)
        guard_alive = alive(identity) or (guard is not None and guard.poll() is None)
        if identity is not None and alive(identity) and not pulse.beats():
            send(identity[0], signal.SIGKILL)  # it hangs; a new one takes over where it stood
            guard_alive = False
        action = decide_fuse(deadline, boottime(), guard_alive)
        if action == KILL and not (guard_alive and os.path.exists(os.path.join(options.node_dir, ACTING))):
            _burn(options, [identity] if identity is not None else [], guard)
        if action == RESTART and boottime() > restarted + RESTART_SECONDS:
            restarted = boottime()
            pulse.forget()
            guard = _spawn_self(options.command, dict(os.environ))
        time.sleep(TICK_SECONDS)


def _burn(options: argparse.Namespace, first: Sequence[Identity], guard: Optional[subprocess.Popen[bytes]]) -> None:
    """End the node by the guard's own killers; what is done lies on the node, the store is the guard's."""

    def log(event: str, **facts: object) -> None:
        with contextlib.suppress(OSError), open(os.path.join(options.node_dir, "fuse.jsonl"), "a") as file:
            file.write(json.dumps({"boottime": boottime(), "event": event, **facts}) + "\n")

    of_guard = parse(options.command)

    def tick() -> None:
        beat(os.path.join(options.node_dir, "fuse.beat"))
        if guard is not None:
            guard.poll()

    end_node(killers_of(of_guard), options.mark, of_guard.escalate, log, (), first, tick)
    os.kill(os.getpid(), signal.SIGKILL)


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


# -- the command line ------------------------------------------------------------------------------------


def tell(facts: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")


def renew(options: argparse.Namespace) -> int:
    """Hand an answer to the guard of this node, and say what became of it."""
    path = os.path.join(options.node_dir, "answer.json")
    answer = Answer(options.epoch, options.number, options.duration)
    if not guard_is_alive(options.node_dir):
        tell({"accepted": False, "reason": f"no guard runs in {options.node_dir}"})
        return 1
    fields = {"epoch": answer.epoch, "number": answer.number, "duration_seconds": answer.duration_seconds}
    if parse_answer(json.dumps(fields).encode()) is None:
        tell({"accepted": False, "reason": "a duration is a finite number of seconds from 0 on"})
        return 1
    write_json(path, fields)
    until = time.monotonic() + options.wait
    files = [path, os.path.join(options.node_dir, "answer.taken.json")]
    while any(os.path.exists(name) for name in files) and time.monotonic() < until:
        time.sleep(0.02)
    state = read_json(os.path.join(options.node_dir, "deadline.json"))
    accepted = (state.get("epoch"), state.get("accepted")) == (answer.epoch, answer.number)
    reason = "" if accepted else why_ignored(answer, state, read_json(os.path.join(options.node_dir, "request.json")))
    if os.path.exists(path):
        accepted, reason = False, f"the guard did not take it within {options.wait:g} s"
    left = state.get("deadline", 0.0) - boottime()
    tell({"accepted": accepted, "deadline_in_seconds": round(left, 3), "reason": reason})
    return 0 if accepted else 1


def why_ignored(answer: Answer, state: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """In words, after the guard judged an answer by the rules of `decide`."""
    if state.get("ending"):
        return "the node is ending"
    if answer.epoch < state.get("epoch", 0):
        return f"a newer supervisor, epoch {state['epoch']}, has answered this node"
    if answer.epoch == state.get("epoch") and answer.number < state.get("accepted", 0):
        return f"request {state['accepted']} was answered already"
    return f"request {answer.number} was never sent, or too long ago; the newest is {request.get('number')}"


def status(options: argparse.Namespace) -> int:
    """The newest request and what the node lives on, as JSON."""
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
        "epoch": state.get("epoch", 0),
        "accepted": state.get("accepted", 0),
        "ending": state.get("ending", False),
        "guard_alive": guard_is_alive(options.node_dir),
        "fuse_alive": alive(recorded(os.path.join(options.node_dir, "fuse.json"))),
        "exit_code": ended.get("exit_code"),
        "killers": armed.get("killers", []),
        "request": request,
    }
    tell(facts)
    return 0


def guard_is_alive(node_dir: str) -> bool:
    return alive(recorded(os.path.join(node_dir, "deadline.json")))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Everything behind `--` is the command (of the fuse: the guard's own arguments)."""
    verb = arguments[0] if arguments[:1] and arguments[0] in ("fuse", "renew", "status") else "guard"
    parser = argparse.ArgumentParser(prog="guard.py", description="End this node when its grant expires.")
    parser.add_argument("--node-dir", required=True, help="scratch folder of this node")
    if verb in ("guard", "fuse"):
        parser.add_argument("--mark", required=True, help=f"value of {MARK_VARIABLE} in all processes of this node")
    if verb == "guard":
        _guard_options(parser)
    elif verb == "fuse":
        parser.add_argument("--deadline", type=float, required=True, help="boottime")
    elif verb == "renew":
        parser.add_argument("--number", type=int, required=True, help="the request that is answered")
        parser.add_argument("--duration", type=float, required=True, metavar="SECONDS", help="from the request on")
        parser.add_argument("--epoch", type=int, required=True, help="of the supervisor")
        parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="for the guard to judge it")
    words = list(arguments[1:] if verb != "guard" else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.verb, options.command = verb, words[cut + 1 :]
    if verb in ("guard", "fuse") and not options.command:
        parser.error("a command must follow after --")
    if verb == "guard":
        try:
            killers_of(options)
            for word in options.notice:
                notice_source(word)
        except ValueError as error:
            parser.error(str(error))
    return options


def _guard_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--store", default="", help="the run store: a folder, s3://BUCKET/PREFIX, or presigned:FILE; default: none")
    add("--lease", required=True)
    add("--rank", type=int, required=True)
    add("--first-grant", type=float, required=True, metavar="SECONDS")
    add("--period", type=float, default=2.0, metavar="SECONDS", help="between two requests")
    add("--kill", action="append", default=[], metavar="KILLER", help="in this order: " + ", ".join(KILLER_NAMES))
    add("--escalate", type=float, default=20.0, metavar="SECONDS", help="from one killer to the next")
    add("--timer", choices=("systemd-run", "shutdown"), help="have init power the node off at each deadline")
    add("--allow-unguarded", action="store_true", help="start with fewer than two kinds of killers")
    add("--notice", action="append", default=[], metavar="SOURCE", help="aws, gcp, azure or url:URL")
    add("--notice-period", type=float, default=5.0, metavar="SECONDS", help="the longest pause between two looks")
    add("--sigterm-notice", type=float, default=30.0, metavar="SECONDS", help="what a SIGTERM to the guard announces")
    add("--on-notice", metavar="CMD", help="run once at a notice; {seconds} is replaced")
    add("--credentials", default="", metavar="FILE", help="AWS keys: JSON, or as in ~/.aws/credentials")
    add("--region", default="", help="of AWS")
    add("--endpoint-url", default="", metavar="URL", help="of an S3-compatible store")
    add("--path-style", action="store_true", help="bucket in the path; always so with --endpoint-url")
    add("--metadata-base", default="", metavar="URL", help=f"of the cloud's metadata; default {Metadata.ADDRESS}")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.verb in ("renew", "status"):
        return renew(options) if options.verb == "renew" else status(options)
    if os.environ.get(MARK_VARIABLE) != options.mark:  # what others read is the environment at exec
        environment = {**os.environ, MARK_VARIABLE: options.mark}
        os.execve(sys.executable, [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments], environment)
    os.makedirs(options.node_dir, exist_ok=True)
    if only_one(os.path.join(options.node_dir, f"{options.verb}.lock")) is None:
        return 0
    if options.verb == "fuse":
        fuse(options)
    return Guard(options, arguments).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

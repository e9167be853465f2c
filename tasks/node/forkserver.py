"""A process per node that has torch and Lightning imported, from which Ray's workers are forked.

A new Ray worker spends most of its start in imports: about 5 s of one core for a training worker here, 1 s when it is
forked. That is most of what a restart costs, and forked workers share these libraries' memory.

Three parts in one file: the server (`python -m tasks.node.forkserver serve SOCKET`), `ForkServer`, through which the
node task starts it and runs the driver in it, and the launcher, which Ray's raylet runs in place of its own
`setup_worker.py` (as a script; standard library only). The launcher hands its arguments, environment and standard
streams to the server and ends. Without a server, or for anything unusual, it becomes what the raylet would have run.

Invariant: the server never imports ray. A fork of a process that has loaded ray's C++ library makes the same "random"
ids as every other fork. It has one thread of ours, no CUDA, and dies with the node task; its forks die with it.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SOCKET_VARIABLE = "SLM_FORK_SOCKET"
PRELOAD = (
    *("torch", "lightning.fabric", "numpy", "pandas", "pyarrow.fs", "pydantic", "tasks.spec", "trainer.loop"),
    *("requests", "google.protobuf.json_format", "jsonschema", "filelock", "psutil", "tqdm"),  # what ray imports
)
"""What training worker, controller and driver need; a module that cannot be imported is left to who needs it."""
STREAMS = (0, 1, 2)
MAX_REQUEST_BYTES = 4 * 2**20
CONNECT_SECONDS = 30.0
"""The server answers nobody while it imports; a launcher waits that long before it does without."""
SUPPORTED = sys.platform == "linux"
"""macOS frameworks do not survive a fork; there every worker imports for itself."""


class ForkServer:
    """The node task's handle of the server. `start` returns at once; the imports go on beside it."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if SUPPORTED:
            from tasks.own_module import own_module  # not above: the launcher is a script that knows no package

            # One BLAS thread: a fork takes only the thread that calls it along.
            environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            command = own_module("tasks.node.forkserver", "serve", str(self.socket_path), str(os.getpid()))
            # A group of its own: a SIGTERM to the node's is a notice, which the workers are to hear of by its file.
            self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, process_group=0)

    def wait_ready(self, seconds: float) -> bool:
        """Whether the imports are done within `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process is not None and self.process.poll() is None:
            if _ready_file(str(self.socket_path)).exists():
                return True
            time.sleep(0.05)
        return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def run_forked(socket_path: Path, argv: list[str], environ: dict[str, str], output: int) -> socket.socket:
    """Run `python argv...` in a fork that writes to the file descriptor `output`.

    Returns a socket that yields {"exit_code": N} when it has ended.

    Raises:
        OSError: The server is not there.
    """
    request = {"argv": argv, "env": environ, "cwd": str(Path.cwd()), "report": True}
    connection = _ask(str(socket_path), request, (0, output, output))
    _receive_line(connection)
    return connection


# -- the launcher


def launch(arguments: list[str]) -> NoReturn:
    """Do what Ray's `setup_worker.py` does, by a fork where that is the same thing."""
    path = os.environ.get(SOCKET_VARIABLE, "")
    request = _fork_request(arguments) if path else None
    if request is not None:
        with contextlib.suppress(OSError, ValueError):
            _receive_line(_ask(path, request))
            os._exit(0)
    import ray

    original = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"
    os.execv(sys.executable, [sys.executable, str(original), *arguments])


def _fork_request(arguments: list[str]) -> dict[str, Any] | None:
    """What to ask of the server, or None where a fork would not be the same as Ray's own way."""
    options = dict(part.split("=", 1) for part in arguments if part.startswith("--") and "=" in part)
    context = json.loads(options.get("--serialized-runtime-env-context") or "{}")
    changes: dict[str, str] = context.get("env_vars") or {}
    plain = (
        options.get("--language") == "PYTHON"
        and arguments[0].endswith("default_worker.py")
        and not context.get("command_prefix")
        and not context.get("override_worker_entrypoint")
        and context.get("py_executable", sys.executable) == sys.executable
        and not any("$" in value for value in changes.values())
    )
    if not plain:
        return None
    own = ("--serialized-runtime-env-context", "--language")
    argv = [part for part in arguments if part.split("=", 1)[0] not in own]
    return {"argv": argv, "env": {**os.environ, **changes}, "cwd": str(Path.cwd()), "report": False}


def _ask(path: str, request: dict[str, Any], streams: tuple[int, ...] = STREAMS) -> socket.socket:
    """Send a request with the standard streams to use; the answer's first line is {"pid": N}."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CONNECT_SECONDS)
    connection.connect(path)
    body = json.dumps(request).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
    connection.sendmsg([len(body).to_bytes(4, "big")], [rights])
    connection.sendall(body)
    return connection


def _receive_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part:
            raise ConnectionError("the fork server ended before it answered")
        line += part
    return line


# -- the server


def serve(path: str, parent_pid: int) -> int:
    """Import, then fork on request until the node task is gone."""
    _die_with_parent(parent_pid)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)  # who comes while we import waits here
    _preload()
    _ready_file(path).touch()
    listener.settimeout(0.05)
    reports: dict[int, socket.socket] = {}
    while os.getppid() == parent_pid:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            with contextlib.suppress(OSError, ValueError):
                _handle(listener, connection, reports)
        _reap(reports)
    return 0


def _preload() -> None:
    import importlib

    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "ray" in sys.modules:
        raise AssertionError(f"one of {PRELOAD} imports ray, so that forks would share ids")
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every shared page


def _handle(listener: socket.socket, connection: socket.socket, reports: dict[int, socket.socket]) -> None:
    """Fork one process as asked."""
    connection.settimeout(5.0)
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(len(STREAMS) * array.array("i").itemsize))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    try:
        length = int.from_bytes(head, "big")
        if length > MAX_REQUEST_BYTES or len(streams) != len(STREAMS):
            raise ValueError("not a request of ours")
        request = json.loads(_receive_exactly(connection, length))
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            for other in (listener, connection, *reports.values()):
                other.close()
            _become(request, streams, server_pid)
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        if request["report"]:
            reports[pid] = connection
        else:
            connection.close()
    finally:
        for stream in streams:
            os.close(stream)


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    body = bytearray()
    while len(body) < length:
        part = connection.recv(min(2**16, length - len(body)))
        if not part:
            raise ValueError("the request is cut short")
        body += part
    return bytes(body)


def _reap(reports: dict[int, socket.socket]) -> None:
    """Collect ended forks; tell whoever asked for it how they ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            connection = reports.pop(pid, None)
            if connection is not None:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"exit_code": code}).encode() + b"\n")
                connection.close()


def _become(request: dict[str, Any], streams: array.array[int], server_pid: int) -> NoReturn:
    """In the fork: turn into `python argv...`, as if freshly started, and leave by way of the caller."""
    _die_with_parent(server_pid)
    os.setpgid(0, 0)  # a raylet may kill the whole group of a worker that it ends: this must not be the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream, target)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    try:
        _run(request["argv"])
    except Exception:
        import traceback

        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _run(argv: list[str]) -> None:
    import runpy

    if argv[0] == "-P":  # as the server itself was started
        argv = argv[1:]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to end this process when its parent ends, however that happens."""
    if SUPPORTED:
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _ready_file(path: str) -> Path:
    return Path(path + ".ready")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2], int(sys.argv[3])))
    launch(sys.argv[1:])

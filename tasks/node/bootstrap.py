"""The first program on a rented node, and how the node gets its Python environment.

    python3 -I bootstrap.py start --facts node.json      what SkyPilot runs on a node: the guard first, then wait
    python3 -I bootstrap.py bootstrap --facts node.json  what the guard starts: environment, data, `tasks node`

One file for any python3 from 3.8 on, standard library only, since it runs before anything is installed. The guard is a
process of its own that outlives SkyPilot's; whatever fails after it costs at most what is paid for. The environment
lies in a cache of the user that is kept between attempts, under a name made of everything that decides its content.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import platform
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PACKAGES = ("boto3", "lightning", "numpy", "psutil", "pyarrow", "pydantic", "pyyaml", "ray[train]", "torch")
"""What a node needs of the lock file; what they need in turn comes with them, held to the same versions."""
FLASH = "flash-attn-4"
PYTHON = ">=3.11,<3.14"
LOCK_FILE = "constraints.txt"
GUARD_ARCHIVE = "guard.pyz"
"""As in tasks.node.guard_archive."""
COMPLETE = ".complete"
TICK_SECONDS = 0.5
GUARD_START_SECONDS = 20.0
INSTALL_SECONDS = 1500.0
EXIT_BROKEN = 30
NODE_LOG = "logs/{lease_id}-{rank}.log"
"""Both as in tasks.run_store_keys, which this file cannot import: no package of ours is installed yet."""
OWN_INDEX = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_OFFLINE", "PIP_INDEX_URL", "PIP_FIND_LINKS")
"""Where packages come from another place than everybody's, it is not gone round."""
PASSED_ON = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "SSL_CERT_FILE",
    "NO_PROXY",
    "SLM_CACHE",
)
"""Beside all that begins with one of PASSED_PREFIXES; SkyPilot's and Ray's own variables stay behind."""
PASSED_PREFIXES = (
    "SLURM_JOB",
    "SLURM_CONF",
    "NCCL_",
    "UV_",
    "PIP_",
    "HTTP",
    "AWS_ENDPOINT_URL",
    "CONTAINER_",
    "RUNPOD_",
)


def read_json(path: str) -> dict[str, Any]:
    with open(path) as file:
        content = json.load(file)
    return dict(content)


def write_json(path: str, value: object) -> None:
    """Whole or not at all."""
    half = f"{path}.{os.getpid()}.half"
    with open(half, "w") as file:
        json.dump(value, file)
    os.replace(half, path)


# -- start: the guard ------------------------------------------------------------------------------------


def node_folder(lease_id: str, rank: int) -> str:
    """On the node's own disk: a shared home would mix the nodes up."""
    return os.path.join(tempfile.gettempdir(), f"slm-{os.getuid()}", f"{lease_id}-{rank}")


def node_ranks(ips: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Each node's rank by its address: those that live keep theirs, new ones get what is free, in SkyPilot's order."""
    kept = {ip: known[ip] for ip in ips if ip in known}
    free = (rank for rank in range(len(ips)) if rank not in kept.values())
    return {**kept, **{ip: next(free) for ip in ips if ip not in kept}}


def rank_and_ips(facts: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[int, list[str]]:
    """This node's rank, and all addresses by rank."""
    ips = environ["SKYPILOT_NODE_IPS"].split()
    ranks = node_ranks(ips, facts.get("ranks") or {})
    return ranks[ips[int(environ["SKYPILOT_NODE_RANK"])]], sorted(ips, key=lambda ip: ranks[ip])


def node_environment(
    facts: Mapping[str, Any], environ: Mapping[str, str], node_dir: str, mark: str, folder: str
) -> dict[str, str]:
    """What the guard and all that it starts are told; see tasks.node.environment."""
    rank, ips = rank_and_ips(facts, environ)
    kept = {
        name: value for name, value in environ.items() if name in PASSED_ON or name.upper().startswith(PASSED_PREFIXES)
    }
    told = {
        "SLM_SPEC": os.path.join(node_dir, "spec.json"),
        "SLM_STORE": facts["store_uri"],
        "SLM_LEASE": facts["lease_id"],
        "SLM_RANK": str(rank),
        "SLM_NUM_NODES": str(facts["num_nodes"]),
        "SLM_NODE_IP": ips[rank],
        "SLM_HEAD_IP": ips[0],
        "SLM_HEAD_PORT": str(facts["head_port"]),
        "SLM_NODE_DIR": node_dir,
        "SLM_NODE_MARK": mark,
        "SLM_NOTICE_FILE": os.path.join(node_dir, "notice.json"),
        "PYTHONPATH": folder,  # where our code is found; the working folder is not, by the next line
        "PYTHONSAFEPATH": "1",
    }
    if facts.get("credentials"):
        told["AWS_SHARED_CREDENTIALS_FILE"] = os.path.join(folder, facts["credentials"])
    if facts.get("region"):
        told["AWS_REGION"] = told["AWS_DEFAULT_REGION"] = facts["region"]
    return {**kept, **told}


def guard_command(
    facts: Mapping[str, Any], environ: Mapping[str, str], node_dir: str, mark: str, folder: str
) -> list[str]:
    """The guard's command line; a terminator whose words this node cannot fill in is left out."""
    words = [sys.executable, "-I", "-S", os.path.join(folder, GUARD_ARCHIVE)]
    options = {
        "--store": facts["store_uri"],
        "--lease": facts["lease_id"],
        "--rank": str(rank_and_ips(facts, environ)[0]),
        "--first-grant": str(facts["first_grant_seconds"]),
        "--period": str(facts["guard_period_seconds"]),
        "--mark": mark,
        "--node-dir": node_dir,
        "--region": facts.get("region") or "",
        "--credentials": os.path.join(folder, facts["credentials"]) if facts.get("credentials") else "",
        "--timer": facts.get("timer") or "",
    }
    words += [word for option, value in options.items() if value for word in (option, value)]
    for name in facts["terminators"]:
        with contextlib.suppress(KeyError):
            words += ["--terminator", name.format_map(environ)]
    words += [word for source in facts["notice"] for word in ("--notice", source)]
    bootstrap = [sys.executable, "-I", "-u", os.path.join(folder, "tasks", "node", "bootstrap.py"), "bootstrap"]
    return [*words, "--", *bootstrap, "--facts", os.path.join(folder, "node.json")]


def start(facts_path: str) -> int:
    """Start the guard and stay as long as it lives; what the node says is copied to our output."""
    folder = os.path.dirname(os.path.abspath(facts_path))
    facts = read_json(facts_path)
    if facts.get("credentials"):
        os.chmod(os.path.join(folder, facts["credentials"]), 0o600)
    node_dir = node_folder(facts["lease_id"], rank_and_ips(facts, os.environ)[0])
    os.makedirs(node_dir, mode=0o700, exist_ok=True)
    mark = mark_of(node_dir, facts["lease_id"])
    log = os.path.join(node_dir, "node.log")
    detach(
        guard_command(facts, os.environ, node_dir, mark, folder),
        node_environment(facts, os.environ, node_dir, mark, folder),
        node_dir,
        log,
    )
    return follow(log, node_dir)


def detach(command: Sequence[str], environment: Mapping[str, str], cwd: str, log: str) -> None:
    """Start it as nobody's child: whoever ends us and all that descends from us does not end it."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, number)
    try:
        os.execve(command[0], list(command), dict(environment))
    finally:
        os._exit(127)


def mark_of(node_dir: str, lease_id: str) -> str:
    """By which the guard knows the node's processes: the same if SkyPilot runs us again."""
    path = os.path.join(node_dir, "mark.json")
    if not os.path.exists(path):
        write_json(path, {"mark": f"{lease_id}-{secrets.token_hex(4)}"})
    return str(read_json(path)["mark"])


def follow(log: str, node_dir: str) -> int:
    """Copy the log until the guard is gone: the one that we started, or one that was there already."""
    lock, began, seen = os.path.join(node_dir, "guard.lock"), time.monotonic(), False
    while not os.path.exists(log):
        time.sleep(TICK_SECONDS)
    with open(log, "rb") as file:
        while True:
            chunk = file.read()
            if chunk:
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                continue
            held = is_held(lock)
            seen = seen or held
            if not held and (seen or time.monotonic() - began > GUARD_START_SECONDS):
                return 0 if seen else EXIT_BROKEN
            time.sleep(TICK_SECONDS)


def is_held(lock_path: str) -> bool:
    """Whether a living process holds the lock."""
    try:
        with open(lock_path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# -- bootstrap: environment, then the node ------------------------------------------------------------------


def bootstrap(facts_path: str) -> int:
    """What the guard starts."""
    folder = os.path.dirname(os.path.abspath(facts_path))
    began = time.time()
    try:
        python, cached = environment(folder)
    except (OSError, subprocess.SubprocessError) as error:
        say(f"the Python environment could not be made: {error}")
        with contextlib.suppress(Exception):  # whatever the store says, this node has nothing better to do
            send_log(folder, read_json(facts_path))
        return EXIT_BROKEN
    seconds = time.time() - began
    say(f"Python environment {'found' if cached else 'made'} in {seconds:.1f} s")
    os.environ.update(SLM_SETUP_BEGAN=repr(began), SLM_ENVIRONMENT_SECONDS=repr(seconds), SLM_CACHE=cache_root())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(python, [python, "-u", "-m", "tasks", "rented-node"])
    return EXIT_BROKEN


def send_log(folder: str, facts: Mapping[str, Any]) -> None:
    """Bring the node's log to the run store by the guard's own client, since there is no other yet."""
    sys.path.insert(0, os.path.join(folder, GUARD_ARCHIVE))
    stores, aws = importlib.import_module("guard.stores"), importlib.import_module("guard.credentials")
    credentials = os.path.join(folder, facts["credentials"]) if facts.get("credentials") else ""
    identity = aws.Aws(aws.Metadata(), credentials, facts.get("region") or "")
    store = stores.S3Store(facts["store_uri"], identity)
    key = NODE_LOG.format(lease_id=facts["lease_id"], rank=os.environ["SLM_RANK"])
    with open(os.path.join(os.environ["SLM_NODE_DIR"], "node.log"), "rb") as file:
        store.send("PUT", key, file.read())


def cache_root() -> str:
    """Outlives the lease: SkyPilot's HOME on Slurm is one cluster's and goes with it. SLM_CACHE names another."""
    named = os.environ.get("SLM_CACHE")
    if named:
        return named
    home = pwd.getpwuid(os.getuid()).pw_dir
    for parent in (os.path.join(home, ".cache", "slm"), os.path.join(tempfile.gettempdir(), f"slm-{os.getuid()}")):
        with contextlib.suppress(OSError):
            os.makedirs(parent, mode=0o700, exist_ok=True)
            if os.access(parent, os.W_OK):
                return parent
    return tempfile.mkdtemp(prefix="slm-cache-")


def has_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return listed.returncode == 0 and b"GPU" in listed.stdout


def environment_name(lock: bytes, gpu: bool) -> str:
    """Made of all that decides what is installed."""
    parts = [lock, repr((PACKAGES, FLASH if gpu else "", PYTHON)).encode(), platform.machine().encode()]
    parts += [".".join(platform.libc_ver()).encode(), b"gpu" if gpu else b"cpu"]
    return "env-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def environment(folder: str) -> tuple[str, bool]:
    """The Python of the environment, and whether it was there already; one of several nodes makes it, others wait."""
    lock_file, gpu = os.path.join(folder, LOCK_FILE), has_gpu()
    with open(lock_file, "rb") as file:
        name = environment_name(file.read(), gpu)
    place = os.path.join(cache_root(), name)
    python = os.path.join(place, "bin", "python")
    if os.path.exists(os.path.join(place, COMPLETE)):
        return python, True
    with locked(f"{place}.lock"):
        if os.path.exists(os.path.join(place, COMPLETE)):
            return python, True
        shutil.rmtree(place, ignore_errors=True)
        install(place, lock_file, gpu)
        with open(os.path.join(place, COMPLETE), "w") as file:
            file.write(f"{time.time()}\n")
    return python, False


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(place: str, lock_file: str, gpu: bool) -> None:
    """Raises OSError with the tool's last words."""
    python = os.path.join(place, "bin", "python")
    wanted = wanted_packages(lock_file)
    uv = find_uv()
    if uv is not None:
        say(f"making {place} with {uv}")
        run([uv, "venv", "--quiet", "--python", PYTHON, place])
        tool = [uv, "pip", "install", "--quiet", "--python", python, "-c", lock_file]
    else:
        say(f"making {place} with pip")
        run([sys.executable, "-I", "-m", "venv", place])
        tool = [python, "-I", "-m", "pip", "install", "--quiet", "-c", lock_file]
    if gpu or not only_cpu(tool, uv is not None, wanted):
        run([*tool, *wanted])
    if gpu and FLASH in locked_versions(lock_file):
        flash = [*tool, f"{FLASH}=={locked_versions(lock_file)[FLASH]}"]
        with contextlib.suppress(OSError):
            run(flash)
            run([python, "-c", "import flash_attn"])


def only_cpu(tool: Sequence[str], is_uv: bool, wanted: Sequence[str]) -> bool:
    """Whether the small build of torch could be had, where there is no GPU; the usual one computes there too."""
    own_index = any(os.environ.get(name) for name in OWN_INDEX)
    if not is_uv or own_index:
        return False
    try:
        run([*tool, "--torch-backend", "cpu", *wanted])
    except OSError as error:
        say(f"no CPU build of torch by itself: {str(error)[:200]}")
        return False
    return True


def wanted_packages(lock_file: str) -> list[str]:
    """Names with the versions of the lock file."""
    versions = locked_versions(lock_file)
    found = []
    for package in PACKAGES:
        name = package.partition("[")[0]
        found.append(f"{package}=={versions[name]}" if name in versions else package)
    return found


def locked_versions(lock_file: str) -> dict[str, str]:
    with open(lock_file) as file:
        pairs = [line.split("#")[0].strip().partition("==") for line in file]
    return {name.strip().lower().replace("_", "-"): version.strip() for name, mark, version in pairs if mark}


def find_uv() -> str | None:
    """In PATH, or where SkyPilot puts it."""
    homes = (os.path.expanduser("~"), pwd.getpwuid(os.getuid()).pw_dir)
    places = [shutil.which("uv"), *(os.path.join(home, ".local", "bin", "uv") for home in homes)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def run(words: Sequence[str]) -> None:
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip()
        raise OSError(f"{os.path.basename(words[0])} {words[1]} exited with {done.returncode}: {said[-600:]}")


def say(text: str) -> None:
    sys.stdout.write(time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bootstrap.py", description="Be a rented node.")
    parser.add_argument("verb", choices=("start", "bootstrap"))
    parser.add_argument("--facts", required=True, help="node.json, beside the code")
    options = parser.parse_args(arguments)
    return start(options.facts) if options.verb == "start" else bootstrap(options.facts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

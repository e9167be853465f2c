"""Talks to SkyPilot: a process of its own, one JSON request a line on its input, replies on its output.

    python -m orchestrator.backends.sky.worker

`import sky` takes seconds and hundreds of megabytes, prints, and may hang, which does no harm here. A request is
{"call": NAME, ...}; replies are {"event": ..., ...} while it runs, and at its end {"result": ...} or {"failure": ...}.
Creating goes through SkyPilot's API server. Querying and terminating also work without it and without SkyPilot's
database, by SkyPilot's functions for each cloud and a lease's record: so another machine can do both.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cost.ledger.leases import LEASE_PREFIX
from orchestrator.backends.sky.errors import Failure, Trouble, classify
from orchestrator.backends.sky.names import name_without_user

TICK_SECONDS = 1.0
SLURM_LOOK_SECONDS = 4.0
HEALTH_SECONDS = 10.0
VERIFY_TRIES = 15
"""Queries of the provider after a termination, two seconds apart, before it counts as not confirmed."""
MEMORY_GB, CPUS = "6", "2"
"""The size of SkyPilot's API server unless the user has set it: it starts workers for all of both."""

Tell = Callable[..., None]


class Refused(Exception):
    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(trouble, message)


# -- creating ---------------------------------------------------------------------------------------------


def launch(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Rent and start; sends the cluster's record as soon as it is known.

    After `limit_seconds`, or `capacity_seconds` in a queue, the request is cancelled and the cluster terminated.
    """
    import sky
    from sky.client import sdk

    name, task = request["cluster"], sky.Task.from_yaml_config(dict(request["task"]))
    began = time.monotonic()
    request_id = sdk.launch(task, cluster_name=name, _need_confirmation=False)
    done = _in_thread(lambda: sdk.stream_and_get(request_id, output_stream=sys.stderr))
    sent: dict[str, Any] = {}
    last_look = began
    while not done.wait(TICK_SECONDS):
        now = time.monotonic()
        found = _record(name)
        if found and found != sent:
            sent = found
            tell(event="record", record=found)
        if now - began > request["limit_seconds"]:
            _abandon(request_id, name, found)
            raise Refused(Trouble.CAPACITY, f"no node was ready within {request['seconds']:.0f} s")
        if found.get("provider") == "slurm" and now - last_look > SLURM_LOOK_SECONDS:
            last_look = now
            waits = _waits_in_queue(found)
            if waits and now - began > request["capacity_seconds"]:
                _abandon(request_id, name, found)
                raise Refused(Trouble.CAPACITY, f"no free node within {request['capacity_seconds']:.0f} s: {waits}")
    done.result()
    found = _record(name)
    if not found:
        raise Refused(Trouble.UNKNOWN, f"SkyPilot launched {name} and does not know it")
    return {**found, "seconds": time.monotonic() - began}


class _Done:
    """The outcome of a call in a thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except BaseException as error:  # raised again in the caller's thread
            self._error = error
        self._event.set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def _in_thread(work: Callable[[], Any]) -> _Done:
    done = _Done()
    threading.Thread(target=done.run, args=(work,), daemon=True).start()
    return done


def _abandon(request_id: Any, name: str, record: Mapping[str, Any]) -> None:
    """Cancel a create and terminate what it made; if that fails, settling the lease terminates it."""
    from sky.client import sdk

    with contextlib.suppress(Exception):
        sdk.get(sdk.api_cancel(request_id, silent=True))
    with contextlib.suppress(Exception):
        end({"cluster": name, "record": dict(record)}, lambda **_: None)


def _record(name: str) -> dict[str, Any]:
    """What another machine needs to find and terminate a cluster, from SkyPilot's database."""
    from sky import global_user_state

    try:
        handle: Any = global_user_state.get_handle_from_cluster_name(name)
        if handle is None:
            return {}
        provider = global_user_state.get_cluster_yaml_dict(handle.cluster_yaml).get("provider") or {}
    except Exception:  # another process writes it at this moment, or the server keeps it elsewhere
        return {}
    resources = handle.launched_resources
    found: dict[str, Any] = {
        "cluster": name,
        "name_on_cloud": handle.cluster_name_on_cloud,
        "provider": str(provider.get("module", "")).rsplit(".", 1)[-1] or str(resources.cloud).lower(),
        "provider_config": json.loads(json.dumps(provider, default=str)),
        "region": resources.region,
        "zone": resources.zone,
        "instance_type": resources.instance_type,
    }
    info = handle.cached_cluster_info
    if info is not None:
        by_ip = {node.internal_ip: node.instance_id for nodes in info.instances.values() for node in nodes}
        ips = [ips[0] for ips in handle.stable_internal_external_ips or ()]
        found["instances"] = [[by_ip.get(ip, ""), ip] for ip in ips]
    with contextlib.suppress(Exception):
        found["usd_per_hour"] = str(round(float(resources.get_cost(3600)), 6))
    return found


def _waits_in_queue(record: Mapping[str, Any]) -> str:
    """Why a Slurm job has no nodes yet; empty if it has them, or does not exist."""
    with contextlib.suppress(Exception):
        seen = _query(record)
        if seen and all(job["status"] == "INIT" for job in seen.values()):
            return next(iter(seen.values()))["reason"] or "the job is pending"
    return ""


# -- querying ---------------------------------------------------------------------------------------------


def query(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """The instances of a cluster at its provider: {instance: {status, reason}}."""
    healthy = _keep_server(tell)
    record = _with_config(request)
    if record.get("provider_config"):
        return {"instances": _query(record), "server": healthy, "record": record}
    return {"instances": _by_status(request["cluster"]), "server": healthy, "record": {}}


def _with_config(request: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the request, completed from SkyPilot's database and from Slurm's queues."""
    record = dict(request.get("record") or {})
    if record.get("provider_config"):
        return _localised(record)
    found = _record(request["cluster"])
    if found:
        return {**record, **found}
    for job in _slurm_jobs():
        if job["cluster"] == request["cluster"]:
            return {**record, **job}
    return record


def _query(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    from sky import provision

    seen = provision.query_instances(
        record["provider"],
        record["cluster"],
        record["name_on_cloud"],
        dict(record["provider_config"]),
        non_terminated_only=True,
    )
    return {
        str(instance): {"status": status.name, "reason": reason or ""}
        for instance, (status, reason) in seen.items()
        if status is not None
    }


def _by_status(name: str) -> dict[str, dict[str, str]]:
    """From SkyPilot's own refreshed status, where there is no record."""
    from sky.client import sdk
    from sky.utils import common

    found = sdk.get(sdk.status([name], refresh=common.StatusRefreshMode.FORCE))
    return {
        f"{cluster['name']}-{rank}": {"status": cluster["status"].name, "reason": ""}
        for cluster in found
        for rank in range(cluster["handle"].launched_nodes if cluster.get("handle") is not None else 1)
    }


def listed(_: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
    """Every cluster with our prefix: in SkyPilot's database, and in Slurm's queues whoever made it."""
    from sky import global_user_state

    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(Exception):
        for job in global_user_state.get_clusters():
            if job["name"].startswith(LEASE_PREFIX):
                record = _record(job["name"])
                if record.get("provider_config"):
                    found[record["name_on_cloud"]] = {**record, "started": job.get("launched_at")}
    for job in _slurm_jobs():
        found.setdefault(job["name_on_cloud"], job)
    problems = []
    clusters = []
    for record in found.values():
        try:
            instances = _query(record)
        except Exception as error:
            problems.append(f"{record['cluster']}: {type(error).__name__}: {error}"[:300])
            continue
        if instances:
            clusters.append({**record, "seen": sorted(instances)})
    return {"clusters": clusters, "problems": problems}


def _slurm_jobs() -> list[dict[str, Any]]:
    """Jobs with our prefix in the queues of every Slurm cluster that this machine can log in to."""
    found: list[dict[str, Any]] = []
    if not Path("~/.slurm/config").expanduser().exists():
        return found
    from sky.provision.slurm import instance as slurm_instance
    from sky.provision.slurm import utils as slurm_utils

    for cluster in slurm_utils.get_all_slurm_cluster_names():
        try:
            config = _slurm_config(cluster)
            client = slurm_instance._make_slurm_client(config)
            code, output, _ = client._run_slurm_cmd('squeue --me -h -o "%j|%P|%D|%V"')
        except Exception:  # a login node that does not answer hides only its own jobs
            continue
        for line in output.splitlines() if code == 0 else ():
            name, _, rest = line.strip().partition("|")
            if not name.startswith(LEASE_PREFIX):
                continue
            partition = rest.split("|")[0]
            found.append(
                {
                    "cluster": name_without_user(name),
                    "name_on_cloud": name,
                    "provider": "slurm",
                    "provider_config": {**config, "partition": partition},
                    "region": cluster,
                    "zone": partition,
                }
            )
    return found


def _slurm_config(cluster: str) -> dict[str, Any]:
    """SkyPilot's provider config of a Slurm cluster, from this machine's own ssh settings."""
    from sky.provision.slurm import utils as slurm_utils

    ssh = slurm_utils.get_slurm_ssh_config().lookup(cluster)
    return {
        "type": "external",
        "module": "sky.provision.slurm",
        "cluster": cluster,
        "partition": "",
        "provision_timeout": 60,
        "ssh": {
            "hostname": ssh["hostname"],
            "port": str(ssh.get("port", 22)),
            "user": ssh["user"],
            "private_key": slurm_utils.get_identity_file(ssh),
            "proxycommand": ssh.get("proxycommand"),
            "proxyjump": ssh.get("proxyjump"),
            "identities_only": slurm_utils.get_identities_only(ssh),
        },
    }


def _localised(record: dict[str, Any]) -> dict[str, Any]:
    """The record with this machine's own ssh settings for a Slurm login node, if another machine made it."""
    config = record["provider_config"]
    key = (config.get("ssh") or {}).get("private_key")
    if record.get("provider") != "slurm" or key is None or Path(key).expanduser().exists():
        return record
    with contextlib.suppress(Exception):
        return {**record, "provider_config": {**config, "ssh": _slurm_config(config["cluster"])["ssh"]}}
    return record


# -- terminating ----------------------------------------------------------------------------------------------


def end(request: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
    """Terminate a cluster and query until the provider shows no instance of it; quiet where there is none.

    SkyPilot's own `down` takes up to a minute, most of it after the nodes are gone: it follows without a wait.
    """
    name = request["cluster"]
    record = _with_config(request)
    if not record.get("provider_config"):
        trouble = _down(name, wait=True)
        if trouble:
            raise Refused(Trouble.UNKNOWN, trouble)
        return {"left": []}
    left = _query(record)
    if left:
        _terminate(record)
    for _ in range(VERIFY_TRIES):
        if not left:
            break
        left = _query(record)
        time.sleep(2.0 if left else 0.0)
    trouble = _down(name, wait=bool(left))
    return {"left": sorted(_query(record)) if left else [], "trouble": trouble}


def _down(name: str, *, wait: bool) -> str:
    """SkyPilot's own termination, which also cleans its database; the error, if it was waited for."""
    from sky.client import sdk

    if not _record(name):
        return ""
    if not wait:
        _in_thread(lambda: sdk.down(name))  # this may have to start its API server
        return ""
    try:
        sdk.get(sdk.down(name))
    except Exception as error:
        return "" if type(error).__name__ == "ClusterDoesNotExist" else f"{type(error).__name__}: {error}"
    return ""


def _terminate(record: Mapping[str, Any]) -> None:
    """With SkyPilot's functions for that cloud, without its database."""
    from sky import provision

    with contextlib.suppress(Exception):  # the query that follows shows what is left
        provision.terminate_instances(record["provider"], record["name_on_cloud"], dict(record["provider_config"]))


# -- SkyPilot itself -------------------------------------------------------------------------------------


_health = {"at": -HEALTH_SECONDS}


def _keep_server(tell: Tell) -> bool:
    """Start SkyPilot's API server if it died; in the background, since queries do not need it."""
    from sky.server import common as server_common

    if time.monotonic() - _health["at"] < HEALTH_SECONDS:
        return True
    _health["at"] = time.monotonic()
    url = urlsplit(server_common.get_server_url())
    try:
        with socket.create_connection((url.hostname or "127.0.0.1", url.port or 80), timeout=3.0):
            return True
    except OSError:
        tell(event="server", message="SkyPilot's API server does not answer; starting it")
    _in_thread(_start_server)
    return False


def _start_server() -> None:
    from sky.client import sdk

    with contextlib.suppress(Exception):
        sdk.api_start()


def check(_: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
    """Start the API server; the clouds that SkyPilot has credentials for."""
    from sky.client import sdk

    sdk.api_start()
    clouds = sdk.get(sdk.enabled_clouds())
    return {"enabled": sorted(str(cloud).lower() for cloud in clouds)}


def autodown(request: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
    """Reset SkyPilot's own timer."""
    from sky.client import sdk
    from sky.skylet import autostop_lib

    wait = autostop_lib.AutostopWaitFor.NONE
    sdk.get(sdk.autostop(request["cluster"], idle_minutes=request["minutes"], wait_for=wait, down=True))
    return {}


def costs(request: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
    """Dollars and node seconds in SkyPilot's own report on these clusters, terminated ones included."""
    from sky import core

    wanted = set(request["clusters"])
    found = [
        report
        for report in core.cost_report(days=request["days"], cluster_names=sorted(wanted))
        if report["name"] in wanted
    ]
    return {
        "costs": [
            {"cluster": report["name"], "usd": float(report["total_cost"]), "seconds": float(report["duration"] or 0)}
            for report in found
        ]
    }


CALLS: Mapping[str, Callable[[Mapping[str, Any], Tell], dict[str, Any]]] = {
    "launch": launch,
    "query": query,
    "list": listed,
    "end": end,
    "check": check,
    "autodown": autodown,
    "costs": costs,
}


def failure_from(error: BaseException) -> Failure:
    """The failure to report for an exception of SkyPilot."""
    if isinstance(error, Refused):
        return error.failure
    history = [f"{type(attempt).__name__}: {attempt}" for attempt in getattr(error, "failover_history", ())]
    return classify(type(error).__name__, str(error) or type(error).__name__, history)


def serve(lines: Iterator[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests one after the other until the input ends."""
    for line in lines:
        request = json.loads(line)
        try:
            result = CALLS[request["call"]](request, lambda **facts: say(facts))
        except BaseException as error:  # SkyPilot raises whatever its libraries raise; the process continues
            failure = failure_from(error)
            say({"failure": {"trouble": failure.trouble.value, "message": failure.message}})
        else:
            say({"result": result})


def main() -> None:
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    os.environ.setdefault("SKYPILOT_POD_MEMORY_GB_LIMIT", MEMORY_GB)
    os.environ.setdefault("SKYPILOT_POD_CPU_CORE_LIMIT", CPUS)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what SkyPilot prints is not a reply
    serve(iter(sys.stdin.readline, ""), lambda reply: print(json.dumps(reply), file=replies, flush=True))


if __name__ == "__main__":
    main()

"""What ends a node without us, cloud by cloud, as configuration: pure functions, each tested on what it returns.

`cost.market.providers` says which terminators a cloud has; here is how each is armed. At the create that is a part of
SkyPilot's task (`config`), on the node a `--terminator` of the guard. What must be armed after the create by the
provider's own interface is a `CloudSupport`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cost.market.providers import Armed, Provider, Terminator, TerminatorKind, provider
from orchestrator.backends.cloud_support import CloudSupport

SECONDS_PER_MINUTE = 60
AUTODOWN_SLACK_MINUTES = 5
"""SkyPilot's own timer stands so far behind what is paid for: it is never alone, and never the first."""
AT_CREATE = frozenset({"slurm", "kubernetes", "ssh"})
"""Clouds whose own time limit is a part of SkyPilot's task."""
NO_AUTOSTOP = frozenset({"slurm", "ssh", "kubernetes", "vast", "scp", "fluidstack"})
"""Clouds where SkyPilot cannot take a cluster down by itself, or where their own limit does it."""
SUDO_POWER_OFF = "command:sudo -n systemctl poweroff || sudo -n shutdown -P now || systemctl poweroff"


@dataclass(frozen=True, slots=True)
class NodeTerminators:
    """What the guard of a node is started with."""

    names: tuple[str, ...]
    notice: tuple[str, ...] = ()
    timer: str = ""


def task_config(cloud: str, seconds: float, *, capacity_seconds: float | None = None) -> dict[str, Any]:
    """`config` of SkyPilot's task: the provider's own limit `seconds` after the create, where it is set there.

    `capacity_seconds`: how long a node that is not to be had is waited for, where SkyPilot takes it from the task.
    """
    if cloud == "slurm":
        return {"slurm": {"sbatch_options": {"time": slurm_time(seconds)}}}
    if cloud in ("kubernetes", "ssh"):
        wait = {} if capacity_seconds is None else {"provision_timeout": math.ceil(capacity_seconds)}
        return {cloud: {"pod_config": {"spec": {"activeDeadlineSeconds": math.ceil(seconds)}}, **wait}}
    return {}


def slurm_time(seconds: float) -> str:
    """Slurm counts whole minutes and rounds up, which the kill latency includes; days-hours:minutes:seconds."""
    minutes = max(1, math.ceil(seconds / SECONDS_PER_MINUTE))
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def node_terminators(cloud: str) -> NodeTerminators:
    """In the order in which they fire: our processes, then what ends the bill from inside.

    Words in braces are replaced by the node's own environment; what cannot be replaced there is left out.
    """
    if cloud == "slurm":
        return NodeTerminators(("family", "command:scancel {SLURM_JOB_ID}", "provider-limit:slurm-time"))
    if cloud in ("kubernetes", "ssh"):
        return NodeTerminators(("family", "provider-limit:active-deadline", "command:kill 1"))
    if cloud == "aws":
        return NodeTerminators(("family", "terminate-ec2", SUDO_POWER_OFF), ("aws",))
    if cloud == "gcp":
        return NodeTerminators(("family", "terminate-gcp", SUDO_POWER_OFF), ("gcp",))
    if cloud == "azure":
        return NodeTerminators(("family", "terminate-azure", SUDO_POWER_OFF), ("azure",))
    if cloud == "runpod":
        return NodeTerminators(("family", "runpod"))
    if cloud == "vast":
        return NodeTerminators(("family", "vast"))
    return NodeTerminators(("family", SUDO_POWER_OFF))


def autodown_minutes(cloud: str, seconds: float) -> int | None:
    """SkyPilot's autodown as a lease; None where it has none."""
    if cloud in NO_AUTOSTOP:
        return None
    return math.ceil(seconds / SECONDS_PER_MINUTE) + AUTODOWN_SLACK_MINUTES


def armed_provider(profile: Provider, supports: Mapping[str, CloudSupport]) -> Provider:
    """The provider with only the terminators that this version arms, for `cost.market.providers.refusal`."""
    support = supports.get(profile.name)
    after_create = frozenset() if support is None else support.terminators

    def is_armed(terminator: Terminator) -> bool:
        if terminator.kind is not TerminatorKind.PROVIDER:
            return True
        if terminator.armed is Armed.AT_CREATE:
            return profile.name in AT_CREATE
        return terminator.name in after_create

    kept = tuple(terminator for terminator in profile.terminators if is_armed(terminator))
    return replace(profile, terminators=kept or provider("*").terminators)

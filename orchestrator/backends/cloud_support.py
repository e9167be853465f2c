"""Which clouds have an interface of their own beside SkyPilot here."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.backends.aws.support import AwsArm
from orchestrator.backends.gcp.support import GcpArm
from orchestrator.backends.sky.terminators import Arm


def arms() -> Mapping[str, Arm]:
    """By cloud, each new; nothing is asked before it is used."""
    return {"aws": AwsArm(), "gcp": GcpArm()}

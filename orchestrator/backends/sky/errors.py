"""Kinds of failures of SkyPilot, from the names of its exceptions and the messages of the clouds.

A lack of capacity is temporary, and the next offer is tried. Waiting does not help with a quota of zero, missing
credentials or a wrong setting: they are reported, and the offer is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Trouble(StrEnum):
    CAPACITY = "capacity"
    QUOTA = "quota"
    CREDENTIALS = "credentials"
    SETTING = "setting"
    SERVER = "server"
    """SkyPilot's own API server."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Failure:
    trouble: Trouble
    message: str


_QUOTA = re.compile(
    r"quota|VcpuLimitExceeded|MaxSpotInstanceCountExceeded|InstanceLimitExceeded|LimitExceeded|exceeded.{0,20}limit"
    r"|QOSMax|AssocMax|AssocGrp|QOSGrp",
    re.IGNORECASE,
)
_CREDENTIALS = re.compile(
    r"AuthFailure|UnauthorizedOperation|ExpiredToken|InvalidClientTokenId|SignatureDoesNotMatch|AccessDenied"
    r"|Unable to locate credentials|NoCredentials|invalid.{0,10}(api key|credential|token)"
    r"|credentials? (has|have|is|are)"
    r"|Permission denied \(publickey|not authorized|token.{0,20}expired|InvalidAuthenticationToken|401|403 Forbidden",
    re.IGNORECASE,
)
_SETTING = re.compile(
    r"InvalidParameter|InvalidAMI|VPCIdNotSpecified|NoDefaultVpc|InvalidSubnet|is not a valid|does not exist in"
    r"|Invalid (region|zone|instance)|not enabled|no cloud access|OptInRequired|PartitionTimeLimit"
    r"|Requested time limit",
    re.IGNORECASE,
)
_CAPACITY = re.compile(
    r"capacity|InsufficientInstance|SpotMaxPrice|ZONE_RESOURCE_POOL_EXHAUSTED|STOCKOUT|does not have enough resources"
    r"|no longer any instances available|unavailable|did not get nodes allocated|within \d+ seconds|timed? ?out"
    r"|sold out|not available|SkuNotAvailable|AllocationFailed|insufficient|no .{0,30}resources",
    re.IGNORECASE,
)
_SERVER_NAMES = frozenset(
    {"ApiServerConnectionError", "ServerTemporarilyUnavailableError", "RequestInterruptedError", "ConnectionError"}
)
_CREDENTIAL_NAMES = frozenset(
    {"NoCloudAccessError", "InvalidCloudCredentials", "CloudUserIdentityError", "ApiServerAuthenticationError"}
)
_SETTING_NAMES = frozenset(
    {"ResourcesMismatchError", "InvalidSkyPilotConfigError", "InvalidCloudConfigs", "NotSupportedError"}
)
LONGEST = 400


def classify(name: str, message: str, history: Sequence[str] = ()) -> Failure:
    """The kind of failure of an exception with that class name and text; `history`: errors of SkyPilot's attempts."""
    text = " ".join(" ".join([*history, message]).split())
    short = _plain(" ".join(history) or message)[:LONGEST]
    if name in _SERVER_NAMES:
        return Failure(Trouble.SERVER, short)
    if name in _CREDENTIAL_NAMES:
        return Failure(Trouble.CREDENTIALS, short)
    if name in _SETTING_NAMES:
        return Failure(Trouble.SETTING, short)
    for trouble, words in (
        (Trouble.QUOTA, _QUOTA),
        (Trouble.CREDENTIALS, _CREDENTIALS),
        (Trouble.SETTING, _SETTING),
        (Trouble.CAPACITY, _CAPACITY),
    ):
        if words.search(text):
            return Failure(trouble, short)
    if name == "ResourcesUnavailableError":
        return Failure(Trouble.CAPACITY, short)
    return Failure(Trouble.UNKNOWN, short)


def _plain(text: str) -> str:
    """The text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())

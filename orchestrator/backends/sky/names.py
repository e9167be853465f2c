"""Names of clusters: the lease's own where every cloud keeps it whole, else a short name with its owner.

GCP keeps 35 characters, of which SkyPilot takes 9 for the hash of its user: `LONGEST` are ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from cost.ledger.leases import LEASE_PREFIX

LONGEST = 26
USER_HASH = re.compile(r"-[0-9a-f]{8}$")
"""SkyPilot appends this to a name on the cloud: the hash of its user."""
_LEASE = re.compile(r"slm-([0-9a-f]+)-(.+)-(\d+)")
_SAFE = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


def cluster_name(lease_id: str) -> str:
    """The name of a lease's cluster; a cluster's name stays as it is, so that a listed one can be terminated too."""
    if len(lease_id) <= LONGEST and _SAFE.fullmatch(lease_id):
        return lease_id
    parts = _LEASE.fullmatch(lease_id)
    if parts is None:
        return f"{LEASE_PREFIX}{_digest(lease_id, 20)}"
    owner, run, attempt = parts.groups()
    return f"{LEASE_PREFIX}{owner[:6]}-{_digest(run, 6)}-{attempt}"[:LONGEST]


def name_without_user(name_on_cloud: str) -> str:
    """The cluster's name inside its name at the provider."""
    return USER_HASH.sub("", name_on_cloud)


def lease_names(lease_ids: Iterable[str]) -> dict[str, str]:
    """Lease ids by the names of their clusters."""
    return {cluster_name(lease_id): lease_id for lease_id in lease_ids}


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]

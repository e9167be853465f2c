"""Every backend where instances of ours may run, also of runs that the ledger no longer has.

A new backend is added to `every_backend`; listing and terminating need no run, no recipe and no plan.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec

from cost.errors import SlmError
from cost.ledger.accounts import LeaseAccount
from cost.ledger.database import DatabaseError
from cost.ledger.ledger import Ledger
from orchestrator.backends.aws.account import AwsAccount
from orchestrator.backends.aws.support import AwsInstances, AwsSupport
from orchestrator.backends.base import Backend
from orchestrator.backends.cloud_support import CloudSupport
from orchestrator.backends.gcp.support import GcpSupport
from orchestrator.backends.local.backend import LocalBackend
from orchestrator.backends.local.records import STATE_FILE
from orchestrator.backends.sky.backend import SkyBackend
from orchestrator.runs.status import open_runs
from orchestrator.settings import Home

MARKET_FOLDER = "market"
SKY_FOLDER = "sky"
"""In the folder of each run that was ever supervised here and rents through SkyPilot."""


def every_backend(home: Home) -> Sequence[Backend]:
    """One for each place; each lists and terminates our instances there."""
    return [*local_markets(home), *aws_accounts(home), *skypilot(home)]


def cloud_supports() -> Mapping[str, CloudSupport]:
    """By cloud, what its own interface does beside SkyPilot; each new, and no call is made before it is used."""
    return {"aws": AwsSupport(), "gcp": GcpSupport()}


def aws_accounts(home: Home) -> list[Backend]:
    """The AWS account that this machine has credentials for, whether or not SkyPilot knows it.

    While a lease there is unsettled it is listed even without credentials, so that the failure is reported.
    """
    account = AwsAccount()
    unsettled = [account for account in leases_on(home, "aws") if account.is_open]
    if find_spec("boto3") is None or not (unsettled or account.has_credentials()):
        return []
    return [
        AwsInstances(
            account,
            known_leases=lambda: [account.lease.lease_id for account in leases_on(home, "aws")],
            is_expected=lambda: bool(leases_on(home, "aws")),
        )
    ]


def leases_on(home: Home, cloud: str) -> list[LeaseAccount]:
    """Every lease that the ledger ever had there; none where it cannot be read, which `reconcile` reports."""
    if not home.database.exists():
        return []
    try:
        with open_runs(home) as runs:
            accounts = [
                account
                for run in runs.all()
                for account in Ledger(runs.db, run.run_id, fencing_token=run.fencing_token).accounts()
            ]
    except (SlmError, sqlite3.Error):
        return []
    return [account for account in accounts if account.lease.offer.cloud == cloud]


def local_markets(home: Home) -> list[Backend]:
    """The market of every run that ever had one in this home, whether or not the ledger knows the run."""
    folders = sorted(path.parent for path in (home.root / "runs").glob(f"*/{MARKET_FOLDER}/{STATE_FILE}"))
    return [
        LocalBackend(
            folder,
            folder.parent.name,
            store_uri=str(home.store_dir(folder.parent.name)),
            market="calm",  # the real market is in its own state; listing and terminating need only the folder
            time_scale=1.0,
            seed=0,
            offers=(),
        )
        for folder in folders
    ]


def skypilot(home: Home) -> list[Backend]:
    """SkyPilot and the queues of its Slurm clusters, where a run of this home rents there."""
    if not any((home.root / "runs").glob(f"*/{SKY_FOLDER}")) and not rents_through_skypilot(home):
        return []
    return [SkyBackend(home.root / SKY_FOLDER, None, known_leases=lambda: known_leases(home))]


def rents_through_skypilot(home: Home) -> bool:
    """Whether the ledger knows such a run: one that another machine began has no folder here yet."""
    with suppress(DatabaseError, sqlite3.Error):
        if home.database.exists():
            with open_runs(home) as runs:
                return any(run.options.backend == "sky" for run in runs.all())
    return False


def known_leases(home: Home) -> list[str]:
    """Every lease that was ever in the ledger; none from a ledger that cannot be read."""
    if not home.database.exists():
        return []
    with suppress(DatabaseError, sqlite3.Error), open_runs(home) as runs:
        return [
            account.lease.lease_id
            for run in runs.all()
            for account in Ledger(runs.db, run.run_id, fencing_token=run.fencing_token).accounts()
        ]
    return []

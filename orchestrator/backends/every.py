"""Every place where something of ours may live, also what no run row speaks of any more.

Whatever else can rent is added to `every_backend`; listing and ending need no run, no recipe and no plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.backends.base import Backend
from orchestrator.backends.local import LocalBackend
from orchestrator.market.books import STATE_FILE
from orchestrator.settings import Home

MARKET_FOLDER = "market"


def every_backend(home: Home) -> Sequence[Backend]:
    """One for each place; each lists and ends what is there."""
    return local_markets(home)


def local_markets(home: Home) -> list[Backend]:
    """The market of every run that ever had one below this home, whether or not the books know the run."""
    folders = sorted(path.parent for path in (home.root / "runs").glob(f"*/{MARKET_FOLDER}/{STATE_FILE}"))
    return [
        LocalBackend(
            folder,
            folder.parent.name,
            store_uri=str(home.store_dir(folder.parent.name)),
            market="calm",  # what is played is in the market's own state; listing and ending need only the folder
            time_scale=1.0,
            seed=0,
            offers=(),
        )
        for folder in folders
    ]

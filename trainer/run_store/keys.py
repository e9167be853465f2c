"""Keys of the run store that the trainer reads and writes; `tasks.run_store_keys` has all others.

Each key is spelled here or there, once (tests/tasks/test_run_store_keys.py looks for it elsewhere). A constant that
ends in `/` is the prefix of all keys of its kind. Torch-free.
"""

from __future__ import annotations

import re

PROGRESS = "progress/latest.json"
"""Where training stands: `trainer.metrics.Progress`, replaced about once a second."""
RESULT = "result.json"
"""How training ended, written once when its last step is done."""
METRICS = "metrics/"
CHECKPOINTS = "checkpoints/"
INCARNATIONS = "incarnations/"
MANIFEST = "manifest.json"
"""In the folder of a checkpoint, written last: what makes its parts a checkpoint."""

OLD_PREFIXES = ("books/", "epochs/")
"""Of the ledger and of incarnations in run stores of versions before these had their names."""

_INCARNATION = re.compile(r"incarnations/(\d+)\.json")
_METRICS_PART = re.compile(r"metrics/incarnation=(\d+)/")
_CHECKPOINT_FILE = re.compile(r"checkpoints/incarnation=(\d+)/step=(\d+)/(.+)")


def incarnation(number: int) -> str:
    """The start of one group of workers: `trainer.checkpoints.lineage.IncarnationStart`."""
    return f"{INCARNATIONS}{number}.json"


def incarnation_number(key: str) -> int | None:
    """Which incarnation starts with this record; None for another key."""
    found = _INCARNATION.fullmatch(key)
    return None if found is None else int(found[1])


def metrics_part(incarnation: int, part: int) -> str:
    """JSON lines, one for each step; the names of an incarnation's parts sort in their order."""
    return f"{METRICS}incarnation={incarnation}/part-{part:06d}.jsonl"


def incarnation_of_metrics(key: str) -> int | None:
    """Which incarnation wrote this part of the metrics; None for another key."""
    found = _METRICS_PART.match(key)
    return None if found is None else int(found[1])


def checkpoint_folder(incarnation: int, step: int) -> str:
    """Prefix of a checkpoint's parts and of its manifest."""
    return f"{CHECKPOINTS}incarnation={incarnation}/step={step}/"


def checkpoint_part(rank: int) -> str:
    """In the folder of a checkpoint: the bytes of one worker."""
    return f"part-{rank:05d}.bin"


def checkpoint_file(key: str) -> tuple[int, int, str] | None:
    """Incarnation, step and name of a file of a checkpoint; None for another key."""
    found = _CHECKPOINT_FILE.fullmatch(key)
    return None if found is None else (int(found[1]), int(found[2]), found[3])


def newest_checkpoint(incarnation: int) -> str:
    """The step that an incarnation saved last, for stores whose lists lag behind."""
    return f"{CHECKPOINTS}incarnation={incarnation}/newest.json"


def profile_trace(incarnation: int) -> str:
    """With --profile: three steps of rank 0."""
    return f"profile/incarnation={incarnation}/trace.json"

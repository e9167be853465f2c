"""Every key of a run store, and the exit codes of a node's command.

Whatever reads or writes a run store takes its keys from here (the trainer from `trainer.run_store.keys`, whose keys
are also those of this module). Two programs run before anything of ours is installed on a node and have copies: the
guard and `tasks/node/bootstrap.py`; tests/tasks/test_run_store_keys.py holds them to this module, and finds a key that
is spelled anywhere else. A constant that ends in `/` is the prefix of all keys of its kind. Torch-free.
"""

from __future__ import annotations

from trainer.run_store.keys import CHECKPOINTS as CHECKPOINTS
from trainer.run_store.keys import INCARNATIONS as INCARNATIONS
from trainer.run_store.keys import MANIFEST as MANIFEST
from trainer.run_store.keys import METRICS as METRICS
from trainer.run_store.keys import OLD_PREFIXES as OLD_PREFIXES
from trainer.run_store.keys import PROGRESS as PROGRESS
from trainer.run_store.keys import RESULT as RESULT
from trainer.run_store.keys import checkpoint_file as checkpoint_file
from trainer.run_store.keys import checkpoint_folder as checkpoint_folder
from trainer.run_store.keys import checkpoint_part as checkpoint_part
from trainer.run_store.keys import incarnation as incarnation
from trainer.run_store.keys import incarnation_number as incarnation_number
from trainer.run_store.keys import incarnation_of_metrics as incarnation_of_metrics
from trainer.run_store.keys import metrics_part as metrics_part
from trainer.run_store.keys import newest_checkpoint as newest_checkpoint
from trainer.run_store.keys import profile_trace as profile_trace

# -- exit codes of the command that the guard runs on a node; those of other ranks than 0 say little

EXIT_FINISHED = 0
"""Training is complete; of another rank: a notice took its node."""
EXIT_UNGUARDED = 3
"""The guard could arm no terminator, so it started nothing."""
EXIT_STOPPED = 10
"""Stopped as told, with a checkpoint."""
EXIT_BUG = 20
"""The training code failed in the same way twice at one step."""
EXIT_BROKEN = 30
"""The cluster broke under us; safe to start again."""
EXIT_NOTICE = 40
"""The cloud takes the first node, as announced; the last step is saved."""

# -- written by the supervisor

SPEC = "spec.json"
"""What this attempt is told: `tasks.spec.RunSpec`."""
GRANTS = "grants/"
LEDGER = "ledger/"
CLUSTERS = "clusters/"
STAGES = "stages/"
DATA = "data/"
DATA_LIST = "files.json"
"""In the folder of a prepared data set, written last: names and sizes of its files."""


def ledger_record(number: int) -> str:
    """One record of `cost.ledger.journal`; the names sort as text up to ten million."""
    return f"{LEDGER}{number:07d}.json"


def grant(lease_id: str, rank: int) -> str:
    """The answer to a node's newest request: how long it may live."""
    return f"{GRANTS}{lease_id}/{rank}.json"


def control(lease_id: str) -> str:
    """A command for the training loop: checkpoint or stop."""
    return f"control/{lease_id}.json"


def cluster(lease_id: str) -> str:
    """What another machine needs to find and end a cluster that SkyPilot created."""
    return f"{CLUSTERS}{lease_id}.json"


def stage_folder(name: str) -> str:
    """Of one stage, without the last `/`: its manifest and, but for the first training, all that it writes."""
    return f"{STAGES}{name}"


def stage_manifest(name: str) -> str:
    """What a stage has made; it is complete when this is there: `tasks.stages.manifest`."""
    return f"{stage_folder(name)}/manifest.json"


def data_folder(name: str) -> str:
    """Where a prepared data set lies, without the last `/`."""
    return f"{DATA}{name}"


def data_file(folder: str, file: str) -> str:
    """One file of a prepared data set; DATA_LIST is one too."""
    return f"{folder}/{file}"


# -- written by nodes

FAILURES = "failures/"
LOGS = "logs/"
PHASES = "phases/"


def guard_folders(lease_id: str) -> str:
    """Prefix of what the guards of a lease write."""
    return f"guard/{lease_id}/"


def guard_folder(lease_id: str, rank: int) -> str:
    """Of one node's guard, without the last `/`."""
    return f"{guard_folders(lease_id)}{rank}"


def guard_request(lease_id: str, rank: int) -> str:
    """A numbered request with the node's own boot-time clock; says also how the node's command is."""
    return f"{guard_folder(lease_id, rank)}/request.json"


def guard_log(lease_id: str, rank: int) -> str:
    """What the guard did, as JSON lines; on S3 it is a folder of numbered parts, `guard_log_part`."""
    return f"{guard_folder(lease_id, rank)}/log.jsonl"


def guard_log_part(lease_id: str, rank: int, number: int) -> str:
    """Objects on S3 cannot grow, so each piece of the log is one of its own."""
    return f"{guard_folder(lease_id, rank)}/log/{number:015d}.jsonl"


def node_log(lease_id: str, rank: int) -> str:
    """What the node's command printed."""
    return f"{LOGS}{lease_id}-{rank}.log"


def set_up(lease_id: str, rank: int) -> str:
    """How long a rented node took before its first process of ours."""
    return f"setup/{lease_id}/{rank}.json"


def failure(number: int) -> str:
    """One failure of the training code."""
    return f"{FAILURES}{number:04d}.json"


def phases(lease_id: str, number: int) -> str:
    """What one start of the workers took, part by part."""
    return f"{PHASES}{lease_id}-{number}.json"


def compiled(digest: str) -> str:
    """What torch.compile built, by torch version and kind of machine."""
    return f"compile/{digest}.tar"

"""Where this installation keeps things, and under which name it rents.

Everything lies under one folder, `SLM_HOME` (by default `~/.slm`), which only its owner can read: it holds the ledger
and the addresses of nodes. Nothing is created before a command that must write asks for it.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cost.errors import SlmError, UserError

DISTRIBUTION = "slm-spot"
"""The name in pyproject.toml: `slm` on the public index belongs to somebody else."""
HOME_VARIABLE = "SLM_HOME"
DEFAULT_HOME = "~/.slm"
OWNER_BYTES = 3
"""Six hex digits: short enough for cluster names, and two installations in one account rarely meet."""

_OWNER = re.compile(rf"[0-9a-f]{{{2 * OWNER_BYTES}}}")


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one installation. Paths only; `create` and `owner_id` touch the disk."""

    root: Path

    @property
    def database(self) -> Path:
        """Runs, leases and the ledger."""
        return self.root / "slm.db"

    @property
    def data_root(self) -> Path:
        """Prepared data sets, one folder per fingerprint."""
        return self.root / "data"

    @property
    def offers(self) -> Path:
        """Prices read from SkyPilot's catalogs."""
        return self.root / "offers.json"

    @property
    def offers_attempt(self) -> Path:
        """Touched when a refresh of the prices starts by itself."""
        return self.root / "offers.attempt"

    @property
    def offers_log(self) -> Path:
        """What such a refresh printed."""
        return self.root / "offers.log"

    @property
    def processor(self) -> Path:
        """How fast this machine's processor was timed to be."""
        return self.root / "processor.json"

    @property
    def starts(self) -> Path:
        """How long rented nodes took to be set up."""
        return self.root / "starts.jsonl"

    def run_dir(self, run_id: str) -> Path:
        """What only this machine needs of a run: its supervisor's log and lock."""
        return self.root / "runs" / run_id

    def store_dir(self, run_id: str) -> Path:
        """The run store of a local run."""
        return self.root / "store" / run_id

    def supervisor_log(self, run_id: str) -> Path:
        """What a supervisor in the background prints."""
        return self.run_dir(run_id) / "supervisor.log"

    def create(self) -> Home:
        """Make the folder, readable by its owner only; quiet if it is there.

        Raises:
            UserError: The path cannot be made or written to.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{HOME_VARIABLE} {self.root} cannot be made ({error.strerror}); "
                f"set {HOME_VARIABLE} to a folder that can be written to."
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(
                f"{HOME_VARIABLE} {self.root} cannot be written to; change its permissions, "
                f"or set {HOME_VARIABLE} to a folder of your own."
            )
        return self

    def owner_id(self) -> str:
        """The name by which our instances are told from others', drawn once and then kept.

        Raises:
            SlmError: The file that keeps it holds something else.
        """
        path = self.create().root / "owner"
        if not path.exists():
            _create_once(path, secrets.token_hex(OWNER_BYTES))
        owner = path.read_text(encoding="utf-8").strip()
        if not _OWNER.fullmatch(owner):
            raise SlmError(
                f"{path} holds {owner[:20]!r}, not {2 * OWNER_BYTES} hex digits; write back the digits that the "
                "names of your clusters carry (slm-DIGITS-...), or delete the file if nothing is rented."
            )
        return owner


def home_from(environ: Mapping[str, str]) -> Home:
    """The home that the environment names, as an absolute path; creates nothing."""
    return Home(Path(environ.get(HOME_VARIABLE) or DEFAULT_HOME).expanduser().absolute())


def _create_once(path: Path, text: str) -> None:
    """Of many processes that do this at once, one file wins, and nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.write_text(text + "\n", encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()

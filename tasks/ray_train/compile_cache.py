"""What torch.compile has built, kept in the run store: a node that comes later does not build it again.

The whole folder is kept, not `torch.compiler.save_cache_artifacts`: on a CPU that left out the compiled kernels, and of
123 s the next start still took 67, with the folder 8 (torch 2.13, 2 cores that others used too). The key names all that
the kernels depend on and that torch's own keys inside cannot know of the machine; torch checks the rest itself.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import tarfile
from pathlib import Path

from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreError, StoreKeyMissing

FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_BYTES = 512 * 2**20
"""More than this is not kept: fetching it would cost more than it saves."""


def cache_key() -> str:
    """The key of what this torch built on this kind of machine."""
    import torch

    facts = [torch.__version__, platform.machine(), platform.python_version(), str(torch.version.cuda)]
    if torch.cuda.is_available():
        facts += [torch.cuda.get_device_name(), str(torch.cuda.get_device_capability())]
    else:
        facts.append(torch.backends.cpu.get_cpu_capability())
    return keys.compiled(hashlib.sha256(repr(facts).encode()).hexdigest()[:16])


class CompileCache:
    """One worker's folder of compiled code, which torch is told to use, and its copy in the run store."""

    def __init__(self, store: Store, folder: Path) -> None:
        """Bring what an earlier start has built, unless this node has it already."""
        self._store = store
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[FOLDER_VARIABLE] = str(folder)
        if not self._files():
            self._unpack()
        self._before = self._files()

    @property
    def is_warm(self) -> bool:
        """Whether something was there at the start."""
        return bool(self._before)

    def keep(self) -> int:
        """Store the folder if something was built; the bytes stored. Not worth a training run if it fails."""
        files = self._files()
        try:
            if files <= self._before or sum((self._folder / name).stat().st_size for name in files) > MAX_BYTES:
                return 0
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                for name in sorted(files):
                    archive.add(self._folder / name, arcname=name, recursive=False)
            self._store.write(cache_key(), buffer.getvalue())
        except (StoreError, OSError):
            return 0
        return len(buffer.getvalue())

    def _files(self) -> set[str]:
        found = (path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path.relative_to(self._folder).as_posix() for path in found}

    def _unpack(self) -> None:
        try:
            content = self._store.read(cache_key())
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(self._folder, filter="data")
        except (StoreKeyMissing, StoreError, tarfile.TarError, OSError):
            return  # none yet, or not one: it is built again

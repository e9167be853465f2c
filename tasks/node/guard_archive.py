"""The guard as one file: a zipapp of the package `tasks.guard`, which any python3 >= 3.8 runs by itself.

It is made from the installed sources wherever a node is started. The same sources give the same bytes: names are
sorted, times are fixed, nothing is compressed (compressed bytes differ between versions of zlib).
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import tasks.guard

GUARD_ARCHIVE = "guard.pyz"
"""The archive's usual file name."""
PACKAGE = "guard"
"""What the package `tasks.guard` is called in the archive."""
MAIN = f"import sys\n\nfrom {PACKAGE}.command_line import main\n\nsys.exit(main(sys.argv[1:]))\n"
EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def guard_archive() -> bytes:
    """The zipapp: a `__main__.py` and the package."""
    sources = sorted(Path(tasks.guard.__file__).parent.glob("*.py"))
    members = {"__main__.py": MAIN.encode(), **{f"{PACKAGE}/{path.name}": path.read_bytes() for path in sources}}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, source in members.items():
            archive.writestr(zipfile.ZipInfo(name, EARLIEST_ZIP_TIME), source)
    return content.getvalue()


def write_guard_archive(folder: Path) -> Path:
    """Write the archive into a folder; raises OSError."""
    path = folder / GUARD_ARCHIVE
    unfinished = folder / f".{GUARD_ARCHIVE}.{os.getpid()}"
    unfinished.write_bytes(guard_archive())
    unfinished.replace(path)
    return path

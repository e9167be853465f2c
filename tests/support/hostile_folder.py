"""A working folder with files that carry the names of our packages; importing one of them fails loudly."""

from __future__ import annotations

from pathlib import Path

HOSTILE_FILES = ("tasks.py", "trainer.py", "cost.py", "orchestrator/__init__.py")
SAID = "imported from the working folder"


def write_hostile_modules(folder: Path) -> Path:
    """The same folder, with a file for each of our names."""
    for name in HOSTILE_FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit({f'{name} was {SAID}'!r})\n", encoding="utf-8")
    return folder

"""Prepared data on their way through the run store: the supervisor brings them there once, each node fetches them.

Invariant: the list of files is written last, and a node's copy appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cost.errors import SlmError
from tasks import run_store_keys as keys
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import Writer, unwrap, wrap

PARALLEL = 8


class SetUpError(SlmError):
    """The node cannot begin; the message says what is missing."""


def offer_data(store: Store, data_dir: Path) -> str:
    """Bring a prepared data set to the run store, once; what nodes are told instead of a folder."""
    folder = keys.data_folder(data_dir.name)
    listed = keys.data_file(folder, keys.DATA_LIST)
    files = {str(path.relative_to(data_dir)): path.stat().st_size for path in sorted(data_dir.rglob("*"))}
    files = {file: size for file, size in files.items() if (data_dir / file).is_file() and not _hidden(file)}
    listing = wrap({"files": files}, Writer.SUPERVISOR)
    with contextlib.suppress(StoreKeyMissing):
        if store.read(listed) == listing:
            return folder
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda file: store.upload(keys.data_file(folder, file), data_dir / file), files))
    store.write(listed, listing)
    return folder


def fetch_data(store: Store, place: str, cache: Path) -> Path:
    """The data set on this node's disk: brought once, and kept for the next attempt.

    Raises:
        SetUpError: It is not in the run store as a whole.
    """
    if not place.startswith(keys.DATA):
        return Path(place)
    target = cache / place
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        try:
            listed = keys.data_file(place, keys.DATA_LIST)
            files: Mapping[str, int] = unwrap(store.read(listed), listed)["files"]
            half = target.with_name(f".{target.name}.half")
            shutil.rmtree(half, ignore_errors=True)
            for folder in {(half / file).parent for file in files}:
                folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(lambda file: store.download(keys.data_file(place, file), half / file), files))
        except StoreKeyMissing as error:
            raise SetUpError(f"the prepared data are not whole in the run store ({error}); launch again.") from error
        wrong = [file for file, size in files.items() if (half / file).stat().st_size != size]
        if wrong:
            raise SetUpError(f"{wrong[0]} of the prepared data arrived with another size; launch again.")
        half.replace(target)
    return target


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hidden(file: str) -> bool:
    return any(part.startswith(".") for part in file.split("/"))

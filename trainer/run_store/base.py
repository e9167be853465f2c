"""The run store: named byte strings that outlive every node. This module is torch-free.

Invariants of every store: a key holds either all of one write or nothing new, whatever was killed when;
`create` succeeds for exactly one caller; `list` never shows half-written data; a store that vanished is an error
and is never quietly made anew, since an empty store would look like a run that has not begun.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cost.errors import SlmError, UserError

TEMP_FOLDER = ".tmp"
STALE_TEMP_SECONDS = 900.0
"""A temporary file that nobody has written to for this long belongs to a process that was killed."""
RENAME_ATTEMPTS = 10
"""How often a write makes its folder again when a concurrent delete took it away as empty."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)
"""What a file system says that makes no hard links, as some on USB sticks and some mounted over a network."""
UNCONDITIONAL = "conditional_writes=no"
"""In the query of a store's URI: `create` looks and then writes, so one process at a time may use it."""

Bytes = bytes | bytearray | memoryview


class StoreKeyMissing(KeyError):
    """Nothing is stored under this key."""

    def __init__(self, key: str, uri: str) -> None:
        super().__init__(key)
        self.key = key
        self.uri = uri

    def __str__(self) -> str:
        return f"no key {self.key!r} in {self.uri}"


class StoreError(SlmError, OSError):
    """The store itself fails: vanished, full, not allowed. The message names the path and the way out."""


class Store(Protocol):
    """Keys are relative paths with `/`; no part of one is empty or begins with a dot."""

    @property
    def uri(self) -> str: ...

    def read(self, key: str) -> bytes:
        """All bytes of `key`; raises StoreKeyMissing when there is no such key."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Replace `key` by `data`, durable on return; a reader sees the old bytes or the new ones."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` only if `key` is free: True for the one caller who made it, False for all others."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Every key that starts with this string, sorted as text."""
        ...

    def delete(self, key: str) -> None:
        """Forget `key`; quiet when there is none."""
        ...

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        """So many bytes from `offset` on, fewer where the value ends before; raises StoreKeyMissing."""
        ...

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        """`write` of all pieces as one value, without joining them in memory; of any size."""
        ...

    def upload(self, key: str, source: Path) -> None:
        """`write` for a file of any size."""
        ...

    def download(self, key: str, target: Path) -> None:
        """`read` into a file, which appears whole or not at all."""
        ...


def open_store(uri_or_path: str, *, create: bool = True) -> Store:
    """The store at `file:///absolute/path` or at a plain path; `tasks.stores.opening.open_store` knows others too."""
    parts = urlsplit(uri_or_path)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri_or_path} names the host {parts.netloc!r}; write file:///absolute/path.")
        conditional = not is_unconditional(parts.query)
        return DirectoryStore(Path(unquote(parts.path)), create=create, conditional=conditional)
    if "://" in uri_or_path:
        raise UserError(f"no run store can be opened at {uri_or_path}; give a folder or file:///absolute/path.")
    return DirectoryStore(Path(uri_or_path), create=create)


def is_unconditional(query: str) -> bool:
    """Whether the query of a store's URI says that its creates are not conditional."""
    name, value = UNCONDITIONAL.split("=")
    return parse_qs(query).get(name) == [value]


def scoped(store: Store, prefix: str) -> Store:
    """A view of `store` in which every key lies under `prefix`."""
    return _ScopedStore(store, checked_key(prefix))


def checked_key(key: str) -> str:
    """`key` itself; raises ValueError for one that could leave the store or meet its own files."""
    if not key or "\\" in key or "\0" in key or any(not part or part.startswith(".") for part in key.split("/")):
        raise ValueError(f"{key!r} is no store key: parts joined by '/', none empty, none beginning with '.'")
    return key


class DirectoryStore:
    """A folder as a store: fsync before rename for durability, a hard link as the conditional create."""

    def __init__(self, root: Path, *, create: bool = True, conditional: bool = True) -> None:
        self.root = root.absolute()
        self.conditional = conditional
        self.uri = "file://" + quote(str(self.root)) + ("" if conditional else f"?{UNCONDITIONAL}")
        self._swept = False
        if create:
            with self._told("open", ""):
                self.root.mkdir(parents=True, exist_ok=True)
        self._check_root()

    def read(self, key: str) -> bytes:
        with self._told("read", key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        with self._told("read", key), self._path(key).open("rb", buffering=0) as file:
            file.seek(offset)
            pieces = []
            while num_bytes > 0 and (piece := file.read(num_bytes)):  # one read gives at most 2 GiB
                pieces.append(piece)
                num_bytes -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, key: str, data: bytes) -> None:
        with self._told("write", key):
            self._put(key, lambda temp: _write_durably(temp, data), os.replace)

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        with self._told("write", key):
            self._put(key, lambda temp: _write_durably(temp, *pieces), os.replace)

    def create(self, key: str, data: bytes) -> bool:
        with self._told("create", key):
            # A cheap look first: most losers of the race are late ones and need no temporary file.
            if self._path(key).exists():
                return False
            return self._put(key, lambda temp: _write_durably(temp, data), _link if self.conditional else os.replace)

    def list(self, prefix: str = "") -> list[str]:
        folder = self.root.joinpath(*prefix.split("/")[:-1])
        keys = []
        with self._told("list", prefix):
            for parent, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                place = Path(parent).relative_to(self.root)
                keys += [(place / name).as_posix() for name in files if not name.startswith(".")]
            self._check_root()
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._told("delete", key):
            try:
                path.unlink(missing_ok=True)
            except NotADirectoryError:
                return
            self._check_root()
            for parent in path.parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except OSError:  # not empty, or already gone: folders are no part of the contract
                    break

    def upload(self, key: str, source: Path) -> None:
        if not source.is_file():
            raise FileNotFoundError(errno.ENOENT, "nothing to upload", str(source))
        with self._told("upload", key):
            self._put(key, lambda temp: _copy_durably(source, temp), os.replace)

    def download(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with self._told("read", key):
                shutil.copyfile(self._path(key), partial)
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*checked_key(key).split("/"))

    def _put(self, key: str, fill: Callable[[Path], None], publish: Callable[[Path, Path], bool | None]) -> bool:
        """Fill a temporary file, then `publish` it under `key`; False when publish says so."""
        path = self._path(key)
        temp = self._temp()
        try:
            fill(temp)
            for attempt in range(RENAME_ATTEMPTS):
                try:
                    self._make_folders(path.parent)
                    published = publish(temp, path)
                    break
                except FileNotFoundError:
                    if attempt + 1 == RENAME_ATTEMPTS:
                        raise
            if published is not False:
                with suppress(FileNotFoundError):  # another process may have deleted the key already
                    _sync_folder(path.parent)
            return published is not False
        finally:
            with suppress(OSError):
                temp.unlink()

    def _temp(self) -> Path:
        folder = self.root / TEMP_FOLDER
        self._make_folders(folder)
        if not self._swept:
            self._swept = True
            _sweep(folder)
        return folder / f"{os.getpid()}-{secrets.token_hex(8)}"

    def _make_folders(self, folder: Path) -> None:
        """Make what is missing below the root, never the root itself."""
        current = self.root
        for part in folder.relative_to(self.root).parts:
            parent, current = current, current / part
            try:
                current.mkdir()
            except FileExistsError:
                continue
            _sync_folder(parent)

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise StoreError(
                f"the run store {self.root} is gone; mount it or bring it back and run the command again "
                "(it is not created anew, since an empty store would lose the run)."
            )

    @contextmanager
    def _told(self, action: str, key: str) -> Iterator[None]:
        """Turn what the operating system says into a missing key or a StoreError."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            if action != "open":
                self._check_root()
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
            if action == "read" and missing:
                raise StoreKeyMissing(key, self.uri) from error
            raise StoreError(self._message(action, key, error)) from error

    def _message(self, action: str, key: str, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_mib = 0.0
            with suppress(OSError):
                free_mib = shutil.disk_usage(self.root).free / 2**20
            return (
                f"cannot {action} {key} in the run store {self.root}: {error.strerror}, {free_mib:.0f} MiB "
                "free; free space there and run the command again, all that was stored before is intact."
            )
        what = f"{action} {key} in" if key else action
        if action == "create" and error.errno in NO_LINKS:
            return (
                f"the run store {self.root} has no conditional writes (its file system makes no hard links: "
                f"{error.strerror}); use another folder, or add --single-supervisor."
            )
        return (
            f"cannot {what} the run store {self.root}: {error.strerror or error}; "
            "make it a folder that this user may write to and run the command again."
        )


class _ScopedStore:
    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix + "/"
        place, mark, query = store.uri.partition("?")
        self.uri = f"{place}/{quote(prefix)}{mark}{query}"

    def read(self, key: str) -> bytes:
        return self._store.read(self._prefix + key)

    def write(self, key: str, data: bytes) -> None:
        self._store.write(self._prefix + key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self._store.create(self._prefix + key, data)

    def list(self, prefix: str = "") -> list[str]:
        return [key.removeprefix(self._prefix) for key in self._store.list(self._prefix + prefix)]

    def delete(self, key: str) -> None:
        self._store.delete(self._prefix + key)

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        return self._store.read_range(self._prefix + key, offset, num_bytes)

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        self._store.write_pieces(self._prefix + key, pieces)

    def upload(self, key: str, source: Path) -> None:
        self._store.upload(self._prefix + key, source)

    def download(self, key: str, target: Path) -> None:
        self._store.download(self._prefix + key, target)


def _link(temp: Path, path: Path) -> bool:
    try:
        os.link(temp, path)
    except FileExistsError:
        # A network file system may repeat a link whose reply was lost: two names then say that it was ours.
        return temp.stat().st_nlink == 2
    return True


def _write_durably(path: Path, *pieces: Bytes) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _copy_durably(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make names durable. Where a file system refuses that, the operating system decides when."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Drop what killed processes left behind."""
    oldest = time.time() - STALE_TEMP_SECONDS
    for leftover in folder.iterdir():
        with suppress(OSError):
            if leftover.stat().st_mtime < oldest:
                leftover.unlink()

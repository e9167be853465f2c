"""The contract of every run store, and what a folder as a store adds to it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cost.errors import SlmError, UserError
from tests.support.store_contract import ConditionalStoreContract, Factory, StoreContract
from trainer.run_store import base as store_module
from trainer.run_store.base import DirectoryStore, Store, StoreError, open_store, scoped

FACTORIES: dict[str, Callable[[Path], Store]] = {
    "directory": DirectoryStore,
    "uri": lambda folder: open_store(folder.as_uri()),
    "scoped": lambda folder: scoped(DirectoryStore(folder), "runs/one"),
}


class TestDirectory(ConditionalStoreContract):
    @pytest.fixture(params=sorted(FACTORIES))
    def factory(self, request: pytest.FixtureRequest, tmp_path: Path) -> Factory:
        return lambda: FACTORIES[request.param](tmp_path / "store")


class TestDirectoryWithoutConditionalWrites(StoreContract):
    @pytest.fixture
    def factory(self, tmp_path: Path) -> Factory:
        return lambda: open_store(f"{(tmp_path / 'store').as_uri()}?conditional_writes=no")


# --- processes that race or die ---

CREATOR = """
import sys
from trainer.run_store.base import open_store, scoped
store = scoped(open_store(sys.argv[1]), "race")
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.readline()
for n in range(100):
    if store.create(f"{n}", sys.argv[2].encode()):
        sys.stdout.write(f"{n}\\n")
"""


def test_exactly_one_of_racing_processes_creates_each_key(tmp_path: Path) -> None:
    uri = DirectoryStore(tmp_path / "store").uri
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, uri, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    won = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for number, racer in enumerate(racers):
        output, _ = racer.communicate(timeout=60)
        won += [(key, str(number)) for key in output.split()]
    assert sorted(int(key) for key, _ in won) == list(range(100))
    store = scoped(open_store(uri), "race")
    assert all(store.read(key).decode() == winner for key, winner in won)


WRITER = """
import sys
from pathlib import Path
from trainer.run_store.base import open_store
store = open_store(sys.argv[1])
files = [Path(sys.argv[2]) / name for name in ("a", "b")]
sys.stdout.write("ready\\n"); sys.stdout.flush()
for n in range(1_000_000):
    store.write("written", files[n % 2].read_bytes())
    store.upload("uploaded", files[n % 2])
    store.create(f"created/{n:06d}", files[n % 2].read_bytes())
"""


def test_a_writer_killed_at_any_moment_leaves_old_or_new_and_nothing_between(tmp_path: Path) -> None:
    size = 400_000
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * size)
    whole = {b"a" * size, b"b" * size}
    rng = random.Random(7)
    for kill in range(12):
        store = DirectoryStore(tmp_path / f"store{kill}")
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.uri, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.005, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        writer.stdout.close()
        keys = store.list()
        assert set(keys) - {"written", "uploaded"} == {key for key in keys if key.startswith("created/")}
        assert all(store.read(key) in whole for key in keys)
        shutil.rmtree(store.root)


# --- a folder as a store ---


def every_operation(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    source = folder / "source"
    source.write_bytes(b"x")
    return {
        "read": lambda: store.read("k"),
        "write": lambda: store.write("a/k", b""),
        "create": lambda: store.create("k2", b""),
        "list": lambda: store.list("a/"),
        "delete": lambda: store.delete("k"),
        "upload": lambda: store.upload("a/k", source),
        "download": lambda: store.download("k", folder / "target"),
    }


@pytest.mark.parametrize("operation", ["read", "write", "create", "list", "delete", "upload", "download"])
def test_a_vanished_root_is_an_error_and_is_not_made_anew(tmp_path: Path, operation: str) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.write("k", b"1")
    call = every_operation(store, tmp_path)[operation]
    shutil.rmtree(store.root)
    with pytest.raises(StoreError, match=f"{store.root} is gone; mount it or bring it back"):
        call()
    assert not store.root.exists()


def test_opening_without_create_wants_an_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is gone"):
        open_store(str(tmp_path / "absent"), create=False)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("operation", ["write", "create", "upload"])
def test_a_full_disk_names_the_folder_the_space_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.write("a/k", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        message = rf"cannot {operation} .* {store.root}: No space left on device, \d+ MiB free; free space there"
        with pytest.raises(StoreError, match=message) as raised:
            every_operation(store, tmp_path)[operation]()
    assert isinstance(raised.value, SlmError)
    assert isinstance(raised.value, OSError)
    assert store.read("a/k") == b"old"
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_file_system_without_hard_links_is_said_to_have_no_conditional_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    store = DirectoryStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refuse)
        message = r"has no conditional writes \(its file system makes no hard links: .*\); use another folder, or add"
        with pytest.raises(StoreError, match=message):
            store.create("k", b"1")
        single = DirectoryStore(tmp_path, conditional=False)
        assert (single.create("k", b"1"), single.create("k", b"2"), single.read("k")) == (True, False, b"1")
    assert open_store(single.uri, create=False).uri == single.uri


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot open the run store .*/file: File exists; make it a folder"):
        open_store(str(tmp_path / "file"))


@pytest.mark.parametrize("uri", ["s3://bucket/run", "ftp://host/x"])
def test_an_unknown_kind_of_store_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=f"no run store can be opened at {uri}; give a folder"):
        open_store(uri)


def test_a_file_uri_with_a_host_is_refused() -> None:
    with pytest.raises(UserError, match="names the host 'home'; write file:///absolute/path"):
        open_store("file://home/me")


def test_a_path_with_odd_characters_survives_the_uri(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "a b#c%20?d")
    store.write("k", b"1")
    assert open_store(store.uri, create=False).read("k") == b"1"


def test_what_killed_processes_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    DirectoryStore(tmp_path).write("k", b"1")
    old, fresh = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "fresh"
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    long_ago = time.time() - store_module.STALE_TEMP_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    store = DirectoryStore(tmp_path)
    store.write("k", b"2")
    assert (old.exists(), fresh.exists()) == (False, True)
    assert store.list() == ["k"]


def test_a_repeated_link_whose_reply_was_lost_still_counts_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    store = DirectoryStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", link_twice)
        assert store.create("k", b"mine")
    assert store.read("k") == b"mine"


def test_writes_and_deletes_that_share_a_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    deleter = """
import sys
from trainer.run_store.base import open_store
store = open_store(sys.argv[1])
sys.stdout.write("ready\\n"); sys.stdout.flush()
while True:
    store.write("deep/er/gone", b"")
    store.delete("deep/er/gone")
"""
    store = DirectoryStore(tmp_path / "store")
    process = subprocess.Popen([sys.executable, "-c", deleter, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        for number in range(200):
            store.write("deep/er/kept", str(number).encode())
            assert store.read("deep/er/kept") == str(number).encode()
            store.delete("deep/er/kept")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()

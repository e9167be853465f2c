"""Compiled code outlives the node that built it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.ray_train.compile_cache import FOLDER_VARIABLE, CompileCache, cache_key
from trainer.run_store.base import DirectoryStore


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, "")


def build(folder: Path, name: str, content: bytes) -> None:
    """What the compiler does."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def test_what_one_node_built_the_next_one_finds(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    first = CompileCache(store, tmp_path / "one")
    assert os.environ[FOLDER_VARIABLE] == str(tmp_path / "one")
    assert not first.is_warm
    build(tmp_path / "one", "ab/kernel.so", b"machine code")
    build(tmp_path / "one", "ab/kernel.lock", b"")
    assert first.keep() > 0
    second = CompileCache(store, tmp_path / "two")
    assert second.is_warm
    assert (tmp_path / "two" / "ab" / "kernel.so").read_bytes() == b"machine code"
    assert not (tmp_path / "two" / "ab" / "kernel.lock").exists()


def test_only_what_is_new_is_stored_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    first = CompileCache(store, tmp_path / "one")
    build(tmp_path / "one", "a.so", b"a")
    first.keep()
    second = CompileCache(store, tmp_path / "two")
    assert second.keep() == 0
    build(tmp_path / "two", "b.so", b"for another number of workers")
    assert second.keep() > 0
    CompileCache(store, tmp_path / "three")
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == ["a.so", "b.so"]


def test_a_node_that_has_built_already_keeps_its_own(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    build(tmp_path / "one", "a.so", b"mine")
    assert CompileCache(store, tmp_path / "one").is_warm


def test_a_damaged_copy_is_built_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.write(cache_key(), b"no archive")
    cache = CompileCache(store, tmp_path / "one")
    assert not cache.is_warm
    build(tmp_path / "one", "a.so", b"a")
    assert cache.keep() > 0
    assert CompileCache(store, tmp_path / "two").is_warm


def test_an_archive_that_reaches_outside_its_folder_is_not_unpacked(tmp_path: Path) -> None:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("../outside.so")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    store = DirectoryStore(tmp_path / "store")
    store.write(cache_key(), buffer.getvalue())
    assert not CompileCache(store, tmp_path / "inner" / "one").is_warm
    assert not (tmp_path / "inner" / "outside.so").exists()


def test_a_store_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    cache = CompileCache(store, tmp_path / "one")
    build(tmp_path / "one", "a.so", b"a")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert cache.keep() == 0

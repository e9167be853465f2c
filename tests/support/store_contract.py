"""What every run store does. A test class inherits this and says in `factory` how a store is opened, and again."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.run_store.base import Store, StoreKeyMissing, scoped

Factory = Callable[[], Store]
"""Opens the same store each time."""
BIG_BYTES = 40_000_000
"""More than one part of a multipart upload."""


class StoreContract:
    @pytest.fixture
    def factory(self, tmp_path: Path) -> Factory:
        raise NotImplementedError

    @pytest.fixture
    def store(self, factory: Factory) -> Store:
        return factory()

    def test_what_was_written_is_read_by_whoever_opens_the_store_next(self, factory: Factory) -> None:
        factory().write("progress/latest.json", b"one")
        factory().write("progress/latest.json", b"two")
        assert factory().read("progress/latest.json") == b"two"

    @pytest.mark.parametrize("key", ["absent", "folder", "folder/absent", "folder/key/below"])
    def test_a_missing_key_is_named(self, store: Store, key: str) -> None:
        store.write("folder/key", b"x")
        with pytest.raises(StoreKeyMissing, match="no key '"):
            store.read(key)
        with pytest.raises(StoreKeyMissing, match="no key '"):
            store.read_range(key, 0, 1)
        with pytest.raises(KeyError):
            store.read(key)

    def test_create_keeps_the_first_value(self, store: Store) -> None:
        assert store.create("incarnations/0.json", b"mine")
        assert not store.create("incarnations/0.json", b"theirs")
        assert not store.create("incarnations/0.json", b"mine")
        assert store.read("incarnations/0.json") == b"mine"

    def test_list_gives_whole_keys_sorted_and_only_under_the_prefix(self, store: Store) -> None:
        for key in ("b/2", "b/10", "a", "b/sub/3", "bc/1"):
            store.write(key, b"")
        assert store.list() == ["a", "b/10", "b/2", "b/sub/3", "bc/1"]
        assert store.list("b/") == ["b/10", "b/2", "b/sub/3"]
        assert store.list("b") == ["b/10", "b/2", "b/sub/3", "bc/1"]
        assert store.list("b/1") == ["b/10"]
        assert store.list("nothing/here") == []

    def test_delete_is_quiet_and_leaves_the_neighbours(self, store: Store) -> None:
        store.write("a/one", b"1")
        store.write("a/two", b"2")
        store.delete("a/one")
        store.delete("a/one")
        store.delete("never/was")
        store.delete("a/two/below")
        assert store.list() == ["a/two"]

    @pytest.mark.parametrize("num_bytes", [0, 3_000_001, BIG_BYTES])
    def test_a_file_goes_up_and_comes_down_the_same(self, store: Store, tmp_path: Path, num_bytes: int) -> None:
        content = random.Random(0).randbytes(num_bytes)
        (tmp_path / "up").write_bytes(content)
        store.upload("checkpoints/part", tmp_path / "up")
        store.download("checkpoints/part", tmp_path / "new" / "down")
        assert (tmp_path / "new" / "down").read_bytes() == content
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["down"]

    @pytest.mark.parametrize("sizes", [[], [0], [5], [3, 0, 4], [7_000_000, 30_000_000, 1]])
    def test_pieces_become_one_value(self, store: Store, sizes: list[int]) -> None:
        rng = random.Random(1)
        pieces = [rng.randbytes(size) for size in sizes]
        store.write_pieces("checkpoints/part", [memoryview(piece) for piece in pieces])
        assert store.read("checkpoints/part") == b"".join(pieces)

    def test_a_range_ends_where_the_value_does(self, store: Store) -> None:
        store.write("k", b"0123456789")
        store.write("empty", b"")
        assert store.read_range("k", 2, 3) == b"234"
        assert store.read_range("k", 8, 100) == b"89"
        assert store.read_range("k", 10, 1) == b""
        assert store.read_range("k", 99, 5) == b""
        assert store.read_range("k", 3, 0) == b""
        assert store.read_range("empty", 0, 1) == b""

    def test_a_missing_key_leaves_no_download(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StoreKeyMissing):
            store.download("absent", tmp_path / "new" / "down")
        assert list((tmp_path / "new").iterdir()) == []

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", ".tmp/x", "a/.hidden", "a\\b", "a\0"])
    def test_a_key_cannot_leave_the_store(self, store: Store, key: str) -> None:
        with pytest.raises(ValueError, match="is no store key"):
            store.write(key, b"")

    def test_a_scope_sees_only_its_own_keys(self, store: Store) -> None:
        item, two = scoped(store, "runs/one"), scoped(store, "runs/two")
        item.write("x", b"1")
        two.write("x", b"2")
        assert (item.read("x"), item.list(), store.list()) == (b"1", ["x"], ["runs/one/x", "runs/two/x"])
        assert "/runs/one" in item.uri


class ConditionalStoreContract(StoreContract):
    """Of a store in which one of two creates of a key wins."""

    def test_exactly_one_of_many_creates_each_key(self, factory: Factory) -> None:
        stores = [factory() for _ in range(4)]
        for key in range(5):
            with ThreadPoolExecutor(len(stores)) as pool:
                made = list(pool.map(lambda n, key=key: stores[n].create(f"race/{key}", str(n).encode()), range(4)))
            assert sum(made) == 1
            assert stores[0].read(f"race/{key}") == str(made.index(True)).encode()

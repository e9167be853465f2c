"""Which checkpoint counts, on plain files: no torch, no training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cost.errors import SlmError
from trainer.checkpoints.lineage import (
    Damaged,
    IncarnationStart,
    Manifest,
    Place,
    Superseded,
    begin_incarnation,
    checkpoints_of_chain,
    newest_incarnation,
    prune,
    publish,
    read_manifest,
    require_newest,
)
from trainer.checkpoints.parts import read_span, verify_part, write_part
from trainer.run_store.base import DirectoryStore, Store
from trainer.run_store.envelope import unwrap
from trainer.run_store.keys import MANIFEST


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def begin(store: Store, incarnation: int, parent: tuple[int, int] | None) -> bool:
    place = None if parent is None else Place(*parent)
    return begin_incarnation(store, IncarnationStart(incarnation, place, "lease-0", 2, "2026-11-23T00:00:00+00:00"))


def save(store: Store, incarnation: int, step: int, *, manifest: bool = True) -> Place:
    place = Place(incarnation, step)
    parts = (
        write_part(store, place.prefix, "part-00000.bin", b"m" * 10),
        write_part(store, place.prefix, "part-00001.bin", f"{incarnation} {step}".encode()),
    )
    if manifest:
        store.write(place.prefix + MANIFEST, Manifest(incarnation, step, 2, parts, {"t": {}}, {"a": 1}).to_bytes())
    return place


def verify(store: Store, place: Place) -> None:
    for part in read_manifest(store, place).parts:
        verify_part(store, place.prefix, part)


def chain(store: Store) -> list[tuple[int, int]]:
    return [tuple(place) for place in checkpoints_of_chain(store)]


def test_an_incarnation_records_its_parent_once(store: DirectoryStore) -> None:
    assert newest_incarnation(store) == -1
    assert begin(store, 0, None)
    assert not begin(store, 0, (9, 9))
    assert begin(store, 1, (0, 40))
    assert newest_incarnation(store) == 1
    assert unwrap(store.read("incarnations/1.json"), "incarnations/1.json") == {
        "incarnation": 1,
        "parent": {"incarnation": 0, "step": 40},
        "lease_id": "lease-0",
        "world_size": 2,
        "started_at": "2026-11-23T00:00:00+00:00",
        "skipped": [],
    }


def test_incarnations_are_ordered_as_numbers(store: DirectoryStore) -> None:
    for incarnation in range(11):
        begin(store, incarnation, None)
    assert newest_incarnation(store) == 10


def test_a_run_without_incarnations_has_no_checkpoint(store: DirectoryStore) -> None:
    save(store, 0, 10)
    assert chain(store) == []


def test_the_chain_goes_from_the_newest_back_through_parents(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 9)
    save(store, 0, 10)
    begin(store, 1, (0, 10))
    save(store, 1, 100)
    begin(store, 2, (1, 100))
    assert chain(store) == [(1, 100), (0, 10), (0, 9)]


def test_what_a_zombie_adds_beyond_the_parent_is_ignored(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 10)
    begin(store, 1, (0, 10))
    save(store, 0, 20)  # incarnation 0 is not dead yet
    assert chain(store) == [(0, 10)]
    save(store, 1, 15)
    save(store, 0, 30)
    assert chain(store) == [(1, 15), (0, 10)]
    begin(store, 2, (1, 15))
    assert chain(store) == [(1, 15), (0, 10)]


def test_an_incarnation_off_the_chain_is_ignored(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 10)
    begin(store, 1, (0, 10))
    save(store, 1, 20)
    begin(store, 2, (0, 10))  # it looked before incarnation 1 had saved
    save(store, 2, 12)
    assert chain(store) == [(2, 12), (0, 10)]


def test_without_its_manifest_a_checkpoint_does_not_exist(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 10)
    save(store, 0, 20, manifest=False)
    assert chain(store) == [(0, 10)]


def test_a_lost_incarnation_record_is_said(store: DirectoryStore) -> None:
    begin(store, 0, None)
    begin(store, 1, (0, 10))
    store.delete("incarnations/0.json")
    with pytest.raises(SlmError, match=r"incarnations/0.json in file://.* cannot be read .*bring that file back"):
        checkpoints_of_chain(store)


def test_a_part_gives_back_any_span_of_its_bytes(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoints.parts.BLOCK_BYTES", 4)
    content = bytes(range(10))
    part = write_part(store, "p/", "x", content)
    assert (part.num_bytes, part.block_bytes, len(part.sha256)) == (10, 4, 3)
    for begin in range(10):
        for end in range(begin + 1, 11):
            assert bytes(read_span(store, "p/", part, begin, end)) == content[begin:end]


def test_only_the_blocks_that_are_read_are_verified(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoints.parts.BLOCK_BYTES", 4)
    part = write_part(store, "p/", "x", bytes(10))
    store.write("p/x", bytes(4) + b"x" + bytes(5))
    assert bytes(read_span(store, "p/", part, 0, 4)) == bytes(4)
    assert bytes(read_span(store, "p/", part, 8, 10)) == bytes(2)
    with pytest.raises(Damaged, match="block 1 of part x has another checksum"):
        read_span(store, "p/", part, 3, 5)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-1], "part part-00000.bin has 9 bytes instead of 10"),
        (lambda content: content + b"x", "part part-00000.bin has more than 10 bytes instead of 10"),
        (lambda content: b"x" + content[1:], "block 0 of part part-00000.bin has another checksum"),
    ],
)
def test_a_changed_part_is_damage(store: DirectoryStore, damage: object, reason: str) -> None:
    place = save(store, 0, 10)
    assert callable(damage)
    store.write(place.prefix + "part-00000.bin", damage(store.read(place.prefix + "part-00000.bin")))
    with pytest.raises(Damaged, match=reason):
        verify(store, place)


def test_a_missing_part_is_damage(store: DirectoryStore) -> None:
    place = save(store, 0, 10)
    store.delete(place.prefix + "part-00001.bin")
    with pytest.raises(Damaged, match=r"part part-00001.bin is missing"):
        verify(store, place)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"schema": 3}', b'{"schema": 3, "parts": [{}]}'])
def test_an_unreadable_manifest_is_damage(store: DirectoryStore, content: bytes) -> None:
    place = save(store, 0, 10)
    store.write(place.prefix + MANIFEST, content)
    with pytest.raises(Damaged, match="its manifest cannot be read"):
        read_manifest(store, place)


def test_a_missing_manifest_and_one_of_another_version_are_damage(store: DirectoryStore) -> None:
    with pytest.raises(Damaged, match="its manifest is missing"):
        read_manifest(store, Place(0, 10))
    for head in (b'{"version": 2, "parts": []}', b'{"schema": 4}'):
        with pytest.raises(Damaged, match="its manifest has another version"):
            Manifest.from_bytes(head)


def test_an_older_incarnation_learns_that_it_was_superseded(store: DirectoryStore) -> None:
    begin(store, 0, None)
    require_newest(store, 0)
    begin(store, 1, None)
    with pytest.raises(
        Superseded, match="incarnation 0 of this run was superseded by incarnation 1; this process stops"
    ):
        require_newest(store, 0)


# --- pruning ---


def saved(store: Store) -> list[tuple[int, int]]:
    keys = {key.rsplit("/", 1)[0] for key in store.list("checkpoints/")}
    return sorted(tuple(int(part.split("=")[1]) for part in key.split("/")[1:]) for key in keys)


def test_the_newest_of_the_chain_are_kept_over_incarnations(store: DirectoryStore) -> None:
    begin(store, 0, None)
    for step in (10, 20, 30):
        save(store, 0, step)
    begin(store, 1, (0, 20))
    save(store, 1, 25)
    prune(store, 1, keep_last=3)
    assert saved(store) == [(0, 10), (0, 20), (1, 25)]
    save(store, 1, 35)
    prune(store, 1, keep_last=3)
    assert saved(store) == [(0, 20), (1, 25), (1, 35)]


def test_two_are_kept_even_when_one_is_asked_for(store: DirectoryStore) -> None:
    begin(store, 0, None)
    for step in (10, 20, 30):
        save(store, 0, step)
    prune(store, 0, keep_last=1)
    assert saved(store) == [(0, 20), (0, 30)]


def test_parts_of_saves_that_died_are_deleted(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 10)
    save(store, 0, 20, manifest=False)
    begin(store, 1, (0, 10))
    save(store, 1, 30)
    prune(store, 1, keep_last=2)
    assert saved(store) == [(0, 10), (1, 30)]


def test_a_superseded_incarnation_deletes_nothing(store: DirectoryStore) -> None:
    begin(store, 0, None)
    save(store, 0, 10)
    begin(store, 1, (0, 10))
    for step in (20, 30, 40):
        save(store, 0, step)
    with pytest.raises(Superseded):
        prune(store, 0, keep_last=2)
    assert chain(store) == [(0, 10)]


def test_milestones_stay_when_what_is_around_them_goes(store: DirectoryStore) -> None:
    begin(store, 0, None)
    for step in (10, 15, 20, 25):
        save(store, 0, step)
    begin(store, 1, (0, 20))  # 25 was damaged, or seen too late: no part of the chain any more
    for step in (30, 35, 40):
        save(store, 1, step)
    prune(store, 1, keep_last=2, milestone_every_steps=10)
    assert saved(store) == [(0, 10), (0, 20), (1, 30), (1, 35), (1, 40)]


class ListsLate(DirectoryStore):
    """Lists as they were at some moment; all else is as it is now."""

    frozen: tuple[str, ...] | None = None

    def list(self, prefix: str = "") -> list[str]:
        if self.frozen is None:
            return super().list(prefix)
        return [key for key in self.frozen if key.startswith(prefix)]


def published(store: Store, incarnation: int, step: int) -> None:
    save(store, incarnation, step, manifest=False)
    publish(store, Manifest(incarnation, step, 2, (), {}, {}))


def test_a_list_that_lags_hides_neither_the_newest_incarnation_nor_its_newest_checkpoint(tmp_path: Path) -> None:
    store = ListsLate(tmp_path)
    begin(store, 0, None)
    published(store, 0, 10)
    store.frozen = tuple(store.list())
    published(store, 0, 20)
    assert chain(store) == [(0, 20), (0, 10)]
    begin(store, 1, (0, 20))
    begin(store, 2, (0, 20))
    assert newest_incarnation(store) == 2
    with pytest.raises(Superseded):
        publish(store, Manifest(1, 30, 2, (), {}, {}))
    assert chain(store) == [(0, 20), (0, 10)]
    prune(store, 2, keep_last=2)
    assert chain(store) == [(0, 20), (0, 10)]


def test_a_list_that_still_shows_what_was_deleted_costs_no_checkpoint(tmp_path: Path) -> None:
    store = ListsLate(tmp_path)
    begin(store, 0, None)
    for step in (10, 20, 30):
        published(store, 0, step)
    store.frozen = tuple(store.list())
    for step in (40, 50, 60):
        published(store, 0, step)
        prune(store, 0, keep_last=2)
    store.frozen = None
    assert chain(store)[:2] == [(0, 60), (0, 50)]


def test_the_way_back_ends_where_no_older_checkpoint_is_left(store: DirectoryStore) -> None:
    begin(store, 0, None)
    begin(store, 1, (0, 10))
    begin(store, 2, (1, 20))
    save(store, 2, 30)
    store.delete("incarnations/0.json")  # nobody looks so far back
    assert chain(store) == [(2, 30)]


class DiesWhileDeleting(DirectoryStore):
    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def delete(self, key: str) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().delete(key)


@pytest.mark.parametrize("after", range(6))
def test_pruning_cut_off_anywhere_leaves_no_manifest_without_its_parts(store: DirectoryStore, after: int) -> None:
    begin(store, 0, None)
    for step in (10, 20, 30, 40):
        save(store, 0, step)
    with pytest.raises(KeyboardInterrupt):
        prune(DiesWhileDeleting(store.root, after), 0, keep_last=2)
    places = checkpoints_of_chain(store)
    assert [place.step for place in places[:2]] == [40, 30]
    for place in places:
        verify(store, place)
    prune(store, 0, keep_last=2)
    assert saved(store) == [(0, 30), (0, 40)]


def test_a_manifest_survives_its_round_trip(store: DirectoryStore) -> None:
    manifest = read_manifest(store, save(store, 3, 7))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert replace(manifest, step=8) != manifest

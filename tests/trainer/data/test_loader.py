from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.errors import SlmError, UserError
from trainer.data.loader import Loader, TokenShards, read_index, share
from trainer.data.order import interleave, permute, sample_places, samples_before

WORLD_SIZES = (1, 2, 3, 4, 5, 7, 8)


def samples(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int64)


def permutation_of(size: int, key: int) -> list[int]:
    keys = np.full(size, key, dtype=np.uint64)
    return permute(np.arange(size, dtype=np.int64), size, keys).tolist()


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_the_permutation_meets_every_index_once(size: int, key: int) -> None:
    assert sorted(permutation_of(size, key)) == list(range(size))


def test_the_permutation_depends_on_its_key_and_looks_random() -> None:
    size = 20_000
    item, two = np.array(permutation_of(size, 1)), np.array(permutation_of(size, 2))
    # Fixed points of a random permutation: one expected, more than ten in one case of 10^8.
    assert (item == np.arange(size)).sum() <= 10
    assert (item == two).sum() <= 10
    # Correlation with the identity: standard deviation 1/sqrt(size) = 0.007.
    assert abs(np.corrcoef(item, np.arange(size))[0, 1]) < 0.04
    assert abs(np.corrcoef(item, two)[0, 1]) < 0.04
    # Neighbours land a third of the range apart on average.
    assert np.abs(np.diff(item)).mean() == pytest.approx(size / 3, rel=0.03)


@given(
    weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 0.01),
    first=st.integers(0, 10**9),
)
@settings(max_examples=60, deadline=None)
def test_interleaving_numbers_each_source_without_gaps(weights: list[float], first: int) -> None:
    source, ordinal = interleave(np.arange(first, first + 500, dtype=np.int64), weights)
    for number, weight in enumerate(weights):
        mine = ordinal[source == number]
        if len(mine):
            assert mine.tolist() == list(range(mine[0], mine[0] + len(mine)))
            assert abs(mine[0] - first * weight / sum(weights)) <= len(weights) + 5  # 2^-30 x 10^9 samples
        elif weight > 0.1:
            pytest.fail(f"source {number} of weight {weight} was never chosen")


def test_every_prefix_holds_each_source_in_its_share() -> None:
    weights = [0.5, 0.3, 0.2]
    source, _ = interleave(np.arange(2000, dtype=np.int64), weights)
    for number, weight in enumerate(weights):
        count = np.cumsum(source == number)
        assert np.abs(count - weight * np.arange(1, 2001)).max() <= 2


def test_a_source_of_no_weight_is_never_chosen() -> None:
    source, ordinal = interleave(np.arange(100, dtype=np.int64), [0.0, 1.0, 0.0])
    assert set(source.tolist()) == {1}
    assert ordinal.tolist() == list(range(100))


def test_each_epoch_of_a_source_shows_every_window_once_in_another_order() -> None:
    source, window = sample_places(samples(0, 60), [0.5, 0.5], [10, 7], seed=3)
    first = window[source == 0]
    assert [sorted(first[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert first[:10].tolist() != first[10:20].tolist()
    second = window[source == 1]
    assert [sorted(second[i : i + 7].tolist()) for i in (0, 7, 14)] == [list(range(7))] * 3


def test_another_seed_is_another_order() -> None:
    assert not np.array_equal(
        sample_places(samples(0, 50), [1.0], [50], 0)[1], sample_places(samples(0, 50), [1.0], [50], 1)[1]
    )


def test_a_far_position_is_reached_at_once() -> None:
    source, window = sample_places(samples(10**8, 5), [0.7, 0.3], [1000, 1000], seed=0)
    again_source, again_window = sample_places(samples(10**8 + 3, 2), [0.7, 0.3], [1000, 1000], seed=0)
    assert (source[3:].tolist(), window[3:].tolist()) == (again_source.tolist(), again_window.tolist())


def digest(loader: Loader, step: int, world_size: int) -> str:
    batches = [loader.batch(step, rank, world_size) for rank in range(world_size)]
    tokens = torch.cat([batch.tokens for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert tokens.shape == targets.shape == (loader.global_batch_size, loader.shards.sequence_length)
    return hashlib.sha256(tokens.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()


def test_every_world_size_sees_the_same_global_batches_in_the_same_order(data_dir: Path) -> None:
    shards = TokenShards(data_dir, "train", 16)
    whole = [digest(Loader(shards, 32, seed=0), step, 1) for step in range(12)]
    assert len(set(whole)) == 12
    for world_size in WORLD_SIZES:
        assert [digest(Loader(shards, 32, seed=0), step, world_size) for step in range(12)] == whole


def test_a_loader_holds_no_position(data_dir: Path) -> None:
    shards = TokenShards(data_dir, "train", 16)
    forward, backward = Loader(shards, 5, seed=0), Loader(shards, 5, seed=0)
    steps = [0, 3, 900, 2000]
    ahead = {step: digest(forward, step, 1) for step in steps}
    assert {step: digest(backward, step, 1) for step in reversed(steps)} == ahead


@given(size=st.integers(1, 100), world_size=st.integers(1, 40))
def test_shares_are_contiguous_and_even_to_one(size: int, world_size: int) -> None:
    shares = [share(size, rank, world_size) for rank in range(world_size)]
    assert [begin for begin, _ in shares[1:]] == [end for _, end in shares[:-1]]
    assert (shares[0][0], shares[-1][1]) == (0, size)
    lengths = {end - begin for begin, end in shares}
    assert max(lengths) - min(lengths) <= 1


def test_windows_are_what_the_shards_hold_and_targets_are_one_ahead(
    tmp_path: Path, make_data: Callable[..., Path]
) -> None:
    folder = make_data(tmp_path, {"text": (1.0, [33, 16, 50])})  # of T = 16: two windows, none, three
    shards = TokenShards(folder, "train", 16)
    assert shards.num_windows == [5]
    stored = [np.fromfile(folder / f"train-text-0000{n}.bin", dtype="<u2") for n in range(3)]
    wanted = [stored[0][0:17], stored[0][16:33], stored[2][0:17], stored[2][16:33], stored[2][32:49]]
    rows = shards.read(shards.find(np.zeros(5, dtype=np.int64), np.arange(5, dtype=np.int64)))
    assert rows.tolist() == [row.tolist() for row in wanted]
    batch = Loader(shards, 5, seed=0).batch(0)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    seen = sorted(torch.cat((batch.tokens, batch.targets[:, -1:]), dim=1).tolist())
    assert seen == sorted(row.tolist() for row in wanted)


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path, make_data: Callable[..., Path]) -> Path:
    return make_data(tmp_path / "data", {"text": (1.0, [100])})


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match=r"cannot read the data index .*/nowhere/index.json .*prepare the data again"):
        read_index(tmp_path / "nowhere")


def test_an_index_of_another_version_is_said(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(version=2))
    with pytest.raises(SlmError, match="has version 2, this slm reads 1; prepare the data again"):
        read_index(folder)


def test_an_index_without_a_field_is_said(folder: Path) -> None:
    edit_index(folder, lambda index: index.pop("fingerprint"))
    with pytest.raises(SlmError, match="KeyError: 'fingerprint'"):
        read_index(folder)


def test_a_missing_split_is_said(folder: Path) -> None:
    with pytest.raises(SlmError, match="has no split 'test'; prepare the data again"):
        TokenShards(folder, "test", 16)


def test_a_truncated_shard_is_said(folder: Path) -> None:
    shard = folder / "train-text-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(SlmError, match=r"has 198 bytes, the index says 200; delete .* and prepare"):
        TokenShards(folder, "train", 16)


def test_a_missing_shard_is_said(folder: Path) -> None:
    (folder / "train-text-00000.bin").unlink()
    with pytest.raises(SlmError, match=r"cannot read the shard .*00000.bin \(No such file"):
        TokenShards(folder, "train", 16)


def test_a_source_shorter_than_a_window_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="source 'text' of split 'train' has no 101 tokens in one piece"):
        TokenShards(folder, "train", 100)


def test_samples_before_is_what_interleaving_counts() -> None:
    weights = [0.5, 0.0, 0.31, 0.19]
    source, _ = interleave(np.arange(5000, dtype=np.int64), weights)
    for sample in (0, 1, 7, 1234, 5000):
        assert samples_before(sample, weights) == [int((source[:sample] == number).sum()) for number in range(4)]


def test_epochs_count_how_often_each_source_was_seen(tmp_path: Path, make_data: Callable[..., Path]) -> None:
    folder = make_data(tmp_path, {"text": (0.75, [16 * 6 + 1]), "code": (0.25, [16 * 8 + 1])})  # 6 and 8 windows
    loader = Loader(TokenShards(folder, "train", 16), 8, seed=0)
    assert loader.epochs(0) == {"text": 0.0, "code": 0.0}
    assert loader.epochs(2) == {"text": 12 / 6, "code": 4 / 8}


def test_a_batch_that_spans_many_shards_holds_what_single_reads_hold(
    tmp_path: Path, make_data: Callable[..., Path]
) -> None:
    folder = make_data(tmp_path, {"a": (0.5, [40, 10, 70, 33]), "b": (0.5, [100, 60])})
    shards = TokenShards(folder, "train", 16)
    source, window = sample_places(samples(0, 40), shards.weights, shards.num_windows, seed=1)
    together = shards.read(shards.find(source, window))
    for row in range(40):
        assert (
            together[row].tolist() == shards.read(shards.find(source[row : row + 1], window[row : row + 1]))[0].tolist()
        )
        stored = [np.fromfile(p, dtype="<u2") for p in sorted(folder.glob(f"train-{'ab'[source[row]]}-*.bin"))]
        inside = [shard[i * 16 : i * 16 + 17] for shard in stored for i in range((len(shard) - 1) // 16)]
        assert together[row].tolist() == inside[window[row]].tolist()

"""Tokens on disk to batches, in an order that depends on nothing but integers.

Sample number g = step x global_batch_size + row. Low-discrepancy interleaving by weight says which source it comes
from and how many of that source came before; a keyed permutation of the source's windows, a new one in each of its
epochs, says which window. So the position of a run is one integer, `step`, and every world size sees the same global
batches in the same order. Ranks take contiguous shares of a batch, which need not be equal.
Shards are raw little-endian uint16, listed by `index.json`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cost.errors import SlmError, UserError

INDEX_FILE = "index.json"
INDEX_VERSION = 1
FEISTEL_ROUNDS = 4
"""Luby and Rackoff 1988: four rounds of a pseudorandom function make a pseudorandom permutation."""
WEIGHT_BITS = 30
"""Weights become fractions of 2**WEIGHT_BITS, so that the interleaving is exact integer arithmetic."""
ORDER_BLOCK_SAMPLES = 4096
"""The order is computed for so many samples at once and kept; numpy's cost per call then hardly counts."""

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataIndex:
    """What `index.json` says of the tokens as a whole."""

    vocab_size: int
    tokenizer_sha256: str
    fingerprint: str
    heldout_unigram_entropy: float
    """Nats per token: what a model that knows only the frequencies of tokens would reach on the held-out split."""
    splits: Mapping[str, Any]


class Batch(NamedTuple):
    """One rank's share of a global batch, both B x T; B is that share's size and may be zero."""

    tokens: Tensor
    targets: Tensor


def read_index(data_dir: Path) -> DataIndex:
    """Raises SlmError when there is none or when it is not one that this version reads."""
    path = data_dir / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != INDEX_VERSION:
            raise SlmError(
                f"{path} has version {index['version']}, this slm reads {INDEX_VERSION}; prepare the data again."
            )
        return DataIndex(
            vocab_size=int(index["vocab_size"]),
            tokenizer_sha256=str(index["tokenizer_sha256"]),
            fingerprint=str(index["fingerprint"]),
            heldout_unigram_entropy=float(index["heldout_unigram_entropy_nats"]),
            splits=index["splits"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlmError(
            f"cannot read the data index {path} ({type(error).__name__}: {error}); prepare the data again."
        ) from error


class TokenShards:
    """One split of prepared data as windows of sequence_length + 1 tokens; the last token is the next one's first."""

    def __init__(self, data_dir: Path, split: str, sequence_length: int) -> None:
        self.index = read_index(data_dir)
        self.split = split
        self.sequence_length = sequence_length
        sources = self.index.splits.get(split, {}).get("sources", [])
        if not sources:
            raise SlmError(f"{data_dir} has no split {split!r}; prepare the data again.")
        self.names: list[str] = [source["name"] for source in sources]
        self.weights: list[float] = [float(source["weight"]) for source in sources]
        self._shards = [[_open_shard(data_dir, shard) for shard in source["shards"]] for source in sources]
        # Per source, the number of windows in all shards before each one, and at the end in all of them.
        self._windows_before = [
            list(accumulate((max(len(shard) - 1, 0) // sequence_length for shard in shards), initial=0))
            for shards in self._shards
        ]
        self.num_windows = [before[-1] for before in self._windows_before]
        for name, weight, count in zip(self.names, self.weights, self.num_windows, strict=True):
            if weight > 0 and count == 0:
                raise UserError(
                    f"source {name!r} of split {split!r} has no {sequence_length + 1} tokens in one piece; "
                    "give it more text, or make model.sequence_length smaller."
                )

    def read(self, source_N: Int64s, window_N: Int64s) -> Int64s:
        """The tokens of these windows, N x (T + 1)."""
        T = self.sequence_length
        out = np.empty((len(window_N), T + 1), dtype=np.int64)
        for row, (source, window) in enumerate(zip(source_N.tolist(), window_N.tolist(), strict=True)):
            before = self._windows_before[source]
            shard = bisect_right(before, window) - 1
            start = (window - before[shard]) * T
            out[row] = self._shards[source][shard][start : start + T + 1]
        return out


class Loader:
    """The batches of a run. Holds no position: `batch` may be asked for any step in any order."""

    def __init__(self, shards: TokenShards, global_batch_size: int, seed: int) -> None:
        self.shards = shards
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._block = (0, *sample_places(0, 0, shards.weights, shards.num_windows, seed))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """What this rank trains on in this step."""
        begin, end = share(self.global_batch_size, rank, world_size)
        source_N, window_N = self._places(step * self.global_batch_size + begin, end - begin)
        rows = torch.from_numpy(self.shards.read(source_N, window_N))
        return Batch(rows[:, :-1], rows[:, 1:])

    def _places(self, first: int, count: int) -> tuple[Int64s, Int64s]:
        start, source_N, window_N = self._block
        if not start <= first <= first + count <= start + len(source_N):
            size = max(count, ORDER_BLOCK_SAMPLES)
            source_N, window_N = sample_places(first, size, self.shards.weights, self.shards.num_windows, self.seed)
            start, self._block = first, (first, source_N, window_N)
        chosen = slice(first - start, first - start + count)
        return source_N[chosen], window_N[chosen]


def share(global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows [begin, end) of a global batch that fall to `rank`; sizes differ by one at most."""
    return global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size


def sample_places(
    first: int, count: int, weights: Sequence[float], num_windows: Sequence[int], seed: int
) -> tuple[Int64s, Int64s]:
    """Source and window of the samples first, first + 1, ..."""
    source_N, ordinal_N = interleave(np.arange(first, first + count, dtype=np.int64), weights)
    window_N = np.zeros(count, dtype=np.int64)
    for source, size in enumerate(num_windows):
        mine = source_N == source
        if mine.any():
            epoch_N, index_N = np.divmod(ordinal_N[mine], size)
            window_N[mine] = permute(index_N, size, _epoch_keys(seed, source, epoch_N))
    return source_N, window_N


def interleave(sample_N: Int64s, weights: Sequence[float]) -> tuple[Int64s, Int64s]:
    """Which source each sample comes from, and how many samples of that source came before it.

    Any first n samples hold each source's share of n to within one per source, with no memory but n: sample r of
    those still unclaimed goes to a source of share s where floor(r s) steps up; the rest are numbered anew and
    offered to the next source.
    """
    left_N = sample_N.copy()
    source_N = np.full(len(sample_N), len(weights) - 1, dtype=np.int64)
    unclaimed_N = np.ones(len(sample_N), dtype=bool)
    for source, weight in enumerate(weights[:-1]):
        fraction = round(weight / (sum(weights[source:]) or 1.0) * 2**WEIGHT_BITS)
        before_N = (left_N * fraction) >> WEIGHT_BITS
        claimed_N = unclaimed_N & ((((left_N + 1) * fraction) >> WEIGHT_BITS) > before_N)
        source_N[claimed_N] = source
        unclaimed_N &= ~claimed_N
        left_N = np.where(claimed_N, before_N, np.where(unclaimed_N, left_N - before_N, left_N))
    return source_N, left_N


def permute(index_N: Int64s, size: int, key_N: Uint64s) -> Int64s:
    """Where a pseudorandom permutation of range(size), chosen by the key, sends each index.

    A Feistel network permutes the next power of four; indices that land outside are sent on until they land inside.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = [_mix(key_N + np.uint64(number + 1)) for number in range(FEISTEL_ROUNDS)]
    value_N = _u64(index_N)
    outside_N = np.ones(len(value_N), dtype=bool)
    while outside_N.any():
        left, right = value_N[outside_N] >> half_bits, value_N[outside_N] & mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(right + keys[outside_N]) & mask)
        value_N[outside_N] = (left << half_bits) | right
        outside_N = value_N >= np.uint64(size)
    return value_N.astype(np.int64)


def _epoch_keys(seed: int, source: int, epoch_N: Int64s) -> Uint64s:
    """One key per epoch of each source."""
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(source))
    return _mix(key + _u64(epoch_N))


def _mix(value_N: Uint64s) -> Uint64s:
    """The finalizer of splitmix64: every input bit moves every output bit. Source: Steele et al., OOPSLA 2014."""
    with np.errstate(over="ignore"):
        value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def _u64(value_N: Int64s) -> Uint64s:
    return value_N.astype(np.uint64)


def _open_shard(data_dir: Path, shard: Mapping[str, Any]) -> npt.NDArray[np.uint16]:
    path = data_dir / str(shard["file"])
    expected = int(shard["num_tokens"])
    try:
        size = path.stat().st_size
    except OSError as error:
        raise SlmError(f"cannot read the shard {path} ({error.strerror}); prepare the data again.") from error
    if size != 2 * expected:
        raise SlmError(
            f"the shard {path} has {size} bytes, the index says {2 * expected}; delete {data_dir} and prepare "
            "the data again."
        )
    return np.memmap(path, dtype="<u2", mode="r") if expected else np.empty(0, dtype=np.uint16)

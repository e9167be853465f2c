"""Tokens on disk to batches, in an order that depends on nothing but integers.

Sample number g = step x global_batch_size + row. Low-discrepancy interleaving by weight says which source it comes
from and how many of that source came before; a keyed permutation of the source's windows, a new one in each of its
epochs, says which window. So the position of a run is one integer, `step`, and every world size sees the same global
batches in the same order. Ranks take contiguous shares of a batch, which need not be equal.
Shards are raw little-endian uint16, listed by `index.json`, and beside them is where each document begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from cost.errors import SlmError, UserError
from trainer.data.order import sample_places, samples_before
from trainer.model.documents import Int32s, Int64s, number_documents
from trainer.model.transformer import IGNORED

INDEX_FILE = "index.json"
INDEX_VERSION = 1
ORDER_BLOCK_SAMPLES = 4096
"""The order is computed for so many samples at once and kept; numpy's cost per call then hardly counts."""
READ_AHEAD_TOKENS = 2**16
"""Small shares are read for so many tokens at once, for the same reason."""


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
    """One rank's share of a global batch, all B x T; B is that share's size and may be zero.

    `documents` is there when the loader was asked for it: the number of each token's document in its row (int32). The
    first token of a document cannot be predicted from the one before, so it is no target then.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None

    def rows(self, begin: int, end: int) -> Batch:
        """Some of the rows."""
        return Batch(*(None if each is None else each[begin:end] for each in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Batch:
        """The same elsewhere."""
        return Batch(*(None if each is None else each.to(device, non_blocking=True) for each in self))  # type: ignore[arg-type]

    def given(self) -> tuple[Tensor, ...]:
        """What the model is called with."""
        return tuple(each for each in self if each is not None)


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


class _Shard(NamedTuple):
    """The windows of one shard, and where in it documents begin."""

    windows: npt.NDArray[np.uint16]
    """W x (T + 1), a view: nothing is read before it is asked for."""
    document_starts: Int64s


class Places(NamedTuple):
    """Where samples are: for each its shard, counted over all sources, and its window in there."""

    shards: Int64s
    windows: Int64s


class TokenShards:
    """One split of prepared data as windows of sequence_length + 1 tokens; the last token is the next one's first."""

    def __init__(self, data_dir: Path, split: str, sequence_length: int, *, with_documents: bool = False) -> None:
        self.index = read_index(data_dir)
        self.split = split
        self.sequence_length = sequence_length
        sources = self.index.splits.get(split, {}).get("sources", [])
        if not sources:
            raise SlmError(f"{data_dir} has no split {split!r}; prepare the data again.")
        self.names: list[str] = [source["name"] for source in sources]
        self.weights: list[float] = [float(source["weight"]) for source in sources]
        self.with_documents = with_documents
        self.num_windows: list[int] = []
        self._shards: list[_Shard] = []
        first_of_shard, first_of_source = [], []
        for name, weight, source in zip(self.names, self.weights, sources, strict=True):
            starts = _open_documents(data_dir, source) if with_documents else np.empty(0, dtype=np.int64)
            before, count = sum(self.num_windows), 0
            first_of_source.append(before)
            for window_WX, offset in _windows(data_dir, source["shards"], sequence_length):
                first_of_shard.append(before + count)
                self._shards.append(_Shard(window_WX, starts - offset))
                count += len(window_WX)
            self.num_windows.append(count)
            if weight > 0 and count == 0:
                raise UserError(
                    f"source {name!r} of split {split!r} has no {sequence_length + 1} tokens in one piece; "
                    "give it more text, or make model.sequence_length smaller."
                )
        self._first_of_shard = np.array(first_of_shard, dtype=np.int64)
        self._first_of_source = np.array(first_of_source, dtype=np.int64)

    def find(self, source_N: Int64s, window_N: Int64s) -> Places:
        """Which shard each window is in, and its number there."""
        number_N = self._first_of_source[source_N] + window_N
        shard_N = np.searchsorted(self._first_of_shard, number_N, "right") - 1
        return Places(shard_N, number_N - self._first_of_shard[shard_N])

    def read(self, at: Places) -> Int64s:
        """The tokens of these windows, N x (T + 1)."""
        out = np.empty((len(at.shards), self.sequence_length + 1), dtype=np.int64)
        for shard, mine in _by_shard(at):
            out[mine] = self._shards[shard].windows[at.windows[mine]]
        return out

    def read_documents(self, at: Places, max_documents: int) -> Int32s:
        """The number of each token's document in its window, N x (T + 1); at most `max_documents` different ones."""
        T = self.sequence_length
        out = np.empty((len(at.shards), T + 1), dtype=np.int32)
        for shard, mine in _by_shard(at):
            starts = self._shards[shard].document_starts
            out[mine] = number_documents(starts, at.windows[mine] * T, T + 1, max_documents)
        return out


class _Order(NamedTuple):
    """Where one share of some consecutive global batches is."""

    steps: range
    rows: tuple[int, int]
    at: Places


class _Ahead(NamedTuple):
    """One share of some consecutive global batches, one after the other."""

    steps: range
    rows: tuple[int, int]
    batches: Batch


class Loader:
    """The batches of a run. Holds no position: `batch` may be asked for any step in any order."""

    def __init__(
        self, shards: TokenShards, global_batch_size: int, seed: int, *, max_documents: int | None = None
    ) -> None:
        """`max_documents` of one sequence are told apart; None tells nothing of documents."""
        if max_documents is not None and not shards.with_documents:
            raise SlmError("documents can be told apart only in shards that were opened with_documents.")
        self.shards = shards
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.max_documents = max_documents
        self._order: _Order | None = None
        self._ahead: _Ahead | None = None

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """What this rank trains on in this step."""
        rows = share(self.global_batch_size, rank, world_size)
        count = rows[1] - rows[0]
        ahead = self._ahead
        if ahead is None or step not in ahead.steps or rows != ahead.rows:
            steps = _steps_from(step, count * self.shards.sequence_length, READ_AHEAD_TOKENS)
            ahead = self._ahead = _Ahead(steps, rows, self._read(self._places(steps, rows)))
        begin = (step - ahead.steps.start) * count
        return ahead.batches.rows(begin, begin + count)

    def epochs(self, step: int) -> dict[str, float]:
        """How often the first `step` steps have shown each source, as a multiple of all its windows."""
        seen = samples_before(step * self.global_batch_size, self.shards.weights)
        counts = zip(self.shards.names, seen, self.shards.num_windows, strict=True)
        return {name: number / windows if windows else 0.0 for name, number, windows in counts}

    def _read(self, at: Places) -> Batch:
        rows = self.shards.read(at)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if self.max_documents is None:
            return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
        documents = self.shards.read_documents(at, self.max_documents)
        targets = np.where(documents[:, 1:] == documents[:, :-1], targets, np.int64(IGNORED))
        return Batch(*map(torch.from_numpy, (tokens, targets, np.ascontiguousarray(documents[:, :-1]))))

    def _places(self, steps: range, rows: tuple[int, int]) -> Places:
        """Where these rows of global batches are; those of the steps after are found with them and kept."""
        count = rows[1] - rows[0]
        order = self._order
        if order is None or steps.start not in order.steps or steps[-1] not in order.steps or rows != order.rows:
            longer = max(steps, _steps_from(steps.start, count, ORDER_BLOCK_SAMPLES), key=len)
            first_S = np.arange(longer.start, longer.stop, dtype=np.int64) * self.global_batch_size + rows[0]
            sample_N = (first_S[:, None] + np.arange(count)).ravel()
            found = sample_places(sample_N, self.shards.weights, self.shards.num_windows, self.seed)
            order = self._order = _Order(longer, rows, self.shards.find(*found))
        begin = (steps.start - order.steps.start) * count
        chosen = slice(begin, begin + len(steps) * count)
        return Places(order.at.shards[chosen], order.at.windows[chosen])


def share(global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows [begin, end) of a global batch that fall to `rank`; sizes differ by one at most."""
    return global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size


def _steps_from(step: int, size_of_one: int, wanted: int) -> range:
    """The step and as many after it as together have the wanted size at most."""
    return range(step, step + max(1, wanted // max(1, size_of_one)))


def _by_shard(at: Places) -> Iterator[tuple[int, Any]]:
    """Each shard that holds some of these windows, and which."""
    for shard in np.unique(at.shards).tolist():
        yield shard, np.flatnonzero(at.shards == shard)


def _windows(
    data_dir: Path, shards: Sequence[Mapping[str, Any]], sequence_length: int
) -> Iterator[tuple[npt.NDArray[np.uint16], int]]:
    """Per shard a view of its windows, W x (T + 1), and how many tokens of the source come before it."""
    offset = 0
    for shard in shards:
        tokens = _open_shard(data_dir, shard)
        if len(tokens) > sequence_length:
            yield sliding_window_view(tokens, sequence_length + 1)[::sequence_length], offset
        offset += len(tokens)


def _open_documents(data_dir: Path, source: Mapping[str, Any]) -> Int64s:
    """Where the documents of a source begin, counted in tokens over all its shards."""
    path = data_dir / str(source.get("documents", "(none named)"))
    try:
        starts: Int64s = np.load(path).astype(np.int64)
    except (OSError, ValueError) as error:
        raise SlmError(f"cannot read where documents begin, {path} ({error}); prepare the data again.") from error
    if len(starts) != source.get("num_documents", len(starts)) or (np.diff(starts) <= 0).any():
        raise SlmError(f"{path} does not name the documents of {source['name']!r}; prepare the data again.")
    return starts


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

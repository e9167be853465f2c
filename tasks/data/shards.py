"""Token shards on disk: raw little-endian unsigned 16-bit ids and an index that says what each file must be.

Invariant: a data folder is whole when its index is there and every file has the size (and, when asked, the SHA-256)
that the index names; the index is written last. Documents end with the end-of-text token and lie whole in one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INDEX_VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
TOKEN_BYTES = 2
SHARD_TOKENS = 2**27
"""A shard is closed at the first document that reaches this: 256 MiB."""


class SplitWriter:
    """Appends the documents of one split of one source to its shards."""

    def __init__(
        self, folder: Path, split: str, source: str, vocab_size: int, *, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder = folder
        self._name = f"{split}-{source}"
        self._shard_tokens = shard_tokens
        self._starts = array("Q")
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._tokens_in_shard = 0
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        """How often each token occurs."""
        self.num_tokens = 0
        self.num_bytes = 0

    @property
    def num_documents(self) -> int:
        """Documents appended."""
        return len(self._starts)

    def append(self, tokens: bytes, num_bytes: int) -> None:
        """Add one document: its ids as native 16-bit integers, end-of-text included; `num_bytes` of UTF-8 text."""
        ids = np.frombuffer(tokens, dtype=np.uint16)
        content = tokens if sys.byteorder == "little" else ids.astype("<u2").tobytes()
        if self._file is None:
            self._file = (self._folder / self._shard_name()).open("wb")
        self._file.write(content)
        self._digest.update(content)
        self._starts.append(self.num_tokens)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self._tokens_in_shard += len(ids)
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes
        if self._tokens_in_shard >= self._shard_tokens:
            self._close_shard()

    def finish(self, weight: float) -> dict[str, Any]:
        """Close the files; returns this source's entry of the index."""
        if self._file is not None:
            self._close_shard()
        documents = f"{self._name}-docs.npy"
        with (self._folder / documents).open("wb") as file:
            np.save(file, np.frombuffer(self._starts, dtype=np.uint64))
            _sync(file)
        return {
            "name": self._name.partition("-")[2],
            "weight": weight,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "shards": self._shards,
            "documents": documents,
        }

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"

    def _close_shard(self) -> None:
        _sync(self._file)
        self._file.close()
        self._shards.append(
            {"file": self._shard_name(), "num_tokens": self._tokens_in_shard, "sha256": self._digest.hexdigest()}
        )
        self._file, self._digest, self._tokens_in_shard = None, hashlib.sha256(), 0


def unigram_entropy_nats(counts: Sequence[np.ndarray[Any, Any]], weights: Sequence[float]) -> float:
    """Entropy of single tokens in a weighted mix of sources: the loss of the best model that sees no context."""
    mix = sum(weight * count / count.sum() for count, weight in zip(counts, weights, strict=True)) / sum(weights)
    shares = np.asarray(mix)[np.asarray(mix) > 0]
    return float(-(shares * np.log(shares)).sum())


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index: the last file of a data folder."""
    write_synced(folder / INDEX_NAME, (json.dumps(index, indent=1, sort_keys=True) + "\n").encode())


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a data folder, None where it is missing or not one of this version."""
    try:
        index = json.loads((folder / INDEX_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("version") == INDEX_VERSION else None


def faults(folder: Path, *, verify: bool = False) -> list[str]:
    """What is wrong with a data folder; empty when it is whole.

    Args:
        verify: Compare the SHA-256 of every shard too, not only sizes.
    """
    index = read_index(folder)
    if index is None:
        return [f"{INDEX_NAME} is missing or damaged"]
    try:
        return list(_faults(folder, index, verify))
    except (KeyError, TypeError) as error:
        return [f"{INDEX_NAME} is damaged ({error})"]


def _faults(folder: Path, index: dict[str, Any], verify: bool) -> Iterator[str]:
    if _sha256(folder / index["tokenizer"]) != index["tokenizer_sha256"]:
        yield f"{index['tokenizer']} is missing or damaged"
    for split in index["splits"].values():
        for source in split["sources"]:
            if not (folder / source["documents"]).is_file():
                yield f"{source['documents']} is missing"
            for shard in source["shards"]:
                path = folder / shard["file"]
                expected = shard["num_tokens"] * TOKEN_BYTES
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    yield f"{path.name} is missing"
                elif size != expected:
                    yield f"{path.name} has {size} bytes instead of {expected}"
                elif verify and _sha256(path) != shard["sha256"]:
                    yield f"{path.name} has another SHA-256 than when it was written"


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())

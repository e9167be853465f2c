"""Encodes documents on all cores: batches go out to worker processes and come back in order.

Invariant: the output depends on the documents and the tokenizer only, never on the number of workers. At most
`BATCHES_IN_FLIGHT` batches per worker exist at once, so memory is bounded; workers end when their parent does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cost.errors import SlmError
from tasks.data.shards import TOKEN_BYTES
from tasks.data.tokenizer import encode_to_numpy, pieces, read_tokenizer

if TYPE_CHECKING:
    import tiktoken

BATCH_CHARACTERS = 1_000_000
BATCHES_IN_FLIGHT = 3
PARALLEL_FROM_BYTES = 32_000_000
"""Below this, starting a process costs more than it brings."""

Encoded = tuple[bytes, list[int]]
"""All ids of a batch as native 16-bit integers, and how many each document has."""


class EncodingFailed(SlmError):
    """A worker process died."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document on its way to the shards, with its size as UTF-8."""

    text: str
    num_bytes: int
    heldout: bool


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Ids as native 16-bit integers, end-of-text included, and how many bytes of UTF-8 they stand for."""

    tokens: bytes
    num_bytes: int
    heldout: bool


def default_workers(num_bytes: int) -> int:
    """Processes that pay off for so much text: 1 means none besides this one."""
    if num_bytes < PARALLEL_FROM_BYTES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // (PARALLEL_FROM_BYTES // 4)))


@contextmanager
def encoder(tokenizer: Path, num_workers: int) -> Iterator[Callable[[Iterable[Text]], Iterator[EncodedText]]]:
    """Gives a function that encodes texts in order, here or in `num_workers` processes.

    Raises:
        EncodingFailed: A worker process died, for lack of memory as a rule.
    """
    if num_workers == 1:
        encoding, end = _load(tokenizer)
        yield lambda texts: _unpacked((batch, _encode(encoding, end, _plain(batch))) for batch in _batches(texts))
        return
    import multiprocessing

    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(tokenizer),)
    )
    try:
        yield lambda texts: _unpacked(_in_order(pool, _batches(texts), num_workers * BATCHES_IN_FLIGHT))
    except BrokenProcessPool:
        raise EncodingFailed(
            f"a process that encodes text died (one of {num_workers}); was there too little memory? "
            "Run it again with --workers 1."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[list[Text]], most_in_flight: int
) -> Iterator[tuple[list[Text], Encoded]]:
    waiting: deque[tuple[list[Text], Future[Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_in_worker, _plain(batch))))
        if len(waiting) >= most_in_flight:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _unpacked(results: Iterable[tuple[list[Text], Encoded]]) -> Iterator[EncodedText]:
    for batch, (content, lengths) in results:
        start = 0
        for text, length in zip(batch, lengths, strict=True):
            stop = start + TOKEN_BYTES * length
            yield EncodedText(content[start:stop], text.num_bytes, text.heldout)
            start = stop


def _plain(batch: list[Text]) -> list[str]:
    """All that a worker needs: objects would cost more to send than their text."""
    return [text.text for text in batch]


def _encode(encoding: tiktoken.Encoding, end_of_text: int, texts: Iterable[str]) -> Encoded:
    end = np.array([end_of_text], dtype=np.uint32)
    parts, lengths = [end[:0]], []
    for text in texts:
        arrays = [encode_to_numpy(encoding, piece) for piece in pieces(text)]
        parts += [*arrays, end]
        lengths.append(sum(map(len, arrays)) + 1)
    return np.concatenate(parts).astype(np.uint16).tobytes(), lengths


def _load(path: Path) -> tuple[tiktoken.Encoding, int]:
    tokenizer = read_tokenizer(path)
    return tokenizer.encoding(), tokenizer.end_of_text


# ---------------------------------------------------------------- in a worker process

_worker: dict[str, tuple[tiktoken.Encoding, int]] = {}


def _start_worker(tokenizer: str) -> None:
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()
    _worker["encoding"] = _load(Path(tokenizer))


def _end_with(join: Callable[[], None]) -> None:
    """A parent that was killed cannot say goodbye, and its workers would wait for work for ever."""
    with contextlib.suppress(Exception):
        join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    encoding, end_of_text = _worker["encoding"]
    return _encode(encoding, end_of_text, texts)

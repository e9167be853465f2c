"""One part of a checkpoint: bytes in a run store, with a checksum of each block.

Invariant: no byte leaves `read_span` that is not the byte which was saved. Checksums are per block, so that a reader
that needs a little of a part verifies exactly what it reads. This module is torch-free.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from trainer.run_store.base import Bytes, Store, StoreKeyMissing

BLOCK_BYTES = 8 * 2**20
READ_THREADS = 8
"""A directory needs few; one connection to S3 gives some 50 MB/s, so that several fill a node's network."""


class Damaged(Exception):
    """A checkpoint that is not whole; its message says in what way."""


@dataclass(frozen=True)
class Part:
    """`key` lies under the checkpoint's prefix; block n begins at n * `block_bytes`."""

    key: str
    num_bytes: int
    block_bytes: int
    sha256: tuple[str, ...]


def write_part(store: Store, prefix: str, key: str, content: Bytes) -> Part:
    """Store `content` under `prefix` + `key`; returns only when it is durable."""
    view = memoryview(content)
    blocks = [view[begin : begin + BLOCK_BYTES] for begin in range(0, len(view), BLOCK_BYTES)]
    digests = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
    store.write_pieces(prefix + key, blocks)
    return Part(key, len(view), BLOCK_BYTES, digests)


def read_span(store: Store, prefix: str, part: Part, begin: int, end: int) -> memoryview:
    """Bytes `begin` to `end` of a part; raises Damaged unless every block that they touch is as it was saved."""
    first, last = begin // part.block_bytes, -(-end // part.block_bytes)
    with ThreadPoolExecutor(max(1, min(READ_THREADS, last - first))) as pool:
        blocks = list(pool.map(lambda number: _read_block(store, prefix, part, number), range(first, last)))
    content = memoryview(blocks[0] if len(blocks) == 1 else b"".join(blocks))
    return content[begin - first * part.block_bytes : end - first * part.block_bytes]


def verify_part(store: Store, prefix: str, part: Part) -> None:
    """Read all of it, block by block; raises Damaged unless it is as it was saved."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in pool.map(lambda number: _read_block(store, prefix, part, number), range(len(part.sha256))):
            pass


def _read_block(store: Store, prefix: str, part: Part, number: int) -> bytes:
    begin = number * part.block_bytes
    is_last = number == len(part.sha256) - 1
    wanted = part.num_bytes - begin if is_last else part.block_bytes
    try:
        # One byte more than the last block has: a part that has grown is not the one that was saved.
        block = store.read_range(prefix + part.key, begin, wanted + is_last)
    except StoreKeyMissing as error:
        raise Damaged(f"part {part.key} is missing") from error
    if len(block) != wanted:
        more = "more than " if len(block) > wanted else ""
        found = part.num_bytes if more else begin + len(block)
        raise Damaged(f"part {part.key} has {more}{found} bytes instead of {part.num_bytes}")
    if hashlib.sha256(block).hexdigest() != part.sha256[number]:
        raise Damaged(f"block {number} of part {part.key} has another checksum")
    return block

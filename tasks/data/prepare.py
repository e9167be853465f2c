"""Turns a recipe's corpus into a tokenizer and token shards, once for each content.

Invariant: `<data root>/<fingerprint>` appears whole, by one rename, or not at all; the same input gives the same
bytes. A process that dies leaves only a hidden folder, which the next one removes; of two at once, one waits for
the other. A document is held out or trained on by a hash of its group, never both.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cost.errors import SlmError, UserError
from tasks.data.corpus import Corpus, fingerprint, open_corpus
from tasks.data.encode import Text, default_workers, encoder
from tasks.data.shards import (
    INDEX_VERSION,
    TOKEN_BYTES,
    TOKENIZER_NAME,
    SplitWriter,
    faults,
    read_index,
    unigram_entropy_nats,
    write_index,
    write_synced,
)
from tasks.data.tokenizer import train_tokenizer
from tasks.recipe.load import recipe_from_json
from tasks.recipe.schema import Recipe
from tasks.recipe.sections import Data

SPLITS = ("train", "heldout")
REPORT_BYTES = 2_000_000
"""Text between two reports of progress."""


@dataclass(frozen=True)
class Progress:
    """How far the preparation is. `total_bytes` is an estimate of the text to read, 0 where there is none."""

    stage: str
    message: str
    num_bytes: int = 0
    total_bytes: int = 0
    num_tokens: int = 0


Report = Callable[[Progress], None]


class PrepareFailed(SlmError):
    """The shards could not be written."""


def quiet(progress: Progress) -> None:
    """Reports nothing."""


def prepare(
    recipe: Recipe,
    data_root: Path,
    progress: Report = quiet,
    *,
    num_workers: int | None = None,
    verify: bool = False,
) -> Path:
    """The folder of the recipe's token shards, made if it is not there whole.

    Args:
        num_workers: Processes that encode; None chooses by the size of the corpus.
        verify: Check the SHA-256 of shards that are already there, not only their sizes.

    Raises:
        UserError: No such corpus, nothing in it, unreadable text, too little of it for the vocabulary or a window.
        PrepareFailed: The disk is full, or cannot be written.
    """
    name = fingerprint(recipe)
    folder = data_root / name
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        if faults(folder, verify=verify):
            with _only_one(data_root / f".{name}.lock", progress) as alone:
                found = faults(folder, verify=verify)
                if found:  # else another process made it while this one waited
                    if alone:
                        _remove_hidden(folder, "*")
                    if folder.exists():
                        progress(Progress("repair", f"{folder} is damaged ({found[0]}); preparing it again"))
                    _make(recipe, folder, progress, num_workers)
    except OSError as error:
        raise _not_written(data_root, error) from error
    index = read_index(folder)
    assert index is not None
    _check_windows(index, recipe.model.sequence_length)
    tokens = sum(source["num_tokens"] for source in index["splits"]["train"]["sources"])
    progress(Progress("ready", f"{tokens:,} training tokens in {folder}", num_tokens=tokens))
    return folder


def _make(recipe: Recipe, folder: Path, progress: Report, num_workers: int | None) -> None:
    """Build under a hidden name, then rename; what stood in the folder before is damaged and goes."""
    mark = f"{os.getpid()}-{os.urandom(4).hex()}"
    building = folder.with_name(f".{folder.name}-{mark}")
    building.mkdir()
    try:
        _build(recipe, building, progress, num_workers)
        if folder.exists():
            folder.replace(folder.with_name(f".{folder.name}-{mark}-damaged"))
        building.replace(folder)
        _sync_folder(folder.parent)
    finally:
        _remove_hidden(folder, f"{mark}*")


def _remove_hidden(folder: Path, pattern: str) -> None:
    for left in folder.parent.glob(f".{folder.name}-{pattern}"):
        shutil.rmtree(left, ignore_errors=True)


def _build(recipe: Recipe, folder: Path, progress: Report, num_workers: int | None) -> None:
    data = recipe.data
    corpus = open_corpus(data)
    limits = byte_limits(data, corpus)
    progress(Progress("tokenizer", f"training a tokenizer of {recipe.model.vocab_size} tokens"))
    tokenizer = train_tokenizer(_sample(data, corpus, limits), recipe.model.vocab_size, data.special_tokens)
    content = tokenizer.to_bytes()
    write_synced(folder / TOKENIZER_NAME, content)
    writers = {
        (split, source): SplitWriter(folder, split, source, tokenizer.vocab_size)
        for source in limits
        for split in SPLITS
    }
    total_bytes = sum(min(limit, corpus.num_bytes(source)) for source, limit in limits.items())
    workers = default_workers(total_bytes) if num_workers is None else num_workers
    read_bytes = num_tokens = next_report = 0
    with encoder(folder / TOKENIZER_NAME, workers) as encoded:
        for source, limit in limits.items():
            for text in encoded(_texts(data, corpus, source, limit)):
                split = "heldout" if text.heldout else "train"
                writers[split, source].append(text.tokens, text.num_bytes)
                read_bytes += text.num_bytes
                num_tokens += len(text.tokens) // TOKEN_BYTES
                if read_bytes >= next_report:
                    next_report = read_bytes + REPORT_BYTES
                    progress(Progress("encode", f"encoding {source}", read_bytes, total_bytes, num_tokens))
    _check_splits(data, writers)
    write_index(folder, _index(data, tokenizer.end_of_text, content, writers))


def _index(
    data: Data, end_of_text: int, tokenizer: bytes, writers: dict[tuple[str, str], SplitWriter]
) -> dict[str, Any]:
    """Its `fingerprint` is of the content, which a resumed run compares; the folder's name is of the request."""
    sources = list(dict.fromkeys(source for _, source in writers))
    raw = data.weights or {source: writers["train", source].num_tokens for source in sources}
    weights = {source: raw[source] / sum(raw[source] for source in sources) for source in sources}
    splits = {
        split: {"sources": [writers[split, source].finish(weights[source]) for source in sources]} for split in SPLITS
    }
    heldout = [writers["heldout", source] for source in sources]
    mix = [weights[source] for source in sources]
    tokenizer_sha256 = hashlib.sha256(tokenizer).hexdigest()
    whole = json.dumps([tokenizer_sha256, splits], sort_keys=True)
    return {
        "version": INDEX_VERSION,
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:32],
        "vocab_size": len(heldout[0].counts),
        "end_of_text": end_of_text,
        "tokenizer": TOKENIZER_NAME,
        "tokenizer_sha256": tokenizer_sha256,
        "bytes_per_token": sum(w * item.num_bytes / item.num_tokens for w, item in zip(mix, heldout, strict=True)),
        "heldout_unigram_entropy_nats": unigram_entropy_nats([item.counts for item in heldout], mix),
        "splits": splits,
    }


# ---------------------------------------------------------------- which text, and on which side


def byte_limits(data: Data, corpus: Corpus) -> dict[str, int]:
    """UTF-8 bytes to read of each source: `max_bytes` shared by weight, or by size where there are no weights."""
    sources = sorted(data.weights or corpus.sources())
    if data.max_bytes is None:
        return dict.fromkeys(sources, sys.maxsize)
    shares = data.weights or {source: float(corpus.num_bytes(source)) for source in sources}
    total = sum(shares.values())
    return {source: max(1, int(data.max_bytes * shares[source] / total)) for source in sources}


def is_heldout(group: bytes, fraction: float) -> bool:
    """Whether a group of documents is kept from training: a stable draw by its hash."""
    draw = int.from_bytes(hashlib.blake2b(group, digest_size=8, person=b"slm heldout").digest(), "big")
    return draw < fraction * 2**64


def _texts(data: Data, corpus: Corpus, source: str, limit: int) -> Iterator[Text]:
    """Documents of a source until the next would pass the limit; the first is always taken."""
    left = limit
    for document in corpus.documents(source):
        num_bytes = len(document.text.encode())
        if num_bytes > left and left < limit:
            return
        left -= num_bytes
        yield Text(document.text, num_bytes, is_heldout(document.group, data.heldout_fraction))


def _sample(data: Data, corpus: Corpus, limits: dict[str, int]) -> Iterator[str]:
    """Training text for the tokenizer, in the proportions of the corpus limits, never held-out text."""
    shares = {source: float(min(limit, corpus.num_bytes(source))) for source, limit in limits.items()}
    if data.weights is not None:
        shares = dict(data.weights)
    for source, limit in limits.items():
        left = data.tokenizer_sample_bytes * shares[source] / sum(shares.values())
        for text in _texts(data, corpus, source, limit):
            if text.heldout:
                continue
            yield text.text
            left -= text.num_bytes
            if left <= 0:
                break


def _check_splits(data: Data, writers: dict[tuple[str, str], SplitWriter]) -> None:
    for (split, source), writer in writers.items():
        if writer.num_documents:
            continue
        other = writers["heldout" if split == "train" else "train", source]
        if not other.num_documents:
            raise UserError(f"the corpus has no text of source {source!r}; add files, or leave it out of data.weights.")
        direction = "raise" if split == "heldout" else "lower"
        raise UserError(
            f"source {source!r} has {other.num_documents} documents, and with "
            f"data.heldout_fraction={data.heldout_fraction:g} none of them is {_PART[split]}; "
            f"{direction} data.heldout_fraction, or add text."
        )


_PART = {"heldout": "held out", "train": "left to train on"}


def _check_windows(index: dict[str, Any], sequence_length: int) -> None:
    """A window is a sequence and the token after it; each split of each source needs one."""
    for split in SPLITS:
        for source in index["splits"][split]["sources"]:
            longest = max((shard["num_tokens"] for shard in source["shards"]), default=0)
            if longest <= sequence_length:
                raise UserError(
                    f"source {source['name']!r} has {longest} tokens to be {_USED[split]}, but a sequence needs "
                    f"{sequence_length + 1}; add text, raise data.heldout_fraction, or lower model.sequence_length."
                )


_USED = {"heldout": "held out", "train": "trained on"}


# ---------------------------------------------------------------- files, locks, faults of the disk


@contextmanager
def _only_one(path: Path, progress: Report) -> Iterator[bool]:
    """Holds a lock that ends with this process, however it ends; yields False where the file system has no locks.

    Without locks two processes do the work twice, and the later rename replaces equal bytes by equal bytes.
    """
    import fcntl

    with path.open("w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(Progress("wait", "another process prepares the same data; waiting for it"))
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(data_root: Path, error: OSError) -> PrepareFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(data_root).free / 2**20
            return PrepareFailed(
                f"the disk of {data_root} is full ({free:.0f} MiB free); the shards need about one byte for every two "
                "bytes of text. Free some space, lower data.max_bytes, or set SLM_HOME to another disk."
            )
    return PrepareFailed(f"cannot write the prepared data to {data_root}: {error.strerror or error}; is it writable?")


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str]) -> int:
    """`python -m tasks prepare`: JSON lines on stdout, the last one `{"data_dir": ...}`; errors on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tasks prepare", description="Make a recipe's token shards.")
    parser.add_argument("--recipe-json", type=Path, required=True, help="the recipe as JSON")
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds prepared data")
    parser.add_argument("--workers", type=int, default=None, help="processes that encode (default: by corpus size)")
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of existing shards")
    options = parser.parse_args(argv)

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    try:
        if options.workers is not None and options.workers < 1:
            raise UserError(f"--workers {options.workers}: should be at least 1.")
        recipe = recipe_from_json(options.recipe_json)
        folder = prepare(
            recipe,
            options.data_root.absolute(),
            lambda progress: say(asdict(progress)),
            num_workers=options.workers,
            verify=options.verify,
        )
    except SlmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    say({"data_dir": str(folder)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

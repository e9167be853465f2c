"""Reads the texts of one corpus file: plain text, code, JSON lines (gzipped or not), Parquet.

Invariant: streamed, so a file of any size needs the memory of its largest text; what cannot be read is told with
its file and its line or row. Standard library only; pyarrow is imported where a .parquet file is met.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from cost.errors import UserError
from tasks.recipe.sections import END_OF_TEXT

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_FIELDS = ("text", "content")
"""Field or column that holds a row's text; the first that is there."""
PROSE_CHARACTERS = 16_384
"""A plain text file is cut into documents at the first blank line after this many characters."""
CODE_CHARACTERS = 262_144
PARQUET_ROWS = 256


class CorpusError(UserError):
    """The corpus is not there, or cannot be read."""


def suffix(path: Path) -> str | None:
    """The kind of a corpus file, None where it is no such file."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_texts(path: Path) -> Iterator[str]:
    """Every text of a file, blank ones included.

    Raises:
        CorpusError: The file is damaged; named with the line or row.
    """
    match suffix(path):
        case ".jsonl" | ".jsonl.gz":
            return _json_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case ".py":
            return _cut(path, CODE_CHARACTERS)
        case _:
            return _cut(path, PROSE_CHARACTERS)


def _cut(path: Path, num_characters: int) -> Iterator[str]:
    """Documents of a plain text file: cut at end-of-text lines, and where long, at blank lines.

    No text is lost: the documents joined are the file, without its end-of-text lines.
    """
    parts: list[str] = []
    length = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        while line := lines.readline(num_characters):
            is_end = line.strip() == END_OF_TEXT
            if not is_end:
                parts.append(line)
                length += len(line)
            blank = not line.strip()
            if is_end or (blank and length >= num_characters) or length >= 4 * num_characters:
                yield "".join(parts)
                parts, length = [], 0
    yield "".join(parts)


def _json_rows(path: Path) -> Iterator[str]:
    number = 0
    with gzip.open(path, "rb") if suffix(path) == ".jsonl.gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(line, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise CorpusError(f"{path}:{number + 1}: the gzip stream is damaged ({error}); fetch it again.") from None


def _text_of(line: bytes, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{place}: not JSON ({error}); each line should be an object with a text.") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{place}: should be an object with a field text or content, but is {type(row).__name__}.")
    name = next((name for name in TEXT_FIELDS if name in row), None)
    if name is None:
        raise CorpusError(f"{place}: has no field {' or '.join(TEXT_FIELDS)}; it has {', '.join(row) or 'none'}.")
    if not isinstance(row[name], str):
        raise CorpusError(f"{place}: field {name} should be a text, but is {type(row[name]).__name__}.")
    return str(row[name])


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"{path} needs pyarrow; install it with pip install 'slm-spot[train]'.") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            column = next((name for name in TEXT_FIELDS if name in names), None)
            if column is None:
                raise CorpusError(f"{path}: has no column {' or '.join(TEXT_FIELDS)}; it has {', '.join(names)}.")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if isinstance(value, str):
                        yield value
                    elif value is not None:
                        kind = type(value).__name__
                        raise CorpusError(f"{path}: row {number}: column {column} should be text, but is {kind}.")
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: row {number + 1}: not readable as Parquet ({error}); fetch it again.") from None

"""Text as documents: the Python standard library of this machine, or files and folders of text.

Invariant: documents come in an order that depends only on the files' names and content, and each carries the key
that decides whether it is held out, so that a text and its exact copy, or a module's code and its docstrings, are
on the same side. Imports no numpy or torch: the fingerprint of a recipe's data needs this module.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.data.readers import SUFFIXES, CorpusError, read_texts, suffix
from tasks.recipe.schema import Recipe
from tasks.recipe.sections import PLAIN_SOURCES, STDLIB_CORPUS, Data

CODE_SUFFIXES = (".py",)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "idlelib", "lib2to3", "turtledemo"})
"""Not everywhere installed (tests), or tables rather than text (encodings)."""
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True, slots=True)
class Document:
    """`group` names what must stay on one side of the held-out split; it is hashed."""

    text: str
    group: bytes


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """`name` is the path below the corpus path that it was found under: the same on another machine."""

    source: str
    path: Path
    name: str
    num_bytes: int
    modified_ns: int


class Corpus(Protocol):
    """Sources of text, read as documents."""

    files: Sequence[CorpusFile]

    def sources(self) -> list[str]:
        """Names of the sources that are there, sorted."""
        ...

    def documents(self, source: str) -> Iterator[Document]:
        """Every document of a source, in a fixed order."""
        ...

    def num_bytes(self, source: str) -> int:
        """About how much text a source has: the size of its files."""
        ...


def open_corpus(data: Data) -> Corpus:
    """Find the corpus that a recipe names; no text is read yet.

    Raises:
        CorpusError: A path does not exist, is of an unknown kind, or holds no text.
    """
    if data.corpus == STDLIB_CORPUS:
        return StandardLibrary(find_standard_library(Path(sysconfig.get_path("stdlib"))))
    return TextFiles(find_files(data))


def corpus_identity(data: Data) -> str:
    """Changes when the corpus may have changed: names and sizes of its files, and when they were written.

    The standard library's files are dated by their installation, so there the Python version stands instead.
    """
    corpus = open_corpus(data)
    if data.corpus == STDLIB_CORPUS:
        seen: list[Any] = [platform.python_version(), *((file.name, file.num_bytes) for file in corpus.files)]
    else:
        seen = [(file.source, file.name, file.num_bytes, file.modified_ns) for file in corpus.files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


# ---------------------------------------------------------------- the standard library


def find_standard_library(folder: Path) -> list[CorpusFile]:
    """Source files below a `lib/python3.N` folder, tests and tables left out.

    Raises:
        CorpusError: This Python came without the source of its library.
    """
    files = [
        _corpus_file("code", path, path.relative_to(folder).as_posix())
        for path in _walk(folder, SKIPPED_FOLDERS | STDLIB_SKIPPED)
        if path.suffix == ".py"
    ]
    if not files:
        raise CorpusError(
            f"this Python has no library source in {folder}; use another Python, or point data.corpus at text files, "
            "such as --set data.corpus=my_texts/"
        )
    return sorted(files, key=_shuffled)


@dataclass
class StandardLibrary:
    """Source "code": the library's files. Source "text": their docstrings, one document a module, and pydoc's topics.

    Both sources of a module are one group. The text is small (about 9 MB), so it is parsed once and kept.
    """

    files: Sequence[CorpusFile]
    _prose: list[Document] | None = field(default=None, repr=False)

    def sources(self) -> list[str]:
        """Both."""
        return sorted(PLAIN_SOURCES)

    def documents(self, source: str) -> Iterator[Document]:
        """Every document of "text" or "code"."""
        if source == "text":
            if self._prose is None:
                self._prose = list({document.text: document for document in self._read_prose()}.values())
            return iter(self._prose)
        return (Document(text, file.name.encode()) for file, text in self._read() if file.name != TOPICS)

    def num_bytes(self, source: str) -> int:
        """Size of the files; prose is about a fifth of the code."""
        total = sum(file.num_bytes for file in self.files)
        return total // 5 if source == "text" else total

    def _read(self) -> Iterator[tuple[CorpusFile, str]]:
        seen: set[bytes] = set()
        for file in self.files:
            try:
                content = file.path.read_bytes()
            except OSError as error:
                raise _unreadable(file.path, error) from None
            digest = hashlib.sha256(content).digest()
            if content.strip() and digest not in seen:  # a copy under another name would be another group
                seen.add(digest)
                yield file, content.decode("utf-8", "replace")

    def _read_prose(self) -> Iterator[Document]:
        for file, text in self._read():
            tree = _parse_quietly(text)
            if tree is None:
                continue
            if file.name == TOPICS:
                for topic in _string_values(tree):
                    yield Document(topic, topic.encode())
            elif docstrings := list(_docstrings(tree)):
                yield Document("\n\n".join(docstrings) + "\n", file.name.encode())


def _parse_quietly(text: str) -> ast.Module | None:
    """Parse a module; None if it is for another Python. Source may hold escapes that draw a warning."""
    with warnings.catch_warnings(), _no_garbage_collection():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A syntax tree is many small objects without cycles: the collector takes a third of the parsing time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _string_values(tree: ast.Module) -> Iterator[str]:
    """Values of the dictionary that pydoc keeps its topics in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
                    yield value.value


# ---------------------------------------------------------------- files and folders


def find_files(data: Data) -> list[CorpusFile]:
    """Every text file under the recipe's corpus paths, in an order shuffled by name.

    Raises:
        CorpusError: A path does not exist, is of an unknown kind, or holds no text.
    """
    files: list[CorpusFile] = []
    if isinstance(data.corpus, dict):
        for source, paths in data.corpus.items():
            files += [file for path in paths for file in _find(Path(path), source)]
    else:
        paths = (data.corpus,) if isinstance(data.corpus, str) else data.corpus
        files += [file for path in paths for file in _find(Path(path), None)]
    wanted = data.weights or {file.source: 1.0 for file in files}
    there = sorted({file.source for file in files})
    for source in wanted:
        if source not in there:
            raise CorpusError(
                f"the corpus has no source {source!r}, which data.weights asks for; it has {', '.join(there)}. "
                "Leave it out of data.weights, or add its files."
            )
    return sorted((file for file in files if file.source in wanted), key=_shuffled)


@dataclass
class TextFiles:
    """Documents of .txt, .md, .py, .jsonl, .jsonl.gz and .parquet files."""

    files: Sequence[CorpusFile]

    def sources(self) -> list[str]:
        """Names of the sources that have files, sorted."""
        return sorted({file.source for file in self.files})

    def documents(self, source: str) -> Iterator[Document]:
        """Every document of a source that is not blank.

        Raises:
            CorpusError: A file is damaged; named with the line or row.
        """
        for file in self.files:
            if file.source != source:
                continue
            try:
                for text in read_texts(file.path):
                    content = text.encode("utf-8", "replace")  # JSON can hold half a character
                    if content.strip():
                        yield Document(content.decode(), content)
            except OSError as error:
                raise _unreadable(file.path, error) from None

    def num_bytes(self, source: str) -> int:
        """Size of the source's files, as they are stored."""
        return sum(file.num_bytes for file in self.files if file.source == source)


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"cannot read {path}: {error.strerror or error}; check its permissions.")


def _find(path: Path, source: str | None) -> Iterator[CorpusFile]:
    try:
        yield from _found(path, source)
    except OSError as error:
        raise _unreadable(Path(error.filename or path), error) from None


def _found(path: Path, source: str | None) -> Iterator[CorpusFile]:
    if not path.exists():
        raise CorpusError(
            f"no such corpus path: {path}. data.corpus takes {STDLIB_CORPUS}, or files and folders of "
            f"{', '.join(SUFFIXES)}; change it with --set data.corpus=PATH."
        )
    if path.is_file():
        if suffix(path) is None:
            raise CorpusError(f"{path} is of an unknown kind; a corpus file is one of {', '.join(SUFFIXES)}.")
        yield _corpus_file(source or _plain_source(path), path, path.name)
        return
    found = [file for file in _walk(path, SKIPPED_FOLDERS) if suffix(file) is not None]
    if not found:
        raise CorpusError(f"the corpus folder {path} holds no {', '.join(SUFFIXES)} file.")
    for file in found:
        yield _corpus_file(source or _plain_source(file), file, file.relative_to(path).as_posix())


def _corpus_file(source: str, path: Path, name: str) -> CorpusFile:
    status = path.stat()
    return CorpusFile(source, path, name, status.st_size, status.st_mtime_ns)


def _walk(folder: Path, skipped: Iterable[str]) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would leave an unreadable folder out without a word

    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _shuffled(file: CorpusFile) -> tuple[bytes, str, str]:
    """Sorts by a hash of the name, so that a bounded corpus is a sample and not the alphabet's beginning."""
    return hashlib.blake2b(file.name.encode(), digest_size=8).digest(), file.name, file.source


def _plain_source(path: Path) -> str:
    text, code = PLAIN_SOURCES
    return code if path.suffix.lower() in CODE_SUFFIXES else text


def fingerprint(recipe: Recipe) -> str:
    """Names the prepared data: equal for recipes, and states of the corpus, that give equal shards."""
    part = {
        "format": 1,
        "data": recipe.data.model_dump(mode="json", exclude={"corpus"}),
        "vocab_size": recipe.model.vocab_size,
        "corpus": corpus_identity(recipe.data),
    }
    text = json.dumps(part, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

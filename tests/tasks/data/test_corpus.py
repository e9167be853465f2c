"""Every kind of corpus file is read whole and in order, and what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from tasks.data.corpus import StandardLibrary, find_standard_library, open_corpus
from tasks.data.readers import PROSE_CHARACTERS, CorpusError
from tasks.recipe.sections import Data

TOPICS_SOURCE = "topics = {'if': 'The if statement.\\n', 'blank': ' ', 'for': 'The for statement.\\n'}\n"


def texts(path: Path | str, source: str = "text") -> list[str]:
    corpus = open_corpus(Data(corpus=str(path)))
    return [document.text for document in corpus.documents(source)]


def rows(path: Path, *objects: object) -> Path:
    content = "".join(json.dumps(item) + "\n" for item in objects).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_short_text_file_is_one_document_byte_for_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("one\r\n\ntwo é\n".encode())
    assert texts(tmp_path / name) == ["one\r\n\ntwo é\n"]


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraph = "word " * 400 + "\n\n"
    whole = paragraph * 40
    (tmp_path / "a.txt").write_text(whole)
    documents = texts(tmp_path / "a.txt")
    assert len(documents) == 5
    assert "".join(documents) == whole
    assert all(document.endswith("\n\n") and len(document) > PROSE_CHARACTERS for document in documents[:-1])


def test_a_text_file_of_one_endless_line_is_cut(tmp_path: Path) -> None:
    whole = "x" * (10 * PROSE_CHARACTERS)
    (tmp_path / "a.txt").write_text(whole)
    documents = texts(tmp_path / "a.txt")
    assert [len(document) for document in documents] == [
        4 * PROSE_CHARACTERS,
        4 * PROSE_CHARACTERS,
        2 * PROSE_CHARACTERS,
    ]


def test_end_of_text_lines_part_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert texts(tmp_path / "a.txt") == ["one\n", "two\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_json_line_is_a_document(tmp_path: Path, name: str) -> None:
    path = rows(tmp_path / name, {"text": "one"}, {"content": "two", "id": 2}, {"text": "  "}, {"text": "thr\u00e9e"})
    assert texts(path) == ["one", "two", "thrée"]


def test_half_a_character_in_json_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a?b"]


@pytest.mark.parametrize("column", ["text", "content"])
def test_each_parquet_row_is_a_document(tmp_path: Path, column: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [f"row {number}" for number in range(600)] + [None, ""]
    parquet.write_table(pyarrow.table({"id": list(range(602)), column: values}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [f"row {number}" for number in range(600)]


def test_a_folder_is_read_whole_in_an_order_by_name_alone(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / f"part{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(f"text {number}\n")
    (tmp_path / "part0" / "image.png").write_bytes(b"\x00")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.txt").write_text("cached")
    first = texts(tmp_path)
    assert sorted(first) == sorted(f"text {number}\n" for number in range(12))
    assert first != sorted(first)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert texts(moved) == first


def test_python_files_are_code_and_the_rest_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "a.md").write_text("prose\n")
    assert texts(tmp_path, "code") == ["print(1)\n"]
    assert texts(tmp_path, "text") == ["prose\n"]


def test_a_mapping_names_its_sources(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    paths = {"first": (str(tmp_path / "a.txt"),), "second": (str(tmp_path / "b.txt"), str(tmp_path / "c.txt"))}
    corpus = open_corpus(Data(corpus=paths))
    assert corpus.sources() == ["first", "second"]
    assert sorted(document.text for document in corpus.documents("second")) == ["b", "c"]
    assert corpus.num_bytes("second") == 2


def test_a_source_without_a_weight_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "a.md").write_text("prose\n")
    assert open_corpus(Data(corpus=str(tmp_path), weights={"code": 1.0})).sources() == ["code"]


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON ("),
        ("[1]", "should be an object with a field text or content, but is list"),
        ('{"txt": "a", "id": 1}', "has no field text or content; it has txt, id"),
        ("{}", "it has none"),
        ('{"text": 5}', "field text should be a text, but is int"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_wrong_json_line_is_named_with_its_number(tmp_path: Path, name: str, line: str, message: str) -> None:
    path = tmp_path / name
    content = f'{{"text": "fine"}}\n\n{line}\n'.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(CorpusError) as caught:
        texts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"no gzip at all\n"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: object) -> None:
    path = rows(tmp_path / "a.jsonl.gz", *({"text": os.urandom(50).hex()} for _ in range(50)))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz:\d+: the gzip stream is damaged .*; fetch it again"):
        texts(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CorpusError, match=r"a\.parquet: row 1: not readable as Parquet"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a"], "id": [1]}, "a.parquet: has no column text or content; it has txt, id."),
        ({"text": [1, 2]}, "a.parquet: row 1: column text should be text, but is int."),
    ],
)
def test_parquet_without_text_is_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CorpusError) as caught:
        texts(tmp_path / "a.parquet")
    assert message in str(caught.value)


def test_a_path_that_does_not_exist_is_named_with_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no such corpus path: .*gone\. data.corpus takes stdlib, or files"):
        texts(tmp_path / "gone")


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"a\.pdf is of an unknown kind; a corpus file is one of \.txt, \.md"):
        texts(tmp_path / "a.pdf")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"the corpus folder .* holds no \.txt, \.md"):
        texts(tmp_path)


def test_a_weight_without_its_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("prose\n")
    with pytest.raises(CorpusError, match=r"the corpus has no source 'code', which data.weights asks for; it has text"):
        open_corpus(Data(corpus=str(tmp_path), weights={"code": 1.0}))


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("prose\n")
    corpus = open_corpus(Data(corpus=str(tmp_path)))
    (tmp_path / "a.md").unlink()
    with pytest.raises(CorpusError, match=r"cannot read .*a\.md: No such file or directory; check its permissions"):
        list(corpus.documents("text"))


# ---------------------------------------------------------------- the standard library


def make_library(folder: Path) -> StandardLibrary:
    files = {
        "one.py": '"""Module one."""\n\nclass A:\n    """Class A."""\n\n    def f(self):\n        "Method f."\n',
        "two.py": "x = 1  # no docstring\n",
        "copy.py": "x = 1  # no docstring\n",
        "old.py": "print 'for another Python'\n",
        "empty.py": "\n",
        "pydoc_data/topics.py": TOPICS_SOURCE,
        "test/test_one.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not the library."""\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return StandardLibrary(find_standard_library(folder))


def test_the_librarys_prose_is_docstrings_by_module_and_topics(tmp_path: Path) -> None:
    library = make_library(tmp_path)
    prose = {document.text: document.group for document in library.documents("text")}
    assert set(prose) == {"Module one.\n\nClass A.\n\nMethod f.\n", "The if statement.\n", "The for statement.\n"}
    assert prose["Module one.\n\nClass A.\n\nMethod f.\n"] == b"one.py"


def test_the_librarys_code_is_each_module_once_without_tests_and_topics(tmp_path: Path) -> None:
    code = [document.text for document in make_library(tmp_path).documents("code")]
    assert sorted(text.split()[0] for text in code) == ['"""Module', "print", "x"]


def test_a_module_and_its_docstrings_are_one_group(tmp_path: Path) -> None:
    library = make_library(tmp_path)
    code = {document.group for document in library.documents("code")}
    assert {document.group for document in library.documents("text")} & code == {b"one.py"}


def test_a_python_without_library_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"this Python has no library source in .*; use another Python, or point"):
        find_standard_library(tmp_path)


def test_this_pythons_library_has_both_prose_and_code() -> None:
    corpus = open_corpus(Data())
    assert corpus.sources() == ["code", "text"]
    assert corpus.num_bytes("code") > 5_000_000
    assert next(iter(corpus.documents("code"))).text

"""Prepared data is whole or absent, the same bytes for the same input, and never trains on what is held out."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost.errors import UserError
from tasks.data import shards
from tasks.data.corpus import fingerprint
from tasks.data.encode import EncodingFailed, Text, default_workers, encoder
from tasks.data.prepare import PrepareFailed, Progress, is_heldout, main, prepare
from tasks.data.shards import SplitWriter, faults, read_index, unigram_entropy_nats
from tasks.data.tokenizer import load_tokenizer
from tasks.recipe.load import RECIPE_FOLDER, load_recipe
from tasks.recipe.schema import Recipe

PROJECT = RECIPE_FOLDER.parent.parent
NUM_DOCUMENTS = 120


def make_corpus(folder: Path, num_documents: int = NUM_DOCUMENTS) -> Path:
    """Text and code of made-up words, one JSON line or file a document."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(80)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(draw.choices(words, k=60)) + f" {number}" for number in range(num_documents)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for number in range(num_documents // 3):
        code = "\n".join(f"{draw.choice(words)} = {draw.choice(words)}({number})" for _ in range(20))
        (folder / f"{number}.py").write_text(code + "\n")
    return folder


def make_recipe(corpus: Path, *overrides: str) -> Recipe:
    fixed = ["model.vocab_size=300", "model.sequence_length=32", "data.heldout_fraction=0.2", "data.max_bytes=null"]
    return load_recipe("demo", [f"data.corpus={corpus}", *fixed, *overrides])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(folder: Path, split: str, source: str) -> list[str]:
    """Decoded documents of one split, as the shards have them."""
    index = read_index(folder)
    assert index is not None
    entry = next(item for item in index["splits"][split]["sources"] if item["name"] == source)
    tokens = np.concatenate([np.fromfile(folder / shard["file"], dtype="<u2") for shard in entry["shards"]])
    starts = np.load(folder / entry["documents"])
    ends = [*starts[1:].tolist(), len(tokens)]
    encoding = load_tokenizer(folder / index["tokenizer"])
    assert all(tokens[end - 1] == index["end_of_text"] for end in ends)
    assert int((tokens == index["end_of_text"]).sum()) == len(starts) == entry["num_documents"]
    assert entry["num_tokens"] == len(tokens)
    spans = zip(starts.tolist(), ends, strict=True)
    return [encoding.decode(tokens[start : end - 1].tolist()) for start, end in spans]


# ---------------------------------------------------------------- what is in the shards


def test_every_document_is_in_exactly_one_split_byte_for_byte(corpus: Path, tmp_path: Path) -> None:
    folder = prepare(make_recipe(corpus), tmp_path / "data")
    rows = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    train, heldout = documents(folder, "train", "text"), documents(folder, "heldout", "text")
    assert sorted(train + heldout) == sorted(rows)
    assert not set(train) & set(heldout)
    assert 0.1 * NUM_DOCUMENTS < len(heldout) < 0.3 * NUM_DOCUMENTS
    code = documents(folder, "train", "code") + documents(folder, "heldout", "code")
    assert sorted(code) == sorted(path.read_text() for path in corpus.glob("*.py"))


def test_a_copy_of_a_document_is_on_the_same_side(corpus: Path, tmp_path: Path) -> None:
    rows = (corpus / "a.jsonl").read_text()
    (corpus / "copy.jsonl").write_text(rows)
    folder = prepare(make_recipe(corpus), tmp_path / "data")
    train, heldout = documents(folder, "train", "text"), documents(folder, "heldout", "text")
    assert len(train) + len(heldout) == 2 * NUM_DOCUMENTS
    assert not set(train) & set(heldout)


def test_a_held_out_module_lends_no_docstring_to_training(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["data.max_bytes=1_500_000", "data.heldout_fraction=0.2"])
    folder = prepare(recipe, tmp_path / "data")
    code = "\n".join(documents(folder, "train", "code"))
    heldout = documents(folder, "heldout", "text")
    assert len(heldout) > 20
    long = [line for text in heldout for line in text.splitlines() if len(line) > 60]
    assert len(long) > 100
    assert sum(line in code for line in long) < 0.02 * len(long)
    assert not set(documents(folder, "train", "text")) & set(heldout)


def test_what_was_held_out_stays_held_out_when_the_corpus_grows(corpus: Path, tmp_path: Path) -> None:
    before = set(documents(prepare(make_recipe(corpus), tmp_path / "data"), "heldout", "text"))
    (corpus / "more.txt").write_text("another text of many words\n" * 30)
    after = set(documents(prepare(make_recipe(corpus), tmp_path / "data"), "heldout", "text"))
    assert before <= after


def test_the_tokenizer_never_sees_held_out_text(corpus: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    secret = "ZQXJKVZQXJKV" * 40
    changed = [f"{row} {secret}" for row in rows]
    marked = [new if is_heldout(new.encode(), 0.2) else old for old, new in zip(rows, changed, strict=True)]
    assert any(secret in row for row in marked)
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in marked))
    folder = prepare(make_recipe(corpus), tmp_path / "data")
    encoding = load_tokenizer(folder / "tokenizer.json")
    assert not any(b"ZQ" in token for token in encoding.token_byte_values())


def test_max_bytes_bounds_the_text_by_weight(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus, "data.max_bytes=20_000", "data.weights={text: 3, code: 1}")
    index = read_index(prepare(recipe, tmp_path / "data"))
    assert index is not None
    sizes = {
        name: sum(
            item["num_bytes"] for split in index["splits"].values() for item in split["sources"] if item["name"] == name
        )
        for name in ("text", "code")
    }
    assert 14_000 < sizes["text"] <= 15_000
    assert 4_000 < sizes["code"] <= 5_000


def test_the_index_says_what_the_shards_are(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus)
    folder = prepare(recipe, tmp_path / "data")
    index = read_index(folder)
    assert index is not None
    assert folder.name == fingerprint(recipe)
    assert index["vocab_size"] == 300
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == index["tokenizer_sha256"]
    for split in index["splits"].values():
        assert {item["name"]: item["weight"] for item in split["sources"]} == {"code": 0.3, "text": 0.7}
        for shard in (shard for item in split["sources"] for shard in item["shards"]):
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    heldout = {item["name"]: item for item in index["splits"]["heldout"]["sources"]}
    ratio = {name: item["num_bytes"] / item["num_tokens"] for name, item in heldout.items()}
    assert index["bytes_per_token"] == pytest.approx(0.7 * ratio["text"] + 0.3 * ratio["code"])


def test_without_weights_each_source_counts_by_its_tokens(corpus: Path, tmp_path: Path) -> None:
    index = read_index(prepare(make_recipe(corpus, "data.weights=null"), tmp_path / "data"))
    assert index is not None
    sources = index["splits"]["train"]["sources"]
    total = sum(source["num_tokens"] for source in sources)
    assert {source["name"]: source["weight"] for source in sources} == {
        source["name"]: source["num_tokens"] / total for source in sources
    }


def test_the_trainer_reads_what_is_prepared(corpus: Path, tmp_path: Path) -> None:
    data = pytest.importorskip("trainer.data.loader")
    folder = prepare(make_recipe(corpus), tmp_path / "data")
    tokens = data.TokenShards(folder, "train", 32)
    assert sorted(tokens.names) == ["code", "text"]
    assert min(tokens.num_windows) > 10
    assert tokens.index.heldout_unigram_entropy > 3


def test_unigram_entropy_is_of_the_weighted_mix() -> None:
    counts = [np.array([4, 0, 0]), np.array([0, 1, 1])]
    assert unigram_entropy_nats(counts, [1.0, 0.0]) == 0
    assert unigram_entropy_nats(counts, [0.0, 2.0]) == pytest.approx(np.log(2))
    assert unigram_entropy_nats(counts, [1.0, 2.0]) == pytest.approx(np.log(3))


def test_shards_close_at_a_document_and_keep_the_stream(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", "text", 10, shard_tokens=5)
    for length in (3, 3, 7, 2):
        writer.append(np.arange(length, dtype=np.uint16).tobytes(), 2 * length)
    entry = writer.finish(0.5)
    assert [shard["num_tokens"] for shard in entry["shards"]] == [6, 7, 2]
    assert np.load(tmp_path / entry["documents"]).tolist() == [0, 3, 6, 13]
    assert (entry["num_tokens"], entry["num_bytes"], entry["num_documents"]) == (15, 30, 4)
    assert np.fromfile(tmp_path / "train-text-00000.bin", dtype="<u2").tolist() == [0, 1, 2, 0, 1, 2]


# ---------------------------------------------------------------- the same, every time


def test_the_same_input_gives_the_same_bytes_anywhere(corpus: Path, tmp_path: Path) -> None:
    first = prepare(make_recipe(corpus), tmp_path / "one")
    moved = corpus.rename(tmp_path / "moved")
    second = prepare(make_recipe(moved), tmp_path / "two")
    assert first.name == second.name
    assert content(first) == content(second)


def test_two_processes_encode_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.encode.BATCH_CHARACTERS", 5_000)
    recipe = make_recipe(make_corpus(tmp_path / "corpus"))
    item = prepare(recipe, tmp_path / "one", num_workers=1)
    two = prepare(recipe, tmp_path / "two", num_workers=2)
    assert content(item) == content(two)


def test_a_run_can_go_on_with_a_copy_of_its_corpus_but_not_with_another(corpus: Path, tmp_path: Path) -> None:
    def prepared() -> tuple[str, str]:
        folder = prepare(make_recipe(corpus), tmp_path / "data")
        index = read_index(folder)
        assert index is not None
        return folder.name, index["fingerprint"]

    request, content_before = prepared()
    os.utime(corpus / "0.py", ns=(0, 0))
    request_of_copy, content_of_copy = prepared()
    assert request_of_copy != request
    assert content_of_copy == content_before
    (corpus / "0.py").write_text("changed = True\n")
    assert prepared()[1] != content_before


def test_prepared_data_is_reused(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus)
    folder = prepare(recipe, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    seen: list[Progress] = []
    assert prepare(recipe, tmp_path / "data", seen.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [progress.stage for progress in seen] == ["ready"]


def test_progress_comes_in_order_and_ends_ready(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    prepare(make_recipe(corpus), tmp_path / "data", seen.append)
    stages = [progress.stage for progress in seen]
    assert stages[0] == "tokenizer" and stages[-1] == "ready" and "encode" in stages
    assert seen[-1].num_tokens > 1000


# ---------------------------------------------------------------- damage and sudden ends


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("train-text-00000.bin", truncate, "train-text-00000.bin has "),
        ("heldout-code-00000.bin", Path.unlink, "heldout-code-00000.bin is missing"),
        ("train-text-docs.npy", Path.unlink, "train-text-docs.npy is missing"),
        ("tokenizer.json", flip, "tokenizer.json is missing or damaged"),
        ("index.json", truncate, "index.json is missing or damaged"),
        ("index.json", Path.unlink, "index.json is missing or damaged"),
        ("index.json", lambda path: path.write_text('{"version": 1}'), "index.json is damaged ("),
    ],
)
def test_damaged_data_is_noticed_and_made_again(
    corpus: Path, tmp_path: Path, name: str, damage: Any, fault: str
) -> None:
    recipe = make_recipe(corpus)
    folder = prepare(recipe, tmp_path / "data")
    whole = content(folder)
    damage(folder / name)
    assert faults(folder)[0].startswith(fault)
    seen: list[Progress] = []
    assert prepare(recipe, tmp_path / "data", seen.append) == folder
    assert content(folder) == whole
    assert seen[0].stage == "repair" and fault in seen[0].message
    assert hidden(tmp_path / "data") == []


def test_a_changed_byte_is_noticed_when_asked(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus)
    folder = prepare(recipe, tmp_path / "data")
    whole = content(folder)
    flip(folder / "train-text-00000.bin")
    assert faults(folder) == []
    assert "another SHA-256" in faults(folder, verify=True)[0]
    prepare(recipe, tmp_path / "data", verify=True)
    assert content(folder) == whole


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]


def command(recipe: Recipe, tmp_path: Path, *options: str) -> list[str]:
    path = tmp_path / "recipe.json"
    path.write_text(recipe.canonical_json())
    program = [sys.executable, "-m", "tasks.data.prepare", "--recipe-json", str(path)]
    return [*program, "--data-root", str(tmp_path / "data"), *options]


def start(recipe: Recipe, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(recipe, tmp_path, *options), cwd=PROJECT, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("num_lines", [1, 2, 4])
def test_a_kill_at_any_moment_is_repaired_by_the_next_run(tmp_path: Path, num_lines: int) -> None:
    recipe = make_recipe(make_corpus(tmp_path / "corpus", 12_000))
    process = start(recipe, tmp_path)
    assert process.stdout is not None
    for _ in range(num_lines):
        assert "stage" in json.loads(process.stdout.readline())
    process.kill()
    process.communicate(timeout=120)
    assert not (tmp_path / "data" / fingerprint(recipe)).exists()
    assert len(hidden(tmp_path / "data")) == 1
    folder = prepare(recipe, tmp_path / "data")
    assert faults(folder, verify=True) == []
    assert hidden(tmp_path / "data") == []


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    recipe = make_recipe(make_corpus(tmp_path / "corpus", 20_000))
    process = start(recipe, tmp_path, "--workers", "2")
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["stage"] != "encode":
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait(timeout=120)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_two_at_once_make_the_data_once(tmp_path: Path) -> None:
    recipe = make_recipe(make_corpus(tmp_path / "corpus", 6_000))
    both = [start(recipe, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    folder = tmp_path / "data" / fingerprint(recipe)
    lines = [[json.loads(line) for line in out.splitlines()] for out, _ in results]
    assert [line[-1] for line in lines] == [{"data_dir": str(folder)}] * 2
    trained = [any(line.get("stage") == "tokenizer" for line in each_line) for each_line in lines]
    assert sorted(trained) == [False, True]
    assert faults(folder, verify=True) == []


def test_one_that_waits_says_so(corpus: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    recipe = make_recipe(corpus)
    root = tmp_path / "data"
    root.mkdir()
    with (root / f".{fingerprint(recipe)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(recipe, tmp_path)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["stage"] == "wait"
    output, _ = process.communicate(timeout=120)
    assert json.loads(output.splitlines()[-1])["data_dir"].startswith(str(root))


def test_a_file_system_without_locks_is_no_obstacle(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = prepare(make_recipe(corpus), tmp_path / "data")
    assert faults(folder) == []


def test_a_full_disk_leaves_nothing_and_says_what_to_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_sync", full)
    with pytest.raises(PrepareFailed, match=r"the disk of .* is full \(\d+ MiB free\).*set SLM_HOME to another disk"):
        prepare(make_recipe(corpus), tmp_path / "data")
    assert hidden(tmp_path / "data") == []
    monkeypatch.undo()
    assert faults(prepare(make_recipe(corpus), tmp_path / "data")) == []


def test_a_root_that_cannot_be_a_folder_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareFailed, match=r"cannot write the prepared data to .*; is it writable"):
        prepare(make_recipe(corpus), tmp_path / "file" / "data")


# ---------------------------------------------------------------- requests that cannot be met


def test_too_few_documents_to_hold_one_out_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words and more words to learn from\n" * 30)
    recipe = make_recipe(tmp_path / "a.txt", "data.weights=null", "model.vocab_size=260")
    with pytest.raises(UserError, match=r"source 'text' has 1 documents, and with data.heldout_fraction=0.2 none of"):
        prepare(recipe, tmp_path / "data")
    assert hidden(tmp_path / "data") == []


def test_an_empty_corpus_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    recipe = make_recipe(tmp_path / "a.txt", "data.weights=null", "model.vocab_size=257")
    with pytest.raises(UserError, match=r"the corpus has no text of source 'text'"):
        prepare(recipe, tmp_path / "data")


def test_too_large_a_vocabulary_says_so(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size=60000 is too large for this corpus"):
        prepare(make_recipe(corpus, "model.vocab_size=60000"), tmp_path / "data")


def test_too_long_a_sequence_says_so_even_for_data_that_is_there(corpus: Path, tmp_path: Path) -> None:
    prepare(make_recipe(corpus), tmp_path / "data")
    with pytest.raises(UserError, match=r"source 'code' has \d+ tokens to be held out, but a sequence needs 5001"):
        prepare(make_recipe(corpus, "model.sequence_length=5000"), tmp_path / "data")


def test_a_dead_worker_is_no_traceback(tmp_path: Path) -> None:
    with (
        pytest.raises(EncodingFailed, match=r"a process that encodes text died \(one of 2\).*--workers 1"),
        encoder(tmp_path / "gone.json", 2) as encoded,
    ):
        list(encoded([Text("a", 1, False)]))


def test_processes_are_started_only_for_much_text() -> None:
    assert default_workers(8_000_000) == 1
    assert 1 <= default_workers(10**12) <= (os.cpu_count() or 1)


# ---------------------------------------------------------------- the command


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Any], str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_command_ends_with_the_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(make_recipe(corpus), tmp_path)[3:]
    code, lines, error = run(argv, capsys)
    assert (code, error) == (0, "")
    assert faults(Path(lines[-1]["data_dir"])) == []
    assert {"stage", "message", "num_bytes", "total_bytes", "num_tokens"} == set(lines[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--workers", "0"], "--workers 0: should be at least 1"), (["--recipe-json", "gone"], "cannot read the recipe")],
)
def test_a_mistake_at_the_command_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, lines, error = run([*command(make_recipe(corpus), tmp_path)[3:], *options], capsys)
    assert code == 2 and lines == []
    assert error.startswith(message) and error.count("\n") == 1


def test_a_missing_corpus_at_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, error = run(command(make_recipe(tmp_path / "gone"), tmp_path)[3:], capsys)
    assert code == 2 and lines == []
    assert error.startswith("no such corpus path: ") and "Traceback" not in error

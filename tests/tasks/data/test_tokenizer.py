"""The tokenizer gives back the exact text, agrees with the one that trained it, and refuses what it cannot do."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.tokenizer import (
    PATTERN,
    PIECE_CHARACTERS,
    Tokenizer,
    TokenizerError,
    VocabularyTooLarge,
    encode,
    encode_bytes,
    encode_to_numpy,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from tasks.recipe.sections import END_OF_TEXT

VOCAB_SIZE = 400


def sample_texts() -> list[str]:
    """Words of a small alphabet with accents, digits, code and blank lines."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdeé 1\n_(){}ß日", k=draw.randint(1, 7))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=60)) for _ in range(40)]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(sample_texts()), VOCAB_SIZE, [END_OF_TEXT, "<|other|>"])


def _joined(parts: tuple[str, bytes]) -> bytes:
    return parts[0].encode() + parts[1] + parts[0].encode()


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_byte_for_byte(text: str) -> None:
    encoding = tokenizer().encoding()
    assert encoding.decode_bytes(encode(encoding, text)) == text.encode()


@given(st.one_of(st.binary(max_size=200), st.text().map(str.encode), st.tuples(st.text(), st.binary()).map(_joined)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_come_back(content: bytes) -> None:
    encoding = tokenizer().encoding()
    ids = encode_bytes(encoding, content)
    assert encoding.decode_bytes(ids) == content
    with contextlib.suppress(UnicodeDecodeError):
        assert ids == encode(encoding, content.decode())


@given(st.text(st.characters()))  # halves of surrogate pairs too
@settings(max_examples=300, deadline=None)
def test_the_fast_way_gives_the_same_ids(text: str) -> None:
    encoding = tokenizer().encoding()
    assert encode_to_numpy(encoding, text).tolist() == encode(encoding, text)


def test_the_fast_way_takes_half_a_surrogate_pair_and_a_special_token_for_text() -> None:
    encoding = tokenizer().encoding()
    for text in ("a\ud800b", f"a{END_OF_TEXT}b"):
        assert encode_to_numpy(encoding, text).tolist() == encode(encoding, text)


@given(st.lists(st.sampled_from([*sample_texts(), " ", "\n\n", "\u00a0", "\ud7ff", "🙂", "'ll", "\r\n"]), max_size=5))
@settings(max_examples=100, deadline=None)
def test_tiktoken_gives_the_ids_that_rustbpe_gives(parts: list[str]) -> None:
    rustbpe = pytest.importorskip("rustbpe")
    trainer = _trained(rustbpe.Tokenizer)
    text = "".join(parts)
    assert encode(tokenizer().encoding(), text) == trainer.encode(text)


@cache
def _trained(make: Callable[[], object]) -> object:
    trainer = make()
    trainer.train_from_iterator(iter(sample_texts()), VOCAB_SIZE - 2, pattern=PATTERN)  # type: ignore[attr-defined]
    return trainer


def test_training_twice_gives_the_same_file() -> None:
    again = train_tokenizer(iter(sample_texts()), VOCAB_SIZE, [END_OF_TEXT, "<|other|>"])
    assert again.to_bytes() == tokenizer().to_bytes()


def test_ids_are_bytes_then_merges_then_special_tokens() -> None:
    trained = tokenizer()
    assert trained.vocab_size == VOCAB_SIZE
    assert sorted(trained.ranks[:256]) == [bytes([value]) for value in range(256)]
    assert trained.end_of_text == VOCAB_SIZE - 2
    encoding = trained.encoding()
    assert encoding.n_vocab == VOCAB_SIZE
    assert encoding.encode_single_token("<|other|>") == VOCAB_SIZE - 1


def test_a_special_token_spelled_out_in_text_is_text() -> None:
    trained = tokenizer()
    ids = encode(trained.encoding(), f"a{END_OF_TEXT}b")
    assert trained.end_of_text not in ids
    assert trained.encoding().decode(ids) == f"a{END_OF_TEXT}b"


@pytest.mark.parametrize("text", [" " * 1_200_000, " " * 1_200_000 + "x", "\n" * 500_000, "é" * (PIECE_CHARACTERS + 1)])
def test_a_very_long_run_is_encoded(text: str) -> None:
    encoding = tokenizer().encoding()
    assert encoding.decode(encode(encoding, text)) == text


def test_a_tokenizer_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer().to_bytes())
    assert read_tokenizer(path) == tokenizer()
    assert load_tokenizer(path).encode_ordinary("abc") == tokenizer().encoding().encode_ordinary("abc")


def test_a_vocabulary_larger_than_the_text_names_the_largest_possible() -> None:
    with pytest.raises(VocabularyTooLarge) as caught:
        train_tokenizer(iter(["ab ab ab"]), 1000, [END_OF_TEXT])
    possible = caught.value.possible
    assert 257 < possible < 270
    assert f"model.vocab_size=1000 is too large for this corpus, which gives {possible} tokens" in str(caught.value)
    assert train_tokenizer(iter(["ab ab ab"]), possible, [END_OF_TEXT]).vocab_size == possible


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9 instead of 1"),
        ({"ranks": []}, "tokens are missing or there twice"),
        ({"ranks": ["!"]}, "is no tokenizer"),
        ({"special_tokens": ["<|a|>", "<|b|>"]}, "there is no <|endoftext|>"),
        ({"ranks": 3}, "is no tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer().to_bytes()) | change))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert "delete its folder to prepare the data again" in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot read the tokenizer .*tokenizer.json: No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")

"""A byte-level BPE tokenizer: trained by rustbpe, used through tiktoken, kept as one small JSON file.

Invariant: every id that rustbpe gives, tiktoken gives too (same ranks, same pattern), and decoding gives back the
exact bytes. Ids: 256 bytes, then merges in order, then the special tokens, which text never produces.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost.errors import SlmError, UserError
from tasks.recipe.sections import END_OF_TEXT, NUM_BYTES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tiktoken

FORMAT_VERSION = 1
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""Text is cut here before merging: rustbpe's own default, a form of GPT-4's; written out, so that it cannot change."""
_NO_UTF8 = re.compile("([\udc80-\udcff]+)")
PIECE_CHARACTERS = 400_000
"""Longer texts are encoded in pieces: the regular expressions overflow on a run of a million spaces."""


class TokenizerError(SlmError):
    """The tokenizer's file is not one that this version can use."""


class VocabularyTooLarge(UserError):
    """The corpus has fewer different pieces than the recipe asks tokens for."""

    def __init__(self, *, wanted: int, possible: int) -> None:
        self.possible = possible
        super().__init__(
            f"model.vocab_size={wanted} is too large for this corpus, which gives {possible} tokens at most; "
            f"use --set model.vocab_size={possible} or less, or add text to data.corpus."
        )


@dataclass(frozen=True)
class Tokenizer:
    """What the file holds. `ranks[i]` are the bytes of token i."""

    pattern: str
    ranks: tuple[bytes, ...]
    special_tokens: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """All ids: bytes, merges and special tokens."""
        return len(self.ranks) + len(self.special_tokens)

    @property
    def end_of_text(self) -> int:
        """Id that ends a document."""
        return len(self.ranks) + self.special_tokens.index(END_OF_TEXT)

    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken form."""
        import tiktoken

        first_special = len(self.ranks)
        return tiktoken.Encoding(
            "slm",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens={token: first_special + index for index, token in enumerate(self.special_tokens)},
            explicit_n_vocab=self.vocab_size,
        )

    def to_bytes(self) -> bytes:
        """The file's content: the same for the same tokenizer."""
        content = {
            "version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
        }
        return (json.dumps(content, indent=0) + "\n").encode()


def train_tokenizer(texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Learn merges from texts; the result has exactly `vocab_size` ids, special tokens included.

    Raises:
        VocabularyTooLarge: The texts hold too few different pieces.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    short_texts = (piece for text in texts for piece in pieces(text))
    trainer.train_from_iterator(short_texts, vocab_size - len(special_tokens), pattern=PATTERN)
    ranked: list[Any] = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    ranks = tuple(bytes(token) for token, _ in ranked)
    if len(ranks) + len(special_tokens) < vocab_size:
        raise VocabularyTooLarge(wanted=vocab_size, possible=len(ranks) + len(special_tokens))
    return Tokenizer(PATTERN, ranks, tuple(special_tokens))


def pieces(text: str) -> Iterator[str]:
    """The text, cut where it is longer than `PIECE_CHARACTERS`."""
    return (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Ids of a text of any length; special tokens spelled out in it are text like any other."""
    if len(text) <= PIECE_CHARACTERS:
        ids: list[int] = encoding.encode_ordinary(text)
        return ids
    return [token for piece in pieces(text) for token in encoding.encode_ordinary(piece)]


def encode_to_numpy(encoding: tiktoken.Encoding, piece: str) -> npt.NDArray[np.uint32]:
    """The same for at most PIECE_CHARACTERS, without a Python list on the way: faster than tiktoken's own encode."""
    try:
        ids: npt.NDArray[np.uint32] = encoding.encode_to_numpy(piece, disallowed_special=())
    except UnicodeEncodeError:  # half a surrogate pair: what tiktoken does in `encode` only
        return encode_to_numpy(encoding, piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return ids


def encode_bytes(encoding: tiktoken.Encoding, content: bytes) -> list[int]:
    """Ids of any bytes: where they are no UTF-8, each byte is a token, so that decoding gives back the very bytes."""
    text = content.decode("utf-8", "surrogateescape")
    ids: list[int] = []
    for number, part in enumerate(_NO_UTF8.split(text)):
        if number % 2 == 0:
            ids += encode(encoding, part)
        else:
            ids += [encoding.encode_single_token(bytes([byte])) for byte in part.encode("utf-8", "surrogateescape")]
    return ids


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the file that `Tokenizer.to_bytes` made.

    Raises:
        TokenizerError: It is missing, damaged, or of another version.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']} instead of {FORMAT_VERSION}")
        ranks = tuple(base64.b64decode(token, validate=True) for token in content["ranks"])
        tokenizer = Tokenizer(str(content["pattern"]), ranks, tuple(map(str, content["special_tokens"])))
        if tokenizer.vocab_size != content["vocab_size"] or len(set(ranks)) < max(len(ranks), NUM_BYTES):
            raise ValueError("tokens are missing or there twice")
        if END_OF_TEXT not in tokenizer.special_tokens:
            raise ValueError(f"there is no {END_OF_TEXT}")
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"{path} is no tokenizer that this version can use ({error}); delete its folder to prepare the data again."
        ) from None
    return tokenizer


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """The tiktoken encoding of a saved tokenizer.

    Raises:
        TokenizerError: It is missing, damaged, or of another version.
    """
    return read_tokenizer(path).encoding()

"""Documents inside sequences: where they begin, in each form that attention and positions want."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.errors import SlmError
from trainer.data.loader import Loader, TokenShards
from trainer.model.documents import document_offsets, document_positions, number_documents
from trainer.model.transformer import IGNORED


def by_hand(starts: list[int], first: int, length: int, max_documents: int) -> list[int]:
    """One token after the other."""
    numbers, number = [], 0
    for at in range(first, first + length):
        if at > first and at in starts:
            number += 1
        numbers.append(min(number, max_documents - 1))
    return numbers


@given(
    starts=st.sets(st.integers(0, 120)).map(lambda starts: sorted(starts | {0})),
    firsts=st.lists(st.integers(0, 100), min_size=1, max_size=6),
    length=st.integers(1, 30),
    max_documents=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_documents_are_numbered_as_one_would_by_hand(
    starts: list[int], firsts: list[int], length: int, max_documents: int
) -> None:
    numbers = number_documents(np.array(starts), np.array(firsts), length, max_documents)
    assert numbers.tolist() == [by_hand(starts, first, length, max_documents) for first in firsts]


def test_positions_begin_anew_with_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 3, 3]], dtype=torch.int32)
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 2]]


def test_offsets_have_one_length_whatever_the_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert document_offsets(documents, 4).tolist() == [0, 3, 5, 6, 12, 12, 12, 12, 12]
    full = torch.arange(4, dtype=torch.int32).repeat(2, 1)
    assert document_offsets(full, 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def folder(tmp_path: Path, make_data: Callable[..., Path]) -> Path:
    """Two sources of two shards each; documents begin at 0, 5, 21, 40 and 0, 33, 50 of 40 + 30 and 33 + 40 tokens."""
    folder = make_data(tmp_path / "data", {"text": (0.5, [40, 30]), "code": (0.5, [33, 40])})
    index = json.loads((folder / "index.json").read_text())
    for split in ("train", "heldout"):
        for source, starts in zip(index["splits"][split]["sources"], ([0, 5, 21, 40], [0, 33, 50]), strict=True):
            source |= {"documents": f"{split}-{source['name']}-docs.npy", "num_documents": len(starts)}
            np.save(folder / source["documents"], np.array(starts, dtype=np.uint64))
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_each_row_tells_its_documents_and_predicts_none_across(folder: Path) -> None:
    shards = TokenShards(folder, "train", 16, with_documents=True)
    source, window = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    numbers = shards.read_documents(shards.find(source, window), 8)
    # text: tokens 0..16, 16..32, and of the second shard 40..56; code: 0..16, 16..32, and 33..49 of the second.
    expected = [by_hand([0, 5, 21, 40], first, 17, 8) for first in (0, 16, 40)]
    expected += [by_hand([0, 33, 50], first, 17, 8) for first in (0, 16, 33)]
    assert numbers.tolist() == expected

    plain, told = Loader(shards, 7, seed=0), Loader(shards, 7, seed=0, max_documents=8)
    for step in range(3):
        whole, batch = plain.batch(step), told.batch(step)
        assert batch.documents is not None
        assert batch.documents.dtype == torch.int32
        assert torch.equal(batch.tokens, whole.tokens)
        changes = batch.targets != whole.targets
        inner = batch.documents[:, 1:] != batch.documents[:, :-1]
        assert torch.equal(changes[:, :-1], inner)
        assert (batch.targets[changes] == IGNORED).all()
        shares = [told.batch(step, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([share.documents for share in shares]), batch.documents)  # type: ignore[misc]


def test_documents_beyond_the_bound_belong_to_the_last(folder: Path) -> None:
    shards = TokenShards(folder, "train", 16, with_documents=True)
    item = Loader(shards, 7, seed=0, max_documents=1).batch(0)
    assert item.documents is not None
    assert (item.documents == 0).all()
    assert torch.equal(item.targets, Loader(shards, 7, seed=0).batch(0).targets)


def test_documents_of_shards_opened_without_are_refused(folder: Path) -> None:
    with pytest.raises(SlmError, match="opened with_documents"):
        Loader(TokenShards(folder, "train", 16), 7, seed=0, max_documents=4)


def test_data_without_documents_is_said(tmp_path: Path, make_data: Callable[..., Path]) -> None:
    folder = make_data(tmp_path / "old", {"text": (1.0, [100])})
    with pytest.raises(SlmError, match=r"cannot read where documents begin, .* prepare the data again"):
        TokenShards(folder, "train", 16, with_documents=True)


def test_a_list_of_documents_that_is_cut_is_said(folder: Path) -> None:
    np.save(folder / "train-text-docs.npy", np.array([0, 5], dtype=np.uint64))
    with pytest.raises(SlmError, match="does not name the documents of 'text'; prepare the data again"):
        TokenShards(folder, "train", 16, with_documents=True)

"""Every way to attend is held to sums written out one by one; documents see nothing of each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.model.attention import DENSE_MAX_TOKENS, Attend, attend, attend_dense, attend_sdpa, document_starts
from trainer.model.documents import document_offsets

WAYS = {"attend": attend, "dense": attend_dense, "sdpa": attend_sdpa}
DOCUMENTS = {
    "rows": None,
    "documents": [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]],
    "one token each": [list(range(11)), list(range(11))],
}


def random_qkv(T: int, dtype: torch.dtype, H: int = 6, G: int = 2, K: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(2, T, H, K), (2, T, G, K), (2, T, G, K)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_loops(q: Tensor, k: Tensor, v: Tensor, documents: list[list[int]] | None, window: int | None) -> Tensor:
    """Every output position from its own sum, in double precision; B x T x H x K."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            seen = [s for s in range(first, t + 1) if documents is None or documents[b][s] == documents[b][t]]
            for h in range(q.shape[2]):
                weights = torch.softmax(k[b, seen, h // group] @ q[b, t, h] / math.sqrt(q.shape[3]), dim=0)
                out[b, t, h] = weights @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_attention_is_what_its_definition_says(
    way: str, dtype: torch.dtype, window: int | None, documents: str
) -> None:
    q, k, v = random_qkv(11, dtype)
    ids = DOCUMENTS[documents]
    cu_seqlens = None if ids is None else document_offsets(torch.tensor(ids), 11)
    tolerance = 1e-6 if dtype is torch.float32 else 0.02
    found = WAYS[way](q, k, v, cu_seqlens, 11, window)
    torch.testing.assert_close(found.double(), by_loops(q, k, v, ids, window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [1, 5, 33])
def test_any_number_of_tokens_will_do(T: int) -> None:
    q, k, v = random_qkv(T, torch.float32)
    for way in WAYS.values():
        found = way(q, k, v, None, T, None)
        torch.testing.assert_close(found.double(), by_loops(q, k, v, None, None), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("T", [DENSE_MAX_TOKENS, DENSE_MAX_TOKENS + 1])
def test_both_ways_of_attention_agree_in_output_and_gradients(T: int) -> None:
    ids = torch.arange(T).div(100, rounding_mode="floor").repeat(2, 1)
    for cu_seqlens, window in [
        (None, None),
        (document_offsets(ids, 9), None),
        (None, 40),
        (document_offsets(ids, 9), 40),
    ]:
        results = []
        for function in (attend, attend_dense):
            inputs = random_qkv(T, torch.bfloat16, H=2, G=1)
            out = function(*inputs, cu_seqlens, T, window)
            (out.float() ** 2).sum().backward()
            results.append([out, *(each.grad for each in inputs)])
        for result, two in zip(*results, strict=True):
            assert result is not None and two is not None
            error = (result.float() - two.float()).norm() / two.float().norm()
            assert error < 0.01


def test_compiled_with_documents_attention_is_the_same() -> None:
    q, k, v = random_qkv(11, torch.float32)
    cu_seqlens = document_offsets(torch.tensor(DOCUMENTS["documents"]), 4)
    compiled: Attend = torch.compile(attend_sdpa, backend="aot_eager", fullgraph=True)
    found = compiled(q, k, v, cu_seqlens, 11, 4)
    torch.testing.assert_close(found, attend_sdpa(q, k, v, cu_seqlens, 11, 4), atol=1e-6, rtol=1e-6)


def test_each_token_knows_where_its_document_begins() -> None:
    cu_seqlens = torch.tensor([0, 2, 4, 5, 8, 10, 10, 10], dtype=torch.int32)
    assert document_starts(cu_seqlens, 10).tolist() == [0, 0, 2, 2, 4, 5, 5, 5, 8, 8]

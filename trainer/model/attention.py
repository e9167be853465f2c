"""Causal attention within documents, behind one function.

Invariant: `attend` and `attend_dense` give the same numbers up to rounding, whichever way `attend` takes. The way is
chosen when this module is imported, so that a compiled model sees a constant; `describe` says which it is.
B rows, T tokens in each, N = B T in all, H query heads, G key-value heads (G divides H), K head size.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int | None], Tensor]

DENSE_MAX_TOKENS = 512
"""On a CPU in bf16, torch's flash kernel took 28 ms forward and backward where `attend_dense` took 6 ms (B 16, H 4,
T 128, K 32, one core of an AMD EPYC with AVX512-BF16, torch 2.13), and 78 against 38 ms at T 512, B 4, H 6, K 64;
beyond that the dense scores, which grow with the square of T, cost more than they save."""


def attend(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, window: int | None
) -> Tensor:
    """Values averaged over what each token sees, weighted by the softmax of the scaled scores: B x T x H x K.

    A token sees itself and what is before it in its document, at most `window` tokens in all.

    Args:
        cu_seqlens: Where documents begin in the rows one after the other, ended by N and padded with N (int32), as
            trainer.model.documents makes them; None: each row is a document.
        max_seqlen: No document is longer.
    """
    arguments = (q_BTHK, k_BTGK, v_BTGK, cu_seqlens, max_seqlen, window)
    if VARLEN is not None and q_BTHK.is_cuda and q_BTHK.dtype in (torch.bfloat16, torch.float16):
        whole_rows = cu_seqlens is None and (window is None or window >= q_BTHK.shape[1])
        return attend_sdpa(*arguments) if whole_rows and SDPA_FOR_ROWS else VARLEN(*arguments)
    on_cpu = q_BTHK.device.type == "cpu"
    if on_cpu and q_BTHK.dtype is torch.bfloat16 and q_BTHK.shape[1] <= DENSE_MAX_TOKENS:
        return attend_dense(*arguments)
    return attend_sdpa(*arguments)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Which way `attend` takes, for the log."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and VARLEN is not None:
        varlen = next(name for name, way in BACKENDS.items() if way is VARLEN)
        return f"sdpa for whole rows, {varlen} for documents and windows" if SDPA_FOR_ROWS else varlen
    if device.type == "cpu" and dtype is torch.bfloat16:
        return f"dense up to {DENSE_MAX_TOKENS} tokens, sdpa beyond"
    return "sdpa"


# -- documents


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """For each token of the flattened batch, where its document begins: N."""
    token_N = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens[torch.searchsorted(cu_seqlens, token_N, right=True) - 1]


def visible(B: int, T: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Whether query t sees key s: B x T x T, or 1 x T x T where all rows are alike."""
    token_T = torch.arange(T, device=device)
    distance_TT = token_T[:, None] - token_T
    seen_TT = (distance_TT >= 0) if window is None else (distance_TT >= 0) & (distance_TT < window)
    if cu_seqlens is None:
        return seen_TT[None]
    start_BT = document_starts(cu_seqlens, B * T).view(B, T)
    return seen_TT & (start_BT[:, :, None] == start_BT[:, None, :])


# -- on any device


def attend_dense(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cu_seqlens: Tensor | None, _max_seqlen: int, window: int | None
) -> Tensor:
    """`attend` by its definition, all T x T scores at once: the query heads of a group are rows of one product."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    R = H // G
    seen_BTT = visible(B, T, cu_seqlens, window, q_BTHK.device)
    mask_BTT = torch.where(seen_BTT, 0.0, -math.inf).to(q_BTHK.dtype)
    q_BGXK = (q_BTHK * K**-0.5).transpose(1, 2).reshape(B * G, R * T, K)
    k_BGTK, v_BGTK = k_BTGK.transpose(1, 2).reshape(B * G, T, K), v_BTGK.transpose(1, 2).reshape(B * G, T, K)
    if cu_seqlens is None:
        mask_BGXT = mask_BTT.repeat(1, R, 1)
    else:
        mask_BGXT = mask_BTT[:, None, None].expand(B, G, R, T, T).reshape(B * G, R * T, T)
    scores_BGXT = torch.baddbmm(mask_BGXT, q_BGXK, k_BGTK.transpose(1, 2))
    return (scores_BGXT.softmax(-1) @ v_BGTK).view(B, H, T, K).transpose(1, 2)


def attend_sdpa(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cu_seqlens: Tensor | None, _max_seqlen: int, window: int | None
) -> Tensor:
    """`attend` by torch's scaled_dot_product_attention: one call per document, or one with a mask when compiled."""
    B, T, H, K = q_BTHK.shape
    if cu_seqlens is None or torch.compiler.is_compiling():
        narrow = window is not None and window < T
        mask = visible(B, T, cu_seqlens, window, q_BTHK.device)[:, None] if narrow or cu_seqlens is not None else None
        return _sdpa(q_BTHK, k_BTGK, v_BTGK, mask)
    parts = []
    q_NHK, k_NGK, v_NGK = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    for begin, end in pairwise(cu_seqlens.tolist()):
        if begin < end:
            narrow = window is not None and window < end - begin
            mask = visible(1, end - begin, None, window, q_BTHK.device) if narrow else None
            parts.append(_sdpa(q_NHK[None, begin:end], k_NGK[None, begin:end], v_NGK[None, begin:end], mask))
    return torch.cat(parts, dim=1).view(B, T, H, K)


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    out_BHTK = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out_BHTK.transpose(1, 2)


# -- kernels for CUDA, which read the rows as one sequence of documents


def _flattened(kernel: Callable[..., Tensor]) -> Attend:
    """`attend` by a kernel that takes q, k and v as N x heads x K, cu_seqlens, max_seqlen and how far back it sees."""

    def attend_flat(
        q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, window: int | None
    ) -> Tensor:
        B, T = q_BTHK.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q_BTHK.device)
            max_seqlen = T
        flat = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
        return kernel(*flat, cu_seqlens, max_seqlen, -1 if window is None else window - 1).view_as(q_BTHK)

    return attend_flat


def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's own, with whatever implementation is active; it took grouped heads before it named them."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, back: int) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
        options |= {"window_size": (back, 0)} if "window_size" in known else {"is_causal": True}
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        assert isinstance(out, Tensor)
        return out

    return kernel


def _flash2_kernel() -> Callable[..., Tensor] | None:
    """flash-attn 2, built from source by who wants it."""
    try:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError, OSError):
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, back: int) -> Tensor:
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        out: Tensor = function(q, k, v, *lengths, causal=True, window_size=(back, 0 if back >= 0 else -1))
        return out

    return kernel


def _activate(implementation: str) -> bool:
    """Have torch dispatch to flash-attn 3 or 4, where that is installed and torch knows how."""
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(implementation)
    except (ImportError, ValueError, RuntimeError, AttributeError, OSError):
        return False
    return True


def _find_backends() -> Mapping[str, Attend]:
    """Every way that works on this machine's CUDA devices, the best first; none without such a device."""
    found: dict[str, Attend] = {}
    if torch.cuda.is_available():
        varlen = _varlen_kernel()
        newest = next((name for name in ("FA4", "FA3") if varlen is not None and _activate(name)), None)
        flash2 = _flash2_kernel() if newest is None else None
        if varlen is not None and newest is not None:
            found[f"varlen_attn by {newest}"] = _flattened(varlen)
        if flash2 is not None:
            found["flash-attn 2"] = _flattened(flash2)
        if varlen is not None and newest is None:
            found["varlen_attn"] = _flattened(varlen)
    return found


BACKENDS = _find_backends()
VARLEN: Attend | None = next(iter(BACKENDS.values()), None)
SDPA_FOR_ROWS = next(iter(BACKENDS), "") in ("flash-attn 2", "varlen_attn")
"""Whether rows without documents go to the kernel that torch chooses, on Hopper cuDNN's: forward and backward took it
2.2 ms, and flash-attention 2 3.9 ms (B 16, T 2048, H 16, G 8, K 128, H200, torch 2.11)."""

"""Causal attention behind one function.

Invariant: `attend` and `attend_dense` give the same numbers up to rounding, whichever way `attend` takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

DENSE_MAX_TOKENS = 512
"""On a CPU in bf16, torch's flash kernel took 28 ms forward and backward where `attend_dense` took 6 ms (B 16, H 4,
T 128, K 32, one core of an AMD EPYC with AVX512-BF16, torch 2.13), and 78 against 38 ms at T 512, B 4, H 6, K 64;
beyond that the dense scores, which grow with the square of T, cost more than they save."""


def attend(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Values averaged over each position and those before it, weighted by the softmax of the scaled scores.

    B batch, H query heads, G key-value heads (G divides H), T tokens, K head size.
    """
    on_cpu = q_BHTK.device.type == "cpu"
    if on_cpu and q_BHTK.dtype is torch.bfloat16 and q_BHTK.shape[-2] <= DENSE_MAX_TOKENS:
        return attend_dense(q_BHTK, k_BGTK, v_BGTK)
    return functional.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)


def attend_dense(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """The same by its definition, all T x T scores at once: the query heads of a group are rows of one product."""
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    R = H // G
    mask_TT = torch.full((T, T), -math.inf, device=q_BHTK.device).triu(1)
    mask_XT = mask_TT.to(q_BHTK.dtype).repeat(R, 1)
    q_CXK = (q_BHTK * K**-0.5).reshape(B * G, R * T, K)
    k_CTK, v_CTK = k_BGTK.reshape(B * G, T, K), v_BGTK.reshape(B * G, T, K)
    scores_CXT = torch.baddbmm(mask_XT, q_CXK, k_CTK.transpose(1, 2))
    return (scores_CXT.softmax(-1) @ v_CTK).view(B, H, T, K)

"""The head and its loss in one: cross-entropy of a linear map, a chunk of tokens at a time.

Invariant: equal to `functional.cross_entropy` of all logits up to rounding, and never holds the logits of more than
one chunk. The gradients of a chunk are computed where its logits are at hand, in the forward pass, so nothing is
computed twice and only dx and dW are kept. N tokens, C tokens of a chunk, D width, V vocabulary.
Source of the idea: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ChunkGradients = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]

IGNORED = -100
"""A target that counts for nothing: no loss, no gradient, not among the target tokens."""
CHUNK_LOGITS_CPU = 2**21
CHUNK_LOGITS = 2**26
"""Logits of one chunk: what fits a CPU's cache, and what fills a GPU (256 MiB in fp32)."""


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0, chunk: ChunkGradients | None = None
) -> Tensor:
    """Cross-entropy in nats of the logits x W', summed over the targets that are not IGNORED.

    Computed in autocast's type where that is on, summed in fp32. With a softcap the logits are softcap x tanh of
    themselves / softcap. `chunk` stands in for `chunk_gradients`: the same, compiled.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        x_ND = x_ND.to(torch.get_autocast_dtype(device))
    weight = weight_VD.detach().to(x_ND.dtype)
    loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
    if not (torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)):
        for rows in _chunks(len(x_ND), len(weight_VD), x_ND.device):
            logits_CV, _ = _logits(x_ND[rows], weight, softcap)
            loss = loss + _loss(logits_CV, targets_N[rows])[0]
        return loss
    dx_parts = []
    dw_VD = torch.zeros(weight_VD.shape, device=x_ND.device, dtype=torch.float32)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for rows in _chunks(len(x_ND), len(weight_VD), x_ND.device):
            chunk_loss, dx_CD, part_VD = (chunk or chunk_gradients)(x_ND[rows], weight, targets_N[rows], softcap)
            loss = loss + chunk_loss
            dx_parts.append(dx_CD)
            dw_VD = dw_VD + part_VD
    out: Tensor = _Known.apply(x_ND, weight_VD, loss, torch.cat(dx_parts), dw_VD)  # type: ignore[no-untyped-call]
    return out


def chunk_gradients(
    x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one chunk, and its gradients for x (C x D) and the weight (V x D), in their type."""
    logits_CV, squashed_CV = _logits(x_CD, weight_VD, softcap)
    loss, lse_C = _loss(logits_CV, targets_C)
    token_V = torch.arange(weight_VD.shape[0], device=x_CD.device)
    gradient_CV = (logits_CV - lse_C[:, None]).exp() - (token_V == targets_C[:, None]).float()
    if squashed_CV is not None:
        gradient_CV = gradient_CV * (1.0 - squashed_CV * squashed_CV)
    counts_C = (targets_C != IGNORED).float()
    g_CV = (gradient_CV * counts_C[:, None]).to(x_CD.dtype)
    return loss, g_CV @ weight_VD, g_CV.T @ x_CD


def capped(logits: Tensor, softcap: float) -> Tensor:
    """The logits as the loss sees them."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _Known(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, _x_ND: Tensor, weight_VD: Tensor, loss: Tensor, dx_ND: Tensor, dw_VD: Tensor) -> Tensor:
        ctx.save_for_backward(dx_ND, dw_VD.to(weight_VD.dtype))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        (scale,) = gradients
        return dx_ND * scale.to(dx_ND.dtype), dw_VD * scale.to(dw_VD.dtype), None, None, None


def _chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """As few as may be, equal but for the last."""
    most = max(1, (CHUNK_LOGITS_CPU if device.type == "cpu" else CHUNK_LOGITS) // vocab_size)
    size = -(-num_tokens // -(-num_tokens // most)) if num_tokens else 1
    return [slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _logits(x_CD: Tensor, weight_VD: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """In fp32; with a softcap also the tanh that its derivative needs."""
    raw_CV = (x_CD @ weight_VD.T).float()
    if not softcap:
        return raw_CV, None
    squashed_CV = torch.tanh(raw_CV / softcap)
    return softcap * squashed_CV, squashed_CV


def _loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over the chunk's targets that count; and the log of each token's normalizer."""
    lse_C = logits_CV.logsumexp(-1)
    chosen_C = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    return ((lse_C - chosen_C) * (targets_C != IGNORED)).sum(), lse_C

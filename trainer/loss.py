"""The head and its loss in one: cross-entropy of a linear map, a chunk of tokens at a time.

Invariant: equal to `functional.cross_entropy` of all logits up to rounding, and never holds the logits of more than
one chunk. The gradients of a chunk are computed where its logits are at hand, in the forward pass, so nothing is
computed twice and only dx and dW are kept. N tokens, C tokens of a chunk, D width, V vocabulary.
Source of the idea: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""A target that counts for nothing: no loss, no gradient, not among the target tokens."""
CHUNK_LOGITS_CPU = 2**21
CHUNK_LOGITS = 2**26
"""Logits of one chunk: what fits a CPU's cache, and what fills a GPU (256 MiB in fp32)."""


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Cross-entropy in nats of the logits x W', summed over the targets that are not IGNORED.

    Computed in autocast's type where that is on, summed in fp32. With a softcap the logits are softcap x tanh of
    themselves / softcap.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        x_ND = x_ND.to(torch.get_autocast_dtype(device))
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        out: Tensor = _Fused.apply(x_ND, weight_VD, targets_N, softcap)  # type: ignore[no-untyped-call]
        return out
    loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
    weight = weight_VD.to(x_ND.dtype)
    for rows in _chunks(len(x_ND), len(weight_VD), x_ND.device):
        logits_CV, _ = _logits(x_ND[rows], weight, softcap)
        loss = loss + _loss(logits_CV, targets_N[rows])[0]
    return loss


def capped(logits: Tensor, softcap: float) -> Tensor:
    """The logits as the loss sees them."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
        weight = weight_VD.to(x_ND.dtype)
        loss = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        dx_parts = []
        dw_VD = torch.zeros(weight_VD.shape, device=x_ND.device, dtype=torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            for rows in _chunks(len(x_ND), len(weight_VD), x_ND.device):
                x_CD, targets_C = x_ND[rows], targets_N[rows]
                logits_CV, squashed_CV = _logits(x_CD, weight, softcap)
                chunk_loss, lse_C = _loss(logits_CV, targets_C)
                loss = loss + chunk_loss
                token_V = torch.arange(weight.shape[0], device=x_ND.device)
                gradient_CV = (logits_CV - lse_C[:, None]).exp() - (token_V == targets_C[:, None]).float()
                if squashed_CV is not None:
                    gradient_CV = gradient_CV * (1.0 - squashed_CV * squashed_CV)
                counts_C = (targets_C != IGNORED).float()
                g_CV = (gradient_CV * counts_C[:, None]).to(x_ND.dtype)
                dx_parts.append(g_CV @ weight)
                dw_VD = dw_VD + g_CV.T @ x_CD
        ctx.save_for_backward(torch.cat(dx_parts), dw_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        (scale,) = gradients
        return dx_ND * scale.to(dx_ND.dtype), dw_VD * scale.to(dw_VD.dtype), None, None


def _chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Equal but for the last."""
    most = CHUNK_LOGITS_CPU if device.type == "cpu" else CHUNK_LOGITS
    size = max(1, most // vocab_size)
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

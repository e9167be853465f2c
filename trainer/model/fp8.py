"""Products of hidden matrices in 8 bits: each tensor has one scale, taken anew from its largest value.

Weights, gradients as the optimizer sees them, and everything but the products stay as they are. Forward operands are
e4m3, incoming gradients e5m2, sums fp32, results bf16. Source: Micikevicius et al. 2022 (arXiv:2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cost.errors import UserError

MULTIPLE = 16
"""The kernels want both sides of a matrix to be multiples of this; others stay as they are."""
LEAST_CAPABILITY = (8, 9)
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def require_fp8(device: torch.device) -> None:
    """Raises UserError on a device that has no such products."""
    if device.type != "cuda":
        raise UserError(f"training.fp8 needs a CUDA device, and this is a {device.type}; set training.fp8 to false.")
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        name, least = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY))
        raise UserError(
            f"training.fp8 needs compute capability {least} (Ada, Hopper or later), and {name} has "
            f"{found[0]}.{found[1]}; set training.fp8 to false."
        )


def use_fp8(blocks: nn.Module) -> int:
    """Let the matrices in `blocks` multiply in 8 bits; how many can."""
    chosen = [
        module
        for module in blocks.modules()
        if type(module) is nn.Linear and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    ]
    for module in chosen:
        module.__class__ = Fp8Linear
    return len(chosen)


class Fp8Linear(nn.Linear):
    """The same parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) % MULTIPLE:  # the last, smaller batch of an evaluation
            return super().forward(x)
        out: Tensor = _Product.apply(flat, self.weight)  # type: ignore[no-untyped-call]
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x W'. N tokens, D inputs, O outputs."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_OD: Tensor) -> Tensor:
        x8, x_scale = _quantized(x_ND, FORWARD)
        w8, w_scale = _quantized(weight_OD, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x_ND.dtype, weight_OD.dtype
        return _product(x8, x_scale, w8.t(), w_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = _quantized(gradients[0].contiguous(), BACKWARD)
        dx = _product(g8, g_scale, _column_major(w8), w_scale)
        dw = _product(g8.t().contiguous(), g_scale, _column_major(x8), x_scale)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1])


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In 8 bits, and what to multiply it with to have it back."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _product(a8: Tensor, a_scale: Tensor, b8: Tensor, b_scale: Tensor) -> Tensor:
    """a row by row, b column by column, as the kernels want them."""
    out: Tensor = torch._scaled_mm(a8, b8, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)
    return out


def _column_major(x8: Tensor) -> Tensor:
    return x8.t().contiguous().t()

"""The fused loss is held to torch's of all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.model import loss
from trainer.model.loss import IGNORED, linear_cross_entropy


def plain(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
    logits = x_ND @ weight_VD.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits.float(), targets_N, ignore_index=IGNORED, reduction="sum")


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 12, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(40, (23,), generator=generator)
    targets[[0, 7, 22]] = IGNORED
    return x, weight, targets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS_CPU", 5 * 40)  # chunks of 5, 5, 5, 5 and 3 tokens


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_fused_loss_and_its_gradients_are_those_of_all_logits(softcap: float) -> None:
    x, weight, targets = case(torch.float32)
    fused = linear_cross_entropy(x, weight, targets, softcap)
    gradients = torch.autograd.grad(0.3 * fused, (x, weight))
    expected = plain(x, weight, targets, softcap)
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(0.3 * expected, (x, weight)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_gradient_is_the_slope_of_the_loss(softcap: float) -> None:
    x, weight, targets = case(torch.float32)
    torch.autograd.gradcheck(
        lambda a, b: linear_cross_entropy(a, b, targets, softcap),
        (x, weight),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
        check_grad_dtypes=False,
        raise_exception=True,
    )


def test_without_gradients_the_loss_is_the_same() -> None:
    x, weight, targets = case(torch.float32)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets), linear_cross_entropy(x, weight, targets).detach())
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), plain(x, weight, targets, 0.0))


def test_ignored_targets_leave_no_trace() -> None:
    x, weight, targets = case(torch.float32)
    linear_cross_entropy(x, weight, targets).backward()
    assert x.grad is not None
    assert x.grad[targets == IGNORED].abs().max() == 0
    assert x.grad[targets != IGNORED].abs().min(dim=1).values.max() > 0


def test_in_bf16_loss_and_gradients_differ_by_rounding_only() -> None:
    x, weight, targets = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = linear_cross_entropy(x, weight, targets)
    assert fused.dtype is torch.float32
    expected = plain(x, weight, targets, 0.0)
    assert float(fused.detach()) == pytest.approx(float(expected.detach()), rel=0.01)
    found, wanted = torch.autograd.grad(fused, (x, weight)), torch.autograd.grad(expected, (x, weight))
    for entry, two in zip(found, wanted, strict=True):
        assert entry.dtype is torch.float32
        assert (entry - two).norm() / two.norm() < 0.02

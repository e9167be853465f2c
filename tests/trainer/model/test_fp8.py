"""Products in 8 bits against the exact ones; torch computes them on a CPU too, where the trainer refuses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cost.errors import UserError
from trainer.config import ModelConfig
from trainer.model.fp8 import Fp8Linear, require_fp8, use_fp8
from trainer.model.transformer import build_model

SHAPE = ModelConfig(
    vocab_size=64, sequence_length=32, num_layers=2, width=32, num_heads=2, num_kv_heads=2, hidden_size=48
)


def test_output_and_gradients_are_the_exact_ones_up_to_8_bits() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 48)
    fast = nn.Sequential(nn.Linear(64, 48))
    fast[0].load_state_dict(exact.state_dict())
    assert use_fp8(fast) == 1
    inputs = [torch.randn(2, 32, 64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    outputs = [exact(inputs[0]), fast(inputs[1])]
    weights = torch.randn(2, 32, 48)
    for output in outputs:
        (output.float() * weights).sum().backward()
    pairs = [(outputs[1], outputs[0]), (inputs[1].grad, inputs[0].grad), (fast[0].weight.grad, exact.weight.grad)]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        error = (found.float() - wanted).norm() / wanted.norm()
        assert 1e-4 < error < 0.08  # e4m3 keeps 3 bits of mantissa, e5m2 two


def test_only_hidden_matrices_of_fitting_size_change_and_names_stay() -> None:
    model = build_model(SHAPE, seed=0)
    names = [name for name, _ in model.named_parameters()]
    assert use_fp8(model.blocks) == 14
    assert type(model.head) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == names
    odd = nn.ModuleList([nn.Linear(24, 16), nn.Linear(16, 16)])
    assert use_fp8(odd) == 1
    assert [type(module) for module in odd] == [nn.Linear, Fp8Linear]


def test_a_model_in_8_bits_learns_as_one_in_bf16() -> None:
    tokens_BT = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = {}
    for fp8 in (False, True):
        model = build_model(SHAPE, seed=0)
        if fp8:
            use_fp8(model.blocks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens_BT, tokens_BT.roll(-1, 1)) / tokens_BT.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[fp8] = float(loss.detach())
    assert losses[False] < 3.0  # ln(64) = 4.16 before the first step
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def test_fp8_is_refused_on_a_device_that_has_no_such_products() -> None:
    with pytest.raises(
        UserError, match=r"training\.fp8 needs a CUDA device, and this is a cpu; set training\.fp8 to false"
    ):
        require_fp8(torch.device("cpu"))

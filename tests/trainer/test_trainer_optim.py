from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model import Transformer, build_model
from trainer.optim import Updates, scale_and_clip

SHAPE = ModelConfig(
    vocab_size=20, sequence_length=4, num_layers=1, width=8, num_heads=2, num_kv_heads=1, hidden_size=12
)


def with_gradients(seed: int = 0) -> Transformer:
    model = build_model(SHAPE, seed=0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def kinds(updates: Updates) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in updates.state():
        name, kind = key.split("/")
        found.setdefault(name, set()).add(kind)
    return found


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_is_named_and_shaped_before_the_first_step_as_torch_makes_it(name: str) -> None:
    model = with_gradients()
    updates = Updates(model, OptimizerConfig(name=name))
    before = {key: (value.shape, value.dtype) for key, value in updates.state().items()}
    fresh = Updates(model, OptimizerConfig(name=name))
    fresh.step(1.0)  # here torch makes its own
    assert {key: (value.shape, value.dtype) for key, value in fresh.state().items()} == before


def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    found = kinds(Updates(with_gradients(), OptimizerConfig(name="muon")))
    by_muon = {name for name, names in found.items() if names == {"momentum_buffer"}}
    assert by_muon == {
        *(f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "output")),
        *(f"blocks.0.mlp.{part}.weight" for part in ("gate", "up", "down")),
    }
    assert {"embedding.weight", "head.weight", "norm.weight"} <= found.keys() - by_muon
    assert all(found[name] == {"step", "exp_avg", "exp_avg_sq"} for name in found.keys() - by_muon)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_copied_into_a_new_one_makes_the_next_step_the_same(name: str) -> None:
    model = with_gradients()
    updates = Updates(model, OptimizerConfig(name=name))
    updates.step(1.0)
    twin = build_model(SHAPE, seed=1)
    twin.load_state_dict(model.state_dict())
    twin_updates = Updates(twin, OptimizerConfig(name=name))
    for key, value in twin_updates.state().items():
        value.copy_(updates.state()[key])
    for one, two in zip(model.parameters(), with_gradients(seed=1).parameters(), strict=True):
        one.grad = two.grad
    for one, two in zip(twin.parameters(), with_gradients(seed=1).parameters(), strict=True):
        one.grad = two.grad
    updates.step(0.5)
    twin_updates.step(0.5)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_adamw_moves_by_the_rate_and_decays_matrices_only() -> None:
    model = with_gradients()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad.fill_(3.0)
    Updates(model, OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)).step(0.2)
    # The first AdamW step moves by the rate: 0.2 x 0.1; decay takes 0.02 x 0.5 of a weight of one.
    assert float(model.norm.weight[0].detach()) == pytest.approx(1.0 - 0.02)
    assert float(model.head.weight[0, 0].detach()) == pytest.approx(1.0 - 0.01 - 0.02)


def test_a_factor_of_zero_changes_nothing() -> None:
    model = with_gradients()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    Updates(model, OptimizerConfig(name="muon")).step(0.0)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def parameters_with(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


def test_gradients_are_scaled_and_then_clipped_to_the_norm_together() -> None:
    parameters = parameters_with([6.0], [0.0, 8.0])
    assert scale_and_clip(parameters, 0.5, max_norm=1.0) == pytest.approx(5.0)
    assert [p.grad.tolist() for p in parameters] == [pytest.approx([0.6]), pytest.approx([0.0, 0.8])]


def test_short_gradients_are_only_scaled() -> None:
    parameters = parameters_with([6.0], [0.0, 8.0])
    assert scale_and_clip(parameters, 0.05, max_norm=1.0) == pytest.approx(0.5)
    assert [p.grad.tolist() for p in parameters] == [pytest.approx([0.3]), pytest.approx([0.0, 0.4])]


def test_a_gradient_of_zero_stays_zero() -> None:
    parameters = parameters_with([0.0, 0.0])
    assert scale_and_clip(parameters, 2.0, max_norm=1.0) == 0.0
    assert parameters[0].grad.tolist() == [0.0, 0.0]


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    assert math.isnan(scale_and_clip(parameters_with([1.0, math.nan]), 1.0, max_norm=1.0))
    assert scale_and_clip(parameters_with([1.0, math.inf]), 1.0, max_norm=1.0) == math.inf

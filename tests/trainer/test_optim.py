from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, OptimizerConfig
from trainer.model.transformer import Transformer, build_model
from trainer.optim import Updates, parameter_kind, scale_and_clip

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
    for parameter, two in zip(model.parameters(), with_gradients(seed=1).parameters(), strict=True):
        parameter.grad = two.grad
    for parameter, two in zip(twin.parameters(), with_gradients(seed=1).parameters(), strict=True):
        parameter.grad = two.grad
    updates.step(0.5)
    twin_updates.step(0.5)
    for parameter, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, two)


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
    assert all(torch.equal(item, two) for item, two in zip(before, model.parameters(), strict=True))


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


def orthogonalized(gradient: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps in bf16, as Jordan et al. 2024 publish them."""
    x = gradient.bfloat16()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if transposed else x).float()


def test_one_step_of_muon_is_that_of_the_reference() -> None:
    model = with_gradients()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    Updates(model, OptimizerConfig(name="muon", muon_learning_rate=0.1, weight_decay=0.5)).step(0.4)
    for name, after in model.named_parameters():
        if parameter_kind(name, after) == "matrix":
            # Nesterov: the first momentum is the gradient times 0.05, looked at 0.95 ahead; the scale does not matter.
            update = orthogonalized(gradients[name]) * max(1.0, after.shape[0] / after.shape[1]) ** 0.5
            wanted = before[name] * (1 - 0.04 * 0.5) - 0.04 * update
            error = (after.detach() - wanted).norm() / (wanted - before[name]).norm()
            assert error < 0.08, name  # bf16 keeps 8 bits, and five steps amplify what is lost


def test_two_steps_of_adamw_are_those_of_the_reference() -> None:
    model = with_gradients()
    wanted = {name: value.detach().double() for name, value in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in wanted.items()}
    second = {name: torch.zeros_like(value) for name, value in wanted.items()}
    updates = Updates(model, OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.95)))
    for number, factor in ((1, 0.4), (2, 0.2)):
        for name, value in wanted.items():
            gradient = dict(model.named_parameters())[name].grad.double()
            value -= 0.1 * factor * (0.5 if value.ndim == 2 else 0.0) * value
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            corrected = (second[name] / (1 - 0.95**number)).sqrt() + 1e-8
            value -= 0.1 * factor * first[name] / (1 - 0.9**number) / corrected
        updates.step(factor)
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.detach().double(), wanted[name], atol=1e-6, rtol=1e-6)


def test_each_kind_of_parameter_moves_at_its_own_rate() -> None:
    model = with_gradients()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rates = {"embedding_learning_rate": 0.3, "head_learning_rate": 0.02, "scalar_learning_rate": 0.005}
    Updates(model, OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.0, **rates)).step(0.5)
    moved = {name: float((value.detach() - before[name]).abs().mean()) for name, value in model.named_parameters()}
    assert moved["embedding.weight"] == pytest.approx(0.15, rel=1e-3)  # the first step of AdamW moves by the rate
    assert moved["head.weight"] == pytest.approx(0.01, rel=1e-3)
    assert moved["norm.weight"] == pytest.approx(0.0025, rel=1e-3)
    assert moved["blocks.0.mlp.up.weight"] == pytest.approx(0.05, rel=1e-3)


def test_tables_are_not_for_muon_whatever_they_hold() -> None:
    config = replace(SHAPE, positions="learned", value_embeddings=True, residual_scalars=True, biases=True)
    kinds_found = {name: parameter_kind(name, value) for name, value in build_model(config, 0).named_parameters()}
    assert kinds_found["position_embedding.weight"] == kinds_found["embedding.weight"] == "embedding"
    assert kinds_found["blocks.0.attention.value_embedding.weight"] == "embedding"
    assert kinds_found["blocks.0.attention.query.bias"] == kinds_found["stream_scale"] == "scalar"
    assert kinds_found["blocks.0.attention.value_gate.weight"] == "matrix"
    assert kinds_found["head.weight"] == "head"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_cautious_decay_shrinks_only_what_the_update_shrinks_too(name: str) -> None:
    common = {"name": name, "learning_rate": 0.01, "muon_learning_rate": 0.01}
    found = {}
    for kind, fields in {
        "none": {"weight_decay": 0.0},
        "cautious": {"weight_decay": 0.5, "cautious": True},
    }.items():
        model = with_gradients()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + number)))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        Updates(model, OptimizerConfig(**common, **fields)).step(1.0)
        found[kind] = {name: value.detach() for name, value in model.named_parameters()}
    for each, old in before.items():
        plain = found["none"][each]
        shrinks = ((old - plain) * old > 0) if old.ndim == 2 else torch.zeros_like(old, dtype=torch.bool)
        torch.testing.assert_close(found["cautious"][each], plain - 0.01 * 0.5 * old * shrinks)
        assert old.ndim < 2 or 0 < shrinks.float().mean() < 1

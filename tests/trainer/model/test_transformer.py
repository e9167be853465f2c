from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.config import GATE_INPUTS, ModelConfig
from trainer.model.attention import visible
from trainer.model.presets import PRESETS, expand
from trainer.model.transformer import IGNORED, Transformer, build_model, weights_sha256

SHAPE = ModelConfig(
    vocab_size=50, sequence_length=12, num_layers=2, width=24, num_heads=6, num_kv_heads=2, hidden_size=20
)


def plain_logits(model: Transformer, tokens_T: Tensor) -> Tensor:
    """The same model written again, one document, one head and one pair of a head at a time."""
    config, weights = model.config, {name: value.double() for name, value in model.named_parameters()}
    T, K = len(tokens_T), config.size_of_heads

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "layer" and "query" not in name and "key" not in name:
            x = x - x.mean(-1, keepdim=True)
            return (
                x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
                + weights[f"{name}.bias"]
            )
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    def product(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1))

    def turned(x_TK: Tensor) -> Tensor:
        if config.positions == "learned":
            return x_TK
        out = torch.empty_like(x_TK)
        for t in range(T):
            for pair in range(K // 2):
                angle = t / config.rope_base ** (2 * pair / K)
                low, high = x_TK[t, pair], x_TK[t, pair + K // 2]
                out[t, pair] = low * math.cos(angle) - high * math.sin(angle)
                out[t, pair + K // 2] = high * math.cos(angle) + low * math.sin(angle)
        return out

    x = weights["embedding.weight"][tokens_T]
    if config.positions == "learned":
        x = x + weights["position_embedding.weight"][:T]
    if config.residual_scalars:
        x = x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    first = x
    for number in range(config.num_layers):
        layer = f"blocks.{number}"
        if config.residual_scalars:
            x = weights["stream_scale"][number] * x + weights["first_scale"][number] * first
        h = norm(x, f"{layer}.attention_norm")
        q, k, v = (product(h, f"{layer}.attention.{name}") for name in ("query", "key", "value"))
        if config.has_value_embedding(number):
            gate = 2 * torch.sigmoid(product(h[:, :GATE_INPUTS], f"{layer}.attention.value_gate"))
            v = v + gate.repeat_interleave(K, 1) * weights[f"{layer}.attention.value_embedding.weight"][tokens_T]
        heads = []
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            q_TK, k_TK = q[:, head * K : (head + 1) * K], k[:, group * K : (group + 1) * K]
            if config.qk_norm:
                q_TK, k_TK = norm(q_TK, f"{layer}.attention.query_norm"), norm(k_TK, f"{layer}.attention.key_norm")
            scores = turned(q_TK) @ turned(k_TK).T / math.sqrt(K)
            for t in range(T):
                window = config.layer_window(number)
                for s in range(T):
                    if s > t or (window is not None and s <= t - window):
                        scores[t, s] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, group * K : (group + 1) * K])
        x = x + product(torch.cat(heads, -1), f"{layer}.attention.output")
        h = norm(x, f"{layer}.mlp_norm")
        up = product(h, f"{layer}.mlp.up")
        if config.mlp == "swiglu":
            gate = product(h, f"{layer}.mlp.gate")
            up = gate * torch.sigmoid(gate) * up
        elif config.mlp == "relu2":
            up = up.clamp(min=0) ** 2
        else:
            up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + product(up, f"{layer}.mlp.down")
    logits = norm(x, "norm") @ weights["embedding.weight" if config.tied_embeddings else "head.weight"].T
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def with_random_weights(config: ModelConfig) -> Transformer:
    """Fresh models have zeros where this would see no difference."""
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    return model


VARIANTS = {
    **{name: expand({"preset": name}) for name in PRESETS},
    "tied": {"tied_embeddings": True, "qk_norm": False},
    "heads of another size": {"head_size": 6},
    "windows": {"window": 5, "num_layers": 3},
    "value embeddings": {**expand({"preset": "speedrun"}), "value_embeddings": True, "num_layers": 3, "window": 3},
}


def variant(name: str) -> ModelConfig:
    fields = dict(VARIANTS[name])
    return replace(SHAPE, **fields)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_is_what_its_parts_say(name: str) -> None:
    model = with_random_weights(variant(name))
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([plain_logits(model, tokens_T) for tokens_T in tokens_BT])
    torch.testing.assert_close(model.logits(tokens_BT).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_in_a_row_are_as_documents_alone(name: str) -> None:
    model = with_random_weights(variant(name))
    generator = torch.Generator().manual_seed(3)
    tokens_BT, targets_BT = (torch.randint(50, (2, 12), generator=generator) for _ in range(2))
    documents_BT = torch.tensor([[0] * 5 + [1] * 7, [4] * 1 + [2] * 8 + [3] * 3])
    parts = [(0, 0, 5), (0, 5, 12), (1, 0, 1), (1, 1, 9), (1, 9, 12)]
    alone = [model.logits(tokens_BT[row : row + 1, begin:end])[0] for row, begin, end in parts]
    found = model.logits(tokens_BT, documents_BT)
    torch.testing.assert_close(found, torch.cat(alone).view(2, 12, 50), atol=1e-4, rtol=1e-4)
    losses = [
        float(model(tokens_BT[row : row + 1, begin:end], targets_BT[row : row + 1, begin:end]).detach())
        for row, begin, end in parts
    ]
    assert float(model(tokens_BT, targets_BT, documents_BT).detach()) == pytest.approx(sum(losses), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    model = with_random_weights(variant(name))
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    found = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(tokens_BT, tokens_BT).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(entry, two) for entry, two in zip(*found, strict=True))


def test_in_bf16_the_model_is_the_same_up_to_rounding() -> None:
    model = with_random_weights(SHAPE)
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    exact = model.logits(tokens_BT)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.logits(tokens_BT)
    assert rounded.dtype is torch.bfloat16
    assert ((rounded.float() - exact).norm() / exact.norm()) < 0.03


def test_a_token_changes_nothing_before_it() -> None:
    model = with_random_weights(SHAPE)
    tokens_BT = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(3))
    changed_BT = tokens_BT.clone()
    changed_BT[0, 7] = (changed_BT[0, 7] + 1) % 50
    before, after = model.logits(tokens_BT), model.logits(changed_BT)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def test_the_loss_is_summed_over_targets_that_count() -> None:
    model = with_random_weights(SHAPE)
    generator = torch.Generator().manual_seed(4)
    tokens_BT, targets_BT = (torch.randint(50, (3, 12), generator=generator) for _ in range(2))
    targets_BT[0, 5:] = IGNORED
    log_probabilities = model.logits(tokens_BT).log_softmax(-1)
    kept = [(b, t) for b in range(3) for t in range(12) if targets_BT[b, t] != IGNORED]
    expected = -sum(log_probabilities[b, t, targets_BT[b, t]].item() for b, t in kept)
    assert model(tokens_BT, targets_BT).item() == pytest.approx(expected, rel=1e-5)


def test_a_fresh_model_guesses_uniformly() -> None:
    model = build_model(SHAPE, seed=0)
    tokens_BT = torch.zeros((1, 12), dtype=torch.int64)
    assert model(tokens_BT, tokens_BT).item() / 12 == pytest.approx(math.log(50))


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    item = weights_sha256(build_model(SHAPE, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert weights_sha256(build_model(SHAPE, seed=0)) == item
    assert weights_sha256(build_model(SHAPE, seed=1)) != item


def test_the_digest_of_weights_sees_one_bit_and_one_name() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    renamed = torch.nn.ModuleDict({"b": model["a"]})
    item = weights_sha256(model)
    assert weights_sha256(renamed) != item
    with torch.no_grad():
        model["a"].weight[0, 0] = torch.nextafter(model["a"].weight[0, 0], torch.tensor(9.0))
    assert weights_sha256(model) != item


@pytest.mark.parametrize("name", VARIANTS)
def test_the_planner_counts_the_parameters_that_the_model_has(name: str) -> None:
    config = variant(name)
    model = build_model(config, 0)
    workload = config.workload()
    assert sum(parameter.numel() for parameter in model.parameters()) == workload.num_params
    in_products = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert in_products == workload.matrix_params


@pytest.mark.parametrize("name", VARIANTS)
def test_the_planner_counts_the_pairs_that_attention_computes(name: str) -> None:
    config = replace(variant(name), sequence_length=64)
    pairs = sum(
        int(visible(1, 64, None, config.layer_window(layer), torch.device("cpu")).sum())
        for layer in range(config.num_layers)
    )
    exact = 12 * config.num_heads * config.size_of_heads * pairs / 64
    # The formula takes half of T for the mean of 1 to T: off by half a key per layer.
    assert config.workload().attention_flops_per_token == pytest.approx(exact, rel=0.2)


def test_windows_leave_out_every_fourth_layer_and_the_last() -> None:
    config = replace(SHAPE, num_layers=6, window=3)
    assert [config.layer_window(layer) for layer in range(6)] == [3, 3, 3, None, 3, None]
    assert [config.has_value_embedding(layer) for layer in range(6)] == [False] * 6
    valued = replace(config, value_embeddings=True)
    assert [valued.has_value_embedding(layer) for layer in range(6)] == [False, True] * 3


def test_a_plain_model_begins_as_gpt2_did() -> None:
    model = build_model(replace(SHAPE, width=240, hidden_size=480, zero_init=False), seed=0)
    assert float(model.blocks[0].mlp.up.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.blocks[0].mlp.down.weight.detach().std()) == pytest.approx(
        0.01, rel=0.02
    )  # / sqrt(2 x 2 layers)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cost.workload import Workload
from trainer.attention import DENSE_MAX_TOKENS, attend, attend_dense
from trainer.config import ModelConfig
from trainer.model import IGNORED, Transformer, build_model, weights_sha256

SHAPE = ModelConfig(
    vocab_size=50, sequence_length=12, num_layers=2, width=24, num_heads=6, num_kv_heads=2, hidden_size=20
)


def random_qkv(T: int, dtype: torch.dtype, H: int = 6, G: int = 2, K: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(2, H, T, K), (2, G, T, K), (2, G, T, K)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every output position from its own sum, in double precision."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys, values = k[b, h // group, : t + 1], v[b, h // group, : t + 1]
                weights = torch.softmax(keys @ q[b, h, t] / math.sqrt(q.shape[3]), dim=0)
                out[b, h, t] = weights @ values
    return out


@pytest.mark.parametrize("function", [attend, attend_dense])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("T", [1, 5, 33])
def test_attention_is_what_its_definition_says(function: object, dtype: torch.dtype, tolerance: float, T: int) -> None:
    q, k, v = random_qkv(T, dtype)
    assert callable(function)
    torch.testing.assert_close(function(q, k, v).double(), by_loops(q, k, v), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [DENSE_MAX_TOKENS, DENSE_MAX_TOKENS + 1])
def test_both_ways_of_attention_agree_in_output_and_gradients(T: int) -> None:
    results = []
    for function in (attend, attend_dense):
        inputs = random_qkv(T, torch.bfloat16, H=2, G=1)
        out = function(*inputs)
        (out.float() ** 2).sum().backward()
        results.append([out, *(each.grad for each in inputs)])
    for one, two in zip(*results, strict=True):
        error = (one.float() - two.float()).norm() / two.float().norm()
        assert error < 0.01


def plain_logits(model: Transformer, tokens_T: Tensor) -> Tensor:
    """The same model written again, one sequence, one head and one pair of a head at a time."""
    config, weights = model.config, {name: value.double() for name, value in model.named_parameters()}
    T, K = len(tokens_T), config.width // config.num_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turned(x_TK: Tensor) -> Tensor:
        out = torch.empty_like(x_TK)
        for t in range(T):
            for pair in range(K // 2):
                angle = t / config.rope_base ** (2 * pair / K)
                low, high = x_TK[t, pair], x_TK[t, pair + K // 2]
                out[t, pair] = low * math.cos(angle) - high * math.sin(angle)
                out[t, pair + K // 2] = high * math.cos(angle) + low * math.sin(angle)
        return out

    x = weights["embedding.weight"][tokens_T]
    for number in range(config.num_layers):
        layer = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{number}.")
        }
        h = norm(x, layer["attention_norm.weight"])
        heads = []
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            rows, group_rows = slice(head * K, (head + 1) * K), slice(group * K, (group + 1) * K)
            q = h @ layer["attention.query.weight"][rows].T
            k = h @ layer["attention.key.weight"][group_rows].T
            v = h @ layer["attention.value.weight"][group_rows].T
            if config.qk_norm:
                q = norm(q, layer["attention.query_norm.weight"])
                k = norm(k, layer["attention.key_norm.weight"])
            scores = turned(q) @ turned(k).T / math.sqrt(K)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ layer["attention.output.weight"].T
        h = norm(x, layer["mlp_norm.weight"])
        gate, up = h @ layer["mlp.gate.weight"].T, h @ layer["mlp.up.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down.weight"].T
    head = weights["embedding.weight" if config.tied_embeddings else "head.weight"]
    return norm(x, weights["norm.weight"]) @ head.T


def with_random_weights(config: ModelConfig) -> Transformer:
    """Fresh models have zeros where this would see no difference."""
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_model_is_what_its_parts_say(tied: bool, qk_norm: bool) -> None:
    model = with_random_weights(replace(SHAPE, tied_embeddings=tied, qk_norm=qk_norm))
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([plain_logits(model, tokens_T) for tokens_T in tokens_BT])
    torch.testing.assert_close(model.logits(tokens_BT).double(), expected, atol=1e-4, rtol=1e-4)


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
    one = weights_sha256(build_model(SHAPE, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert weights_sha256(build_model(SHAPE, seed=0)) == one
    assert weights_sha256(build_model(SHAPE, seed=1)) != one


def test_the_digest_of_weights_sees_one_bit_and_one_name() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    renamed = torch.nn.ModuleDict({"b": model["a"]})
    one = weights_sha256(model)
    assert weights_sha256(renamed) != one
    with torch.no_grad():
        model["a"].weight[0, 0] = torch.nextafter(model["a"].weight[0, 0], torch.tensor(9.0))
    assert weights_sha256(model) != one


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_planner_counts_the_parameters_that_the_model_has(tied: bool, qk_norm: bool) -> None:
    config = replace(SHAPE, tied_embeddings=tied, qk_norm=qk_norm)
    counted = Workload.from_shape(
        num_tokens=0,
        num_layers=config.num_layers,
        width=config.width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        sequence_length=config.sequence_length,
        global_batch_size=1,
        tied_embeddings=tied,
        qk_norm=qk_norm,
    ).num_params
    assert sum(parameter.numel() for parameter in build_model(config, 0).parameters()) == counted

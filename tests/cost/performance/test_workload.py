"""Parameters and FLOPs against numbers that can be added up on paper or read from a published model card."""

from __future__ import annotations

from cost.performance.workload import Workload


def tiny(**changes: object) -> Workload:
    shape: dict[str, object] = {
        "num_tokens": 1000,
        "num_layers": 2,
        "width": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "hidden_size": 16,
        "vocab_size": 32,
        "sequence_length": 4,
        "global_batch_size": 5,
    }
    return Workload.from_shape(**(shape | changes))  # type: ignore[arg-type]


def test_parameters_of_a_tiny_model_add_up() -> None:
    # Per layer: queries 8*8, keys and values 2*8*4, output 8*8, SwiGLU 3*8*16, two norms 2*8, QK-norm 2*4.
    per_layer = 64 + 64 + 64 + 384 + 16 + 8
    assert tiny().num_params == 2 * per_layer + 8 + 2 * 32 * 8
    assert tiny(tied_embeddings=True).num_params == 2 * per_layer + 8 + 32 * 8
    assert tiny(qk_norm=False).num_params == tiny().num_params - 2 * 8


def test_tinyllama_counts_as_its_model_card_says() -> None:
    # 22 layers, width 2048, 32 heads, 4 KV heads, hidden 5632, vocabulary 32000: 1,100,048,384 parameters.
    tinyllama = Workload.from_shape(
        num_tokens=1,
        num_layers=22,
        width=2048,
        num_heads=32,
        num_kv_heads=4,
        hidden_size=5632,
        vocab_size=32000,
        sequence_length=2048,
        global_batch_size=1024,
        qk_norm=False,
    )
    assert tinyllama.num_params == 1_100_048_384


def test_flops_per_token_are_six_per_matrix_weight_plus_causal_attention() -> None:
    work = tiny()
    matrices = 2 * (64 + 64 + 64 + 384) + 32 * 8
    assert work.active_matrix_params == matrices == 1408
    # 12 FLOPs x 2 layers x 8 (heads x head size) x 2 keys on average of 4.
    assert work.flops_per_token == 6 * 1408 + 12 * 2 * 8 * 2
    assert work.total_flops == 1000 * work.flops_per_token


def test_a_tied_head_costs_the_same_flops() -> None:
    assert tiny(tied_embeddings=True).flops_per_token == tiny().flops_per_token


def test_experts_add_parameters_but_only_the_active_ones_add_flops() -> None:
    dense, sparse = tiny(), tiny(num_experts=4, num_active_experts=1)
    router = 8 * 4
    assert sparse.num_params == dense.num_params + 2 * (3 * 384 + router)
    assert sparse.active_params == dense.num_params + 2 * router
    assert sparse.flops_per_token == dense.flops_per_token + 6 * 2 * router


def test_two_matrix_mlps_have_two_thirds_of_the_weights() -> None:
    assert tiny(mlp="gelu").expert_params * 3 == tiny().expert_params * 2


def test_the_last_step_is_whole() -> None:
    assert tiny().tokens_per_step == 20
    assert tiny(num_tokens=100).num_steps == 5
    assert tiny(num_tokens=101).num_steps == 6

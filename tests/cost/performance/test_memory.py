"""Peak memory by hand, against published peaks, and at the edge of what fits."""

from __future__ import annotations

import dataclasses

import pytest

from cost.market.hardware import BYTES_PER_GIB, accelerator, local_cpu
from cost.performance.layout import Layout
from cost.performance.memory import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    FRAGMENTATION,
    GATHERED_LAYERS,
    IMPOSSIBLE_SHARE,
    KINDS,
    SURE_SHARE,
    largest_micro_batch,
    peak,
)
from cost.performance.software import Software, our_trainer
from cost.performance.workload import Workload

SHAPE = Workload.from_shape(
    num_tokens=10**9,
    num_layers=4,
    width=512,
    num_heads=8,
    hidden_size=1024,
    vocab_size=1000,
    sequence_length=256,
    global_batch_size=64,
    mlp="gelu",
    qk_norm=False,
)
BILLION = Workload.from_shape(
    num_tokens=10**9,
    num_layers=24,
    width=2048,
    num_heads=16,
    hidden_size=8192,
    vocab_size=50368,
    sequence_length=2048,
    global_batch_size=64,
    mlp="gelu",
)
ONE = Layout(1, 1, "replicated", 2, 1, False, "bf16")
EIGHT = dataclasses.replace(ONE, gpus_per_node=8)
H100 = accelerator("H100-SXM")
PLAIN = Software("plain", rotary=False)


def test_the_kinds_are_what_a_hand_counts():
    found = peak(SHAPE, H100, ONE, software=PLAIN)
    params, tokens = SHAPE.num_params, 2 * 256
    assert found.weights == 4 * params + 2 * params  # fp32, and autocast's bf16 copy
    assert found.gradients == 4 * params
    assert found.optimizer == 8 * params
    per_layer = 2 * tokens * (4 * 512 + 4 * 512 + 2 * 1024)  # norms; q, k, v, output; the MLP's two
    assert found.activations == 4 * per_layer
    assert found.logits == 10 * tokens * 1000
    allocated = found.weights + found.gradients + found.optimizer + found.activations + found.logits
    assert found.overhead == CONTEXT_BYTES + FRAGMENTATION * allocated
    assert found.total_bytes == allocated + found.overhead
    assert tuple(found.by_kind) == KINDS
    assert sum(found.by_kind.values()) == found.total_bytes
    assert found.total_gib == found.total_bytes / BYTES_PER_GIB


def test_the_buffer_of_checkpoints_is_one_ranks_share_of_the_state():
    params = SHAPE.num_params
    on_cpu = peak(SHAPE, local_cpu(1), ONE, software=PLAIN)
    assert (on_cpu.staging, on_cpu.host_staging_bytes) == (12 * params, 0)  # fp32 weights and two moments
    assert on_cpu.by_kind["staging"] == on_cpu.staging
    on_gpu = peak(SHAPE, H100, EIGHT, software=PLAIN)
    assert (on_gpu.staging, on_gpu.host_staging_bytes) == (0, 12 * params / 8)
    sharded = peak(SHAPE, H100, dataclasses.replace(EIGHT, sharding="zero3"), software=PLAIN)
    assert sharded.host_staging_bytes == on_gpu.host_staging_bytes
    muon = peak(SHAPE, local_cpu(1), ONE, software=dataclasses.replace(PLAIN, optimizer="muon"))
    assert on_cpu.staging - muon.staging == 4 * (SHAPE.matrix_params - 512_000)


def test_sharding_divides_what_it_says():
    state = {name: peak(SHAPE, H100, dataclasses.replace(EIGHT, sharding=name), software=PLAIN) for name in
             ("replicated", "zero1", "zero2", "zero3")}  # fmt: skip
    params = SHAPE.num_params
    assert state["replicated"].gradients == 2 * 4 * params  # DDP's buckets are a second copy
    assert state["zero1"].optimizer == state["zero2"].optimizer == state["zero3"].optimizer == params
    assert state["zero2"].gradients == 4 * params / 8
    gathered = GATHERED_LAYERS * (SHAPE.matrix_params - 512_000) / 4 + 2 * 512_000
    assert state["zero3"].weights == 4 * params / 8 + 2 * gathered
    assert state["zero3"].gradients == 4 * params / 8 + 2 * gathered
    assert state["zero3"].overhead > COMMUNICATION_BYTES


def test_muon_keeps_one_moment_of_the_matrices():
    both = peak(SHAPE, H100, ONE, software=PLAIN).optimizer
    item = peak(SHAPE, H100, ONE, software=dataclasses.replace(PLAIN, optimizer="muon")).optimizer
    assert both - item == 4 * (SHAPE.matrix_params - 512_000)


def test_what_is_recomputed_fused_or_never_made_is_not_kept():
    whole = peak(BILLION, H100, ONE, software=PLAIN)
    recomputed = peak(BILLION, H100, dataclasses.replace(ONE, activation_checkpointing=True), software=PLAIN)
    selective = peak(BILLION, H100, ONE, software=dataclasses.replace(PLAIN, selective_checkpointing=True))
    fused = peak(BILLION, H100, ONE, software=dataclasses.replace(PLAIN, fused=True))
    assert recomputed.activations < 0.2 * whole.activations
    assert selective.activations == 0.5 * whole.activations
    assert fused.activations < whole.activations
    assert fused.logits < whole.logits
    assert peak(BILLION, H100, ONE, software=dataclasses.replace(PLAIN, fused_loss=True)).logits < fused.logits


def test_rotation_fp32_norms_and_plain_attention_each_add_their_tensors():
    base = peak(SHAPE, H100, ONE, software=PLAIN).activations
    tokens, layers = 512, 4
    rotary = peak(SHAPE, H100, ONE, software=dataclasses.replace(PLAIN, rotary=True)).activations
    assert rotary - base == layers * tokens * 2 * (512 + 512)
    wide = peak(SHAPE, H100, ONE, software=dataclasses.replace(PLAIN, wide_norms=True)).activations
    assert wide - base == layers * tokens * 2 * (2 * 512)
    plain = peak(SHAPE, H100, ONE, software=dataclasses.replace(PLAIN, attention="plain")).activations
    assert plain - base == layers * tokens * 5 * 256 * 8


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    for device in ("RTX4090", "A100-40GB", "H100-SXM"):
        for layout in (ONE, dataclasses.replace(EIGHT, sharding="zero3")):
            best = largest_micro_batch(BILLION, accelerator(device), layout)
            if best == 0:
                assert not peak(BILLION, accelerator(device), dataclasses.replace(layout, micro_batch_size=1)).fits
                continue
            largest = peak(BILLION, accelerator(device), dataclasses.replace(layout, micro_batch_size=best))
            beyond = peak(BILLION, accelerator(device), dataclasses.replace(layout, micro_batch_size=best + 1))
            assert largest.fits
            assert not beyond.fits or best == 1024


def test_the_largest_micro_batch_obeys_its_limit_and_knows_when_nothing_fits():
    assert largest_micro_batch(SHAPE, H100, ONE, at_most=7) == 7
    huge = dataclasses.replace(BILLION, num_params=70 * 10**9)
    assert largest_micro_batch(huge, H100, ONE) == 0
    assert peak(huge, H100, ONE).impossible


def test_between_sure_and_impossible_lies_what_one_would_have_to_try():
    found = peak(BILLION, H100, ONE)
    tight = dataclasses.replace(found, capacity_bytes=found.total_bytes)
    assert not tight.fits
    assert not tight.impossible
    assert dataclasses.replace(found, capacity_bytes=found.total_bytes / SURE_SHARE * 1.001).fits
    assert dataclasses.replace(found, capacity_bytes=found.total_bytes / IMPOSSIBLE_SHARE * 0.999).impossible


def test_a_process_on_a_processor_has_no_cuda_context():
    on_cpu = peak(SHAPE, local_cpu(1), ONE, software=our_trainer())
    on_gpu = peak(SHAPE, H100, ONE, software=our_trainer())
    assert on_cpu.overhead < on_gpu.overhead
    assert on_cpu.weights == on_gpu.weights


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_memory_grows_with_the_micro_batch(micro_batch):
    smaller = peak(BILLION, H100, dataclasses.replace(ONE, micro_batch_size=micro_batch))
    larger = peak(BILLION, H100, dataclasses.replace(ONE, micro_batch_size=micro_batch + 1))
    assert larger.total_bytes > smaller.total_bytes
    assert larger.weights == smaller.weights

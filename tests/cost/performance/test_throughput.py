"""The roofline moves the way hardware does, and says how sure it is."""

from __future__ import annotations

import dataclasses
import math

import pytest

from cost.market.hardware import accelerator, accelerators, local_cpu
from cost.performance.layout import Layout
from cost.performance.roofline import PARTS, demand, step_seconds
from cost.performance.software import Software, our_trainer
from cost.performance.throughput import ThroughputEstimate, default_calibration, estimate
from cost.performance.workload import Workload

TINYLLAMA = Workload.from_shape(
    num_tokens=10**9,
    num_layers=22,
    width=2048,
    num_heads=32,
    num_kv_heads=4,
    hidden_size=5632,
    vocab_size=32000,
    sequence_length=2048,
    global_batch_size=512,
)
EIGHT = Layout(1, 8, "replicated", 8, 8, False, "bf16")
H100 = accelerator("H100-SXM")
A100 = accelerator("A100-80GB-SXM")


def tokens_per_second(layout: Layout = EIGHT, device=H100, workload: Workload = TINYLLAMA, **more) -> float:
    return estimate(workload, device, layout, default_calibration(), **more).tokens_per_second


def test_the_parts_add_up_to_the_step_and_the_step_to_the_tokens():
    found = estimate(TINYLLAMA, H100, EIGHT, default_calibration())
    assert tuple(found.seconds_by_part) == PARTS
    assert sum(found.seconds_by_part.values()) == pytest.approx(found.seconds_per_step)
    assert found.tokens_per_second == pytest.approx(512 * 2048 / found.seconds_per_step)
    assert found.mfu == pytest.approx(found.tokens_per_second * TINYLLAMA.flops_per_token / (8 * 989e12))
    assert found.bound_by == "matmul"


def test_one_pass_counts_six_flops_per_weight_and_token():
    need = demand(TINYLLAMA, H100, EIGHT, our_trainer(), node_network_bytes_per_second=1.0)
    tokens = 8 * 2048
    assert need.tokens == tokens
    assert need.head_flops == 6 * 2048 * 32000 * tokens
    assert need.block_flops + need.head_flops == 6 * TINYLLAMA.matrix_params * tokens
    assert need.network_bytes_per_second is None


def test_ring_collectives_move_two_copies_for_ddp_and_three_a_pass_for_fsdp():
    layouts = {name: dataclasses.replace(EIGHT, sharding=name) for name in ("replicated", "zero1", "zero2", "zero3")}
    needs = {
        name: demand(TINYLLAMA, H100, layout, our_trainer(), node_network_bytes_per_second=1.0)
        for name, layout in layouts.items()
    }
    ring = TINYLLAMA.num_params * 7 / 8
    assert needs["replicated"].reduced_bytes_per_step == needs["zero1"].reduced_bytes_per_step == 2 * 4 * ring
    assert needs["zero3"].gathered_bytes == 3 * 2 * ring
    assert needs["zero2"].gathered_bytes == needs["zero2"].reduced_bytes_per_step == 2 * ring
    assert needs["replicated"].update_bytes_per_step > needs["zero1"].update_bytes_per_step


@pytest.mark.parametrize("field", ["bf16_flops", "memory_bytes_per_second", "nvlink_bytes_per_second"])
def test_a_better_device_is_never_slower(field):
    better = dataclasses.replace(H100, **{field: 2 * getattr(H100, field)})
    if field == "bf16_flops":
        better = dataclasses.replace(better, tdp_watts=2 * H100.tdp_watts)
    assert tokens_per_second(device=better) > tokens_per_second()


def test_a_device_short_of_power_reaches_less_of_its_peak():
    throttled = dataclasses.replace(H100, tdp_watts=350.0)
    assert tokens_per_second(device=throttled) < 0.8 * tokens_per_second()


def test_a_slow_network_makes_sharded_weights_the_worse_choice():
    spread = dataclasses.replace(EIGHT, num_nodes=2, grad_accumulation=4)
    sharded = dataclasses.replace(spread, sharding="zero3")
    slow, fast = 1.25e9, 400e9
    assert tokens_per_second(spread, node_network_bytes_per_second=slow) > 2 * tokens_per_second(
        sharded, node_network_bytes_per_second=slow
    )
    assert tokens_per_second(sharded, node_network_bytes_per_second=fast) == pytest.approx(
        tokens_per_second(spread, node_network_bytes_per_second=fast), rel=0.1
    )


def test_two_devices_are_at_most_twice_as_fast_as_one():
    alone = dataclasses.replace(EIGHT, gpus_per_node=1)
    for name, device in accelerators().items():
        pair = dataclasses.replace(EIGHT, gpus_per_node=2)
        assert tokens_per_second(pair, device) <= 2 * tokens_per_second(alone, device), name


def test_recomputing_activations_costs_less_than_a_third():
    recomputed = dataclasses.replace(EIGHT, activation_checkpointing=True)
    assert 0.70 * tokens_per_second() < tokens_per_second(recomputed) < 0.85 * tokens_per_second()


def test_more_passes_per_update_amortize_the_optimizer():
    once = dataclasses.replace(EIGHT, grad_accumulation=1)
    assert tokens_per_second() > 1.1 * tokens_per_second(once)


def test_fp8_helps_where_the_device_has_it_and_the_model_is_wide():
    in_fp8 = dataclasses.replace(EIGHT, precision="fp8")
    wide = dataclasses.replace(TINYLLAMA, width=8192, num_heads=64, head_size=128, hidden_size=22528)
    assert tokens_per_second(in_fp8, workload=wide) > 1.25 * tokens_per_second(workload=wide)
    assert tokens_per_second(in_fp8, A100) == tokens_per_second(EIGHT, A100)


def test_kernels_matter_as_much_as_their_papers_say():
    long = dataclasses.replace(TINYLLAMA, sequence_length=16384)

    def with_attention(kernel: str) -> float:
        program = dataclasses.replace(our_trainer(), attention=kernel)
        return tokens_per_second(workload=long, software=program)

    assert with_attention("flash3") > 1.15 * with_attention("flash2") > 1.5 * with_attention("plain")
    assert tokens_per_second(software=our_trainer(compiled=True)) > 1.05 * tokens_per_second()
    window = dataclasses.replace(our_trainer(), attention_share=0.25)
    assert tokens_per_second(workload=long, software=window) > 1.3 * tokens_per_second(workload=long)


def test_muon_costs_more_than_adamw():
    assert tokens_per_second(software=our_trainer(optimizer="muon")) < tokens_per_second(
        software=our_trainer(optimizer="adamw")
    )


def test_every_device_of_the_table_gets_a_finite_estimate_below_its_peak():
    for name, device in accelerators().items():
        for precision in ("bf16", "fp16", "fp32"):
            layout = dataclasses.replace(EIGHT, gpus_per_node=1, precision=precision)
            found = estimate(TINYLLAMA, device, layout, default_calibration())
            assert 0.0 < found.mfu < 1.0, (name, precision)


def test_an_unknown_framework_gets_the_pooled_constants_and_the_widest_interval():
    calibration = default_calibration()

    def width(found: ThroughputEstimate) -> float:
        return math.log(found.interval[1] / found.interval[0])

    ours = estimate(TINYLLAMA, H100, EIGHT, calibration)
    stranger = estimate(TINYLLAMA, H100, EIGHT, calibration, software=Software("never seen", wide_norms=True))
    known = estimate(TINYLLAMA, H100, EIGHT, calibration, software=Software("llm-foundry"))
    elsewhere = estimate(TINYLLAMA, accelerator("L40S"), EIGHT, calibration, software=Software("llm-foundry"))
    assert (ours.basis, stranger.basis, known.basis) == ("pooled", "pooled", "measured")
    assert elsewhere.basis == "framework"
    assert width(ours) > width(known)
    assert width(ours) > width(elsewhere)
    assert ours.interval[0] < ours.tokens_per_second < ours.interval[1]


def test_what_our_own_run_measured_beats_the_model_on_that_device_alone():
    calibration = default_calibration()
    before = estimate(TINYLLAMA, H100, EIGHT, calibration)
    taught = calibration.with_measurement(
        "slm", H100.name, measured=0.8 * before.tokens_per_second, modelled=before.tokens_per_second
    )
    after = estimate(TINYLLAMA, H100, EIGHT, taught)
    assert after.tokens_per_second == pytest.approx(0.8 * before.tokens_per_second)
    assert after.basis == "measured"
    assert estimate(TINYLLAMA, A100, EIGHT, taught) == estimate(TINYLLAMA, A100, EIGHT, calibration)
    again = taught.with_measurement(
        "slm", H100.name, measured=before.tokens_per_second, modelled=after.tokens_per_second
    )
    assert estimate(TINYLLAMA, H100, EIGHT, again).tokens_per_second == pytest.approx(before.tokens_per_second)


def test_a_step_of_nothing_but_products_takes_the_time_that_division_gives():
    constants = default_calibration().constants
    ideal = dataclasses.replace(
        constants,
        matmul=1.0,
        power=1e-12,
        activation_traffic=1e-12,
        logits_traffic=1e-12,
        optimizer=1e-12,
        launch=1e-12,
    )
    layout = Layout(1, 1, "replicated", 8, 1, False, "bf16")
    program = Software("ideal", attention_share=1e-12)
    need = demand(TINYLLAMA, H100, layout, program, node_network_bytes_per_second=1.0)
    seconds = 6 * TINYLLAMA.matrix_params * 8 * 2048 / 989e12
    assert sum(step_seconds(need, ideal)) == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "micro_batch", "passes", "measured"),
    [("bf16", 16, 2, 13267), ("bf16", 16, 1, 11979), ("bf16", 4, 1, 7526), ("fp32", 16, 1, 7753)],
)
def test_one_core_trains_a_small_shape_as_fast_as_it_was_timed(precision, micro_batch, passes, measured):
    small = Workload.from_shape(
        num_tokens=10**6,
        num_layers=4,
        width=128,
        num_heads=4,
        num_kv_heads=2,
        hidden_size=384,
        vocab_size=1024,
        sequence_length=128,
        global_batch_size=micro_batch * passes,
    )
    layout = Layout(1, 1, "replicated", micro_batch, passes, False, precision)
    found = estimate(small, local_cpu(1), layout, default_calibration())
    assert found.tokens_per_second == pytest.approx(measured, rel=0.2)

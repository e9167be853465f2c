"""Seconds of one optimizer step on one device: what it asks for, divided by rates that devices sustain.

`demand` counts FLOPs, bytes and messages from the shape, the data sheet and the layout; nothing in it is fitted.
`step_seconds` divides by `Constants`, which are (cost/data/calibration.json). Invariant: the parts add up to the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost.market.hardware import TERA, Accelerator, Precision
from cost.performance.layout import Layout
from cost.performance.software import Software
from cost.performance.workload import Workload

PARTS = ("matmul", "attention", "activations", "logits", "communication", "optimizer", "launch")

MEMORY_EFFICIENCY = 0.85
"""Share of the data sheet's memory bandwidth that a streaming kernel reaches; assumed for every device."""
LINK_EFFICIENCY = 0.75
"""Share of NVLink's data-sheet rate in a large all-reduce; assumed (nccl-tests on A100 and H100 nodes)."""
BALANCED_WATTS_PER_TFLOPS = 0.6
"""Around this many watts per dense TFLOP/s a device must lower its clock under sustained matrix products."""
UNLIMITED_WATTS_PER_TFLOPS = 2.0
"""Assumed where no source states the power limit."""
OWNED_PARAM_TRAFFIC_BYTES = 30.0
"""AdamW per parameter that a device updates: weight, gradient, two moments, read and written, and the clipping."""
HELD_PARAM_TRAFFIC_BYTES = 6.0
"""Per parameter that a device holds at all: zeroing and casting."""
MUON_ITERATIONS = 5
MUON_FLOPS_PER_WEIGHT_AND_WIDTH = 6.0
"""One Newton-Schulz iteration on a matrix of width m costs at most 4m + 2m FLOPs per weight (Jordan et al. 2024)."""
MUON_EFFICIENCY = 0.7
"""Rate of Muon's products against the model's own; assumed."""
PLAIN_ATTENTION_BYTES = 24.0
"""Traffic per head and (query, key) pair without a flash kernel: scores, mask, softmax, forward and backward."""
REFERENCE_HEAD_SIZE = 128
GATHER_BYTES = 2.0
"""FSDP gathers and reduces in bf16."""
BACKWARD_SHARE = 2.0 / 3.0
"""Of a pass, during which gradients can be sent; a backward pass costs twice a forward pass."""
EMULATED_SHARE = 0.25
"""Assumed share of the fp16 peak that fp32 arithmetic reaches where no fp32 figure is known."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted; all positive, moved as logarithms. Traffic is bytes per token, layer and unit of width.

    matmul: share of the peak that large products reach on a device that is never short of power.
    power: how much a device with few watts per FLOP/s falls below that.
    graphics_power: share of the power limit that matters on GDDR cards, against stacked memory.
    attention, head_size_exponent: flash attention's rate against products'; its fall with smaller heads.
    hopper_flash2: flash-attention 2's further loss on Hopper and later, which it was not written for.
    recompute: cost of a recomputed forward FLOP against any other.
    activation_traffic, fused_traffic: norms, activations and residuals; what remains when they are fused.
    logits_traffic: bytes per token and vocabulary entry.
    fp8_gain, fp8_traffic: share of the doubled peak that is reached; quantization.
    optimizer: the update against its counted traffic.
    nvlink_exposed, pcie_exposed: share of communication that no computation hides.
    network, pcie: share of the nominal rate of the network between nodes, of PCIe, that collectives reach.
    launch: seconds in which a host launches one layer's kernels, forward and backward, when they are not fused.
    """

    matmul: float
    power: float
    graphics_power: float
    attention: float
    head_size_exponent: float
    hopper_flash2: float
    recompute: float
    activation_traffic: float
    fused_traffic: float
    logits_traffic: float
    fp8_gain: float
    fp8_traffic: float
    optimizer: float
    nvlink_exposed: float
    pcie_exposed: float
    network: float
    pcie: float
    launch: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What one step asks of one device: `passes` micro-batches, then one update. Work is per pass unless it says so."""

    passes: int
    tokens: int
    block_flops: float
    head_flops: float
    attention_flops: float
    plain_attention_bytes: float
    recomputed_share: float
    width_units: float
    logits_units: float
    layers: int
    gathered_bytes: float
    reduced_bytes_per_step: float
    update_bytes_per_step: float
    muon_flops_per_step: float
    peak_flops: float
    peak_fp8_flops: float
    memory_bytes_per_second: float
    watts_per_tflops: float
    stacked_memory: bool
    slow_flash2: bool
    head_size: int
    fused: bool
    nvlink_bytes_per_second: float | None
    pcie_bytes_per_second: float
    network_bytes_per_second: float | None
    """Of one device, between nodes; None on a single node."""


def peak_flops(accelerator: Accelerator, precision: Precision) -> float:
    """Dense FLOP/s of the units that run this precision: fp8 products also need bf16, fp32 may need emulation."""
    precision = "bf16" if precision == "fp8" else precision
    known = accelerator.peak_flops(precision) or accelerator.fp32_flops
    if known is not None:
        return known
    return EMULATED_SHARE * (accelerator.fp16_flops or accelerator.bf16_flops or TERA)


def demand(
    workload: Workload,
    accelerator: Accelerator,
    layout: Layout,
    software: Software,
    *,
    node_network_bytes_per_second: float,
) -> Demand:
    """Count one step's work. The network is one node's, in one direction."""
    tokens = layout.micro_batch_size * workload.sequence_length
    head_weights = workload.vocab_size * workload.width
    block_weights = workload.active_matrix_params - head_weights
    peak = peak_flops(accelerator, layout.precision)
    fp8_peak = accelerator.fp8_flops if layout.precision == "fp8" else None
    gated = 1.5 if workload.mlp == "swiglu" else 1.0
    mlp_width = gated * workload.hidden_size * workload.num_active_experts
    pairs = float(workload.sequence_length) * workload.num_heads * workload.num_layers * tokens
    gathered, reduced = _message_bytes(workload, layout, software)
    capability = accelerator.compute_capability
    return Demand(
        passes=layout.grad_accumulation,
        tokens=tokens,
        block_flops=6.0 * block_weights * tokens,
        head_flops=6.0 * head_weights * tokens,
        attention_flops=workload.attention_flops_per_token * tokens * software.attention_share,
        plain_attention_bytes=PLAIN_ATTENTION_BYTES * pairs if software.attention == "plain" else 0.0,
        recomputed_share=software.recomputed_share(layout.activation_checkpointing),
        width_units=float(workload.num_layers * tokens) * (workload.width + 0.25 * mlp_width),
        logits_units=float(workload.vocab_size * tokens),
        layers=workload.num_layers,
        gathered_bytes=gathered,
        reduced_bytes_per_step=reduced,
        update_bytes_per_step=_update_bytes(workload, layout),
        muon_flops_per_step=_muon_flops(workload, layout, block_weights) if software.optimizer == "muon" else 0.0,
        peak_flops=peak,
        peak_fp8_flops=peak if fp8_peak is None else fp8_peak,
        memory_bytes_per_second=accelerator.memory_bytes_per_second * MEMORY_EFFICIENCY,
        watts_per_tflops=_watts_per_tflops(accelerator, peak),
        stacked_memory=_has_stacked_memory(capability),
        slow_flash2=software.attention != "flash3" and capability.split(".")[0] in ("9", "10"),
        head_size=workload.head_size,
        fused=software.fused,
        nvlink_bytes_per_second=_nvlink(accelerator, layout),
        pcie_bytes_per_second=accelerator.pcie_bytes_per_second,
        network_bytes_per_second=(
            None if layout.num_nodes == 1 else node_network_bytes_per_second / layout.gpus_per_node
        ),
    )


def _has_stacked_memory(capability: str) -> bool:
    """HBM next to the chip: NVIDIA's data-center dies and AMD's Instinct; the others carry GDDR."""
    return capability in ("7.0", "8.0") or capability.split(".")[0] in ("9", "10") or capability.startswith("gfx")


def _watts_per_tflops(accelerator: Accelerator, peak: float) -> float:
    return UNLIMITED_WATTS_PER_TFLOPS if accelerator.tdp_watts is None else accelerator.tdp_watts / peak * TERA


def _nvlink(accelerator: Accelerator, layout: Layout) -> float | None:
    if accelerator.nvlink_bytes_per_second is None or layout.gpus_per_node > accelerator.nvlink_group:
        return None
    return accelerator.nvlink_bytes_per_second * LINK_EFFICIENCY


def _message_bytes(workload: Workload, layout: Layout, software: Software) -> tuple[float, float]:
    """Bytes that one device sends per pass, and per step, in ring collectives (Patarasuk and Yuan 2009).

    zero3 gathers weights twice and scatters gradients in every pass; zero2 scatters in every pass and gathers once a
    step; the others reduce once a step.
    """
    ring = (layout.world_size - 1) / layout.world_size
    params = workload.num_params * ring
    if layout.sharding == "zero3":
        return 3 * GATHER_BYTES * params, 0.0
    if layout.sharding == "zero2":
        return GATHER_BYTES * params, GATHER_BYTES * params
    return 0.0, 2 * software.reduce_bytes * params


def _update_bytes(workload: Workload, layout: Layout) -> float:
    owners = 1 if layout.sharding == "replicated" else layout.world_size
    return workload.num_params * (OWNED_PARAM_TRAFFIC_BYTES / owners + HELD_PARAM_TRAFFIC_BYTES)


def _muon_flops(workload: Workload, layout: Layout, block_weights: int) -> float:
    owners = 1 if layout.sharding == "replicated" else layout.world_size
    return MUON_ITERATIONS * MUON_FLOPS_PER_WEIGHT_AND_WIDTH * workload.width * block_weights / owners


def _sustained_share(need: Demand, constants: Constants) -> float:
    """Of the peak, under the power limit."""
    watts = need.watts_per_tflops * (1.0 if need.stacked_memory else constants.graphics_power)
    return constants.matmul / (1.0 + constants.power * (BALANCED_WATTS_PER_TFLOPS / watts) ** 2)


def _attention_seconds(need: Demand, constants: Constants, rate: float, repeated: float, speed: float) -> float:
    head: float = min(1.0, need.head_size / REFERENCE_HEAD_SIZE) ** constants.head_size_exponent
    share = constants.attention * head * speed * (constants.hopper_flash2 if need.slow_flash2 else 1.0)
    seconds = need.attention_flops * repeated / (rate * share)
    return seconds + need.plain_attention_bytes * repeated / need.memory_bytes_per_second


def _link_rate(need: Demand, constants: Constants) -> float:
    pcie = constants.pcie * need.pcie_bytes_per_second
    inside = pcie if need.nvlink_bytes_per_second is None else need.nvlink_bytes_per_second
    if need.network_bytes_per_second is None:
        return inside
    return min(inside, constants.network * need.network_bytes_per_second)


def _communication_seconds(need: Demand, constants: Constants, compute: float) -> float:
    """What computation does not hide, over a whole step."""
    exposed = constants.pcie_exposed if need.nvlink_bytes_per_second is None else constants.nvlink_exposed
    rate = _link_rate(need, constants)
    per_pass = need.gathered_bytes / rate
    per_step = need.reduced_bytes_per_step / rate
    seconds = need.passes * (exposed * per_pass + max(0.0, (1.0 - exposed) * per_pass - compute))
    return seconds + exposed * per_step + max(0.0, (1.0 - exposed) * per_step - BACKWARD_SHARE * compute)


def step_seconds(need: Demand, constants: Constants, *, attention_speed: float = 1.0) -> tuple[float, ...]:
    """Seconds of one step by part, in the order of `PARTS`."""
    again = need.recomputed_share * constants.recompute
    repeated = 1.0 + again / 3.0
    share = _sustained_share(need, constants)
    rate = need.peak_flops * share
    fp8_rate = rate + (need.peak_fp8_flops - need.peak_flops) * share * constants.fp8_gain
    matmul = need.block_flops * repeated / fp8_rate + need.head_flops / rate
    attention = _attention_seconds(need, constants, rate, repeated, attention_speed)
    fused = constants.fused_traffic if need.fused else 1.0
    traffic = constants.activation_traffic * fused * repeated
    if need.peak_fp8_flops > need.peak_flops:
        traffic += constants.fp8_traffic
    activations = traffic * need.width_units / need.memory_bytes_per_second
    logits = constants.logits_traffic * fused * need.logits_units / need.memory_bytes_per_second
    compute = matmul + attention + activations + logits
    communication = _communication_seconds(need, constants, compute)
    launch = constants.launch * need.layers * repeated * (0.5 if need.fused else 1.0)
    optimizer = constants.optimizer * need.update_bytes_per_step / need.memory_bytes_per_second
    optimizer += need.muon_flops_per_step / (rate * MUON_EFFICIENCY)
    passes = need.passes
    return (
        matmul * passes,
        attention * passes,
        activations * passes,
        logits * passes,
        communication,
        optimizer,
        launch * passes,
    )

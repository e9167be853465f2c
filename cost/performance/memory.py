"""Peak memory of one device, by kind, from the shape and from what the program keeps; and the largest batch that fits.

State is bytes per parameter, divided by what is sharded (Rajbhandari et al. 2020, arXiv:1910.02054); activations are
counted tensor by tensor as Korthikanti et al. 2022 (arXiv:2205.05198) do, for flash attention. Invariant: the kinds
add up to the total. Constants checked against published peaks: tests/cost/performance/test_memory.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from cost.market.hardware import BYTES_PER_GIB, LOCAL_CPU, Accelerator
from cost.performance.layout import Layout
from cost.performance.software import Software, our_trainer
from cost.performance.workload import Workload

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "staging", "overhead")

FUSED_KEPT_SHARE = 0.66
"""Of the activations that unfused kernels keep for the backward pass; torch.compile recomputes cheap ones."""
SELECTIVE_KEPT_SHARE = 0.5
"""Of all activations, under torchtitan's selective checkpointing: it keeps every second product's output."""
LOGITS_BYTES = 10.0
"""Per token and vocabulary entry: bf16 logits, their fp32 copy, the fp32 gradient."""
FUSED_LOGITS_BYTES = 6.0
"""The gradient overwrites the copy when the loss is compiled."""
FUSED_LOSS_BYTES = 2.0
"""A loss written as one kernel keeps bf16 logits only and overwrites them."""
CHUNK_BYTES = 10.0 * 2**26
"""Of a loss that works in chunks: the logits of one, as LOGITS_BYTES counts them (trainer.model.loss.CHUNK_LOGITS)."""
PLAIN_ATTENTION_BYTES = 5.0
"""Per head and (query, key) pair of one layer: scores, probabilities, mask (Korthikanti et al. 2022, section 4)."""
FP32_BYTES = 4.0
CONTEXT_BYTES = 0.6 * BYTES_PER_GIB
"""CUDA context, cuBLAS workspaces."""
COMMUNICATION_BYTES = 0.5 * BYTES_PER_GIB
"""NCCL's buffers, where there is more than one device."""
CPU_PROCESS_BYTES = 0.4 * BYTES_PER_GIB
"""A Python process that has imported torch and Lightning."""
FRAGMENTATION = 0.04
"""Of what the caching allocator hands out."""
GATHERED_LAYERS = 2
"""FSDP holds the layer in use and the next one it has prefetched, whole, in the precision of arithmetic."""

SURE_SHARE = 0.92
"""A layout is recommended only where the predicted peak is below this share of the device: half of the published
peaks lie within 8 % of the prediction, and a wrong recommendation costs a start-up."""
IMPOSSIBLE_SHARE = 1.25
"""A layout is called impossible only where the predicted peak exceeds the device by more than any known error."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one device at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    staging: float
    """The buffer that checkpoints are copied to: host memory beside a GPU, so 0 there (see `host_staging_bytes`)."""
    overhead: float
    capacity_bytes: float
    host_staging_bytes: float = 0.0
    """The same buffer in (pinned) memory of the host, for each of its devices."""

    @property
    def by_kind(self) -> Mapping[str, float]:
        """The same numbers by name."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def total_bytes(self) -> float:
        """Sum of the kinds."""
        return sum(self.by_kind.values())

    @property
    def total_gib(self) -> float:
        """In GiB, as drivers report it."""
        return self.total_bytes / BYTES_PER_GIB

    @property
    def fits(self) -> bool:
        """Whether the layout fits with enough margin to rent for it."""
        return self.total_bytes <= SURE_SHARE * self.capacity_bytes

    @property
    def impossible(self) -> bool:
        """Whether it is too large even if the estimate is off; between `fits` and this, only a trial can tell."""
        return self.total_bytes > IMPOSSIBLE_SHARE * self.capacity_bytes


def peak(
    workload: Workload, accelerator: Accelerator, layout: Layout, *, software: Software | None = None
) -> MemoryEstimate:
    """Memory of the fullest device; `software` is our own trainer unless it says otherwise."""
    program = our_trainer() if software is None else software
    element_bytes = FP32_BYTES if layout.precision == "fp32" else 2.0
    weights = _weights(workload, layout, program, element_bytes)
    gradients = _gradients(workload, layout, program, element_bytes)
    optimizer = _optimizer(workload, layout, program)
    activations = _activations(workload, layout, program, element_bytes)
    logits = _logits(workload, layout, program, element_bytes)
    allocated = weights + gradients + optimizer + activations + logits
    process = CPU_PROCESS_BYTES if accelerator.name == LOCAL_CPU else CONTEXT_BYTES
    on_cpu = accelerator.name == LOCAL_CPU
    staged = _staged(workload, layout, program)
    overhead = process + FRAGMENTATION * allocated + (COMMUNICATION_BYTES if layout.world_size > 1 else 0.0)
    return MemoryEstimate(
        weights,
        gradients,
        optimizer,
        activations,
        logits,
        staged if on_cpu else 0.0,
        overhead,
        accelerator.memory_bytes,
        host_staging_bytes=0.0 if on_cpu else staged,
    )


def largest_micro_batch(
    workload: Workload,
    accelerator: Accelerator,
    layout: Layout,
    *,
    software: Software | None = None,
    at_most: int = 1024,
) -> int:
    """The most sequences per device and pass that surely fit, up to `at_most`; 0 where not even one does.

    Memory is affine in the micro-batch, so two estimates give the answer and a third confirms it.
    """

    def total(micro_batch: int) -> MemoryEstimate:
        return peak(workload, accelerator, dataclasses.replace(layout, micro_batch_size=micro_batch), software=software)

    item, two = total(1), total(2)
    if not item.fits:
        return 0
    per_sequence = two.total_bytes - item.total_bytes
    spare = SURE_SHARE * item.capacity_bytes - item.total_bytes
    most = max(1, min(at_most, 1 + int(spare / per_sequence)))
    return most if total(most).fits else most - 1


def _shards(layout: Layout, *stages: str) -> int:
    return layout.world_size if layout.sharding in stages else 1


def _weights(workload: Workload, layout: Layout, software: Software, element_bytes: float) -> float:
    """Stored weights, and the copy that products read: autocast keeps one of all, FSDP one of the layers in use."""
    stored = software.weight_bytes * workload.num_params / _shards(layout, "zero3")
    if layout.sharding == "zero3":
        return stored + element_bytes * _gathered_params(workload)
    return stored + (element_bytes * workload.num_params if software.weight_bytes > element_bytes else 0.0)


def _gathered_params(workload: Workload) -> float:
    """What FSDP holds whole: the layers in use, and the root's embedding and head all the time."""
    root = workload.vocab_size * workload.width
    layer = (workload.matrix_params - root) / workload.num_layers
    return GATHERED_LAYERS * layer + root * (1 if workload.tied_embeddings else 2)


def _gradients(workload: Workload, layout: Layout, software: Software, element_bytes: float) -> float:
    held = software.gradient_bytes * workload.num_params / _shards(layout, "zero2", "zero3")
    if layout.sharding == "replicated" and layout.world_size > 1 and software.reducer_copy:
        return 2 * held
    if layout.sharding == "zero3":
        return held + element_bytes * _gathered_params(workload)
    return held


def _optimizer(workload: Workload, layout: Layout, software: Software) -> float:
    """Muon keeps one moment of each matrix inside the blocks, where AdamW keeps two."""
    spared = 0.0
    if software.optimizer == "muon":
        spared = software.optimizer_bytes / 2 * (workload.matrix_params - workload.vocab_size * workload.width)
    total = software.optimizer_bytes * workload.num_params - spared
    return total / _shards(layout, "zero1", "zero2", "zero3")


def _staged(workload: Workload, layout: Layout, software: Software) -> float:
    """One rank's share of weights and moments, which trainer.checkpoints.staging copies to be stored while training
    goes on.

    Ranks that hold the same share the work, so the whole state is divided by all of them, sharded or not.
    """
    whole = dataclasses.replace(layout, sharding="replicated")
    state = software.weight_bytes * workload.num_params + _optimizer(workload, whole, software)
    return state / layout.world_size


def _activations(workload: Workload, layout: Layout, software: Software, element_bytes: float) -> float:
    """Activations that the forward pass keeps; with checkpointing, each layer's input and one recomputed layer."""
    tokens = layout.micro_batch_size * workload.sequence_length
    layer = _layer_bytes(workload, tokens, software, element_bytes)
    if layout.activation_checkpointing:
        return element_bytes * workload.width * tokens * workload.num_layers + layer
    share = FUSED_KEPT_SHARE if software.fused and not software.keeps_all else 1.0
    if software.selective_checkpointing:
        share = min(share, SELECTIVE_KEPT_SHARE)
    return share * layer * workload.num_layers


def _layer_bytes(workload: Workload, tokens: int, software: Software, element_bytes: float) -> float:
    """Inputs of the two norms and what they give; queries, keys and values, and again once rotated; attention's
    output; the MLP's inner tensors: three with a gate (gate, value, product), else two.
    """
    heads = workload.num_heads * workload.head_size
    kv_heads = workload.num_kv_heads * workload.head_size
    attention = 2 * heads + 2 * kv_heads + (heads + kv_heads if software.rotary else 0)
    inner = (3 if workload.mlp == "swiglu" else 2) * workload.hidden_size * workload.num_active_experts
    kept = element_bytes * tokens * (4 * workload.width + attention + inner)
    if software.wide_norms:
        normed = 2 * workload.width + (heads + kv_heads if workload.qk_norm else 0)
        kept += (FP32_BYTES - element_bytes) * tokens * normed
    if software.attention == "plain":
        kept += PLAIN_ATTENTION_BYTES * tokens * workload.sequence_length * workload.num_heads
    return kept


def _logits(workload: Workload, layout: Layout, software: Software, element_bytes: float) -> float:
    if software.chunked_loss:
        # The gradients of what the head reads and of its weight (fp32), and one chunk.
        tokens = layout.micro_batch_size * workload.sequence_length
        whole = LOGITS_BYTES * tokens * workload.vocab_size
        gradients = element_bytes * tokens * workload.width + FP32_BYTES * workload.vocab_size * workload.width
        return min(CHUNK_BYTES, whole) + gradients
    per_entry = FUSED_LOGITS_BYTES if software.fused else LOGITS_BYTES
    if software.fused_loss:
        per_entry = FUSED_LOSS_BYTES
    return per_entry * layout.micro_batch_size * workload.sequence_length * workload.vocab_size

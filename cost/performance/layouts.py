"""The fastest layout that fits, for one model on one kind of cluster.

On one cluster a faster layout is always a cheaper one, so the planner prices only this one per number of nodes.
Invariant: a layout is never returned whose predicted peak memory is above what the device has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost.market.hardware import Accelerator, Precision, accelerator
from cost.performance import memory, throughput
from cost.performance.layout import Layout, Sharding
from cost.performance.memory import MemoryEstimate
from cost.performance.software import Software, our_trainer
from cost.performance.throughput import Calibration, ThroughputEstimate
from cost.performance.workload import Workload

SHARDINGS: tuple[Sharding, ...] = ("replicated", "zero2", "zero3")
"""What the trainer runs on more than one device: DDP, and FSDP with and without sharded weights."""

ENOUGH_TOKENS_PER_PASS = 16_384
"""With so many tokens per pass, a wider pass gains less than recomputing the forward pass costs (a third)."""
WITHOUT_CUDA = frozenset({"MI300X"})


@dataclass(frozen=True, slots=True)
class Cluster:
    """A number of equal nodes. The accelerator has the memory that the offer reports."""

    accelerator: Accelerator
    gpus_per_node: int
    num_nodes: int
    network_bytes_per_second: float

    @property
    def world_size(self) -> int:
        """Devices over all nodes."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout with what it needs and how fast it is. `useful_share` is below 1 where the last pass is not full."""

    layout: Layout
    memory: MemoryEstimate
    throughput: ThroughputEstimate
    useful_share: float

    @property
    def tokens_per_second(self) -> float:
        """Over all devices, counting only tokens of the global batch."""
        return self.throughput.tokens_per_second * self.useful_share


@dataclass(frozen=True, slots=True)
class NoLayout:
    """Why nothing runs on this cluster."""

    reason: str


def fastest_layout(
    work: Workload, cluster: Cluster, calibration: Calibration, software: Software | None = None
) -> Placement | NoLayout:
    """Search sharding, activation checkpointing and micro-batch; precision is the workload's."""
    device = cluster.accelerator
    if device.name in WITHOUT_CUDA:
        return NoLayout(f"{device.name} needs a ROCm build of torch, and slm installs the CUDA build")
    if work.precision != "fp32" and device.peak_flops(work.precision) is None:
        return NoLayout(f"{device.name} has no {work.precision} units")
    if cluster.world_size > work.global_batch_size:
        return NoLayout(
            f"the cluster has {cluster.world_size} devices, but a step has only {work.global_batch_size} sequences"
        )
    program = our_trainer() if software is None else software
    most = max(1, work.global_batch_size // cluster.world_size)
    best: Placement | None = None
    smallest: float | None = None
    for sharding in SHARDINGS if cluster.world_size > 1 else SHARDINGS[:1]:
        for recompute in (False, True):
            item = _layout(work, cluster, sharding, recompute, 1)
            widest = memory.largest_micro_batch(work, device, item, software=program, at_most=most)
            if widest == 0:
                needed = memory.peak(work, device, item, software=program).total_gib
                smallest = needed if smallest is None else min(smallest, needed)
                continue
            micro = 1 << (widest.bit_length() - 1)
            found = placed(work, cluster, _layout(work, cluster, sharding, recompute, micro), calibration, program)
            if best is None or found.tokens_per_second > best.tokens_per_second:
                best = found
            if widest == most or micro * work.sequence_length >= ENOUGH_TOKENS_PER_PASS:
                break
    if best is None:
        return NoLayout(
            f"needs at least {smallest:.1f} GiB per device; {device.name} has {device.memory_gib:.0f} GiB, of which "
            f"{memory.SURE_SHARE * device.memory_gib:.1f} GiB are usable"
        )
    return best


def fastest_precision(
    work: Workload,
    cluster: Cluster,
    calibration: Calibration,
    software: Software | None = None,
    *,
    precisions: Sequence[Precision],
) -> Placement | NoLayout:
    """The fastest layout in any of these precisions that the device supports."""
    found = [
        fastest_layout(replace(work, precision=precision), cluster, calibration, software)
        for precision in precisions or (work.precision,)
    ]
    return _fastest(found)


def _fastest(found: Sequence[Placement | NoLayout]) -> Placement | NoLayout:
    """The fastest placement, or the last reason why there is none."""
    placements = [entry for entry in found if isinstance(entry, Placement)]
    return max(placements, key=lambda placement: placement.tokens_per_second) if placements else found[-1]


def _layout(work: Workload, cluster: Cluster, sharding: Sharding, recompute: bool, micro: int) -> Layout:
    return Layout(
        num_nodes=cluster.num_nodes,
        gpus_per_node=cluster.gpus_per_node,
        sharding=sharding,
        micro_batch_size=micro,
        grad_accumulation=-(-work.global_batch_size // (cluster.world_size * micro)),
        activation_checkpointing=recompute,
        precision=work.precision,
    )


def placed(
    work: Workload,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    software: Software | None = None,
) -> Placement:
    """Memory and speed of a given layout on a cluster, whether it fits (`memory.fits`) or not."""
    return Placement(
        layout=layout,
        memory=memory.peak(work, cluster.accelerator, layout, software=software),
        throughput=throughput.estimate(
            work,
            cluster.accelerator,
            layout,
            calibration,
            software=software,
            node_network_bytes_per_second=cluster.network_bytes_per_second,
        ),
        useful_share=work.global_batch_size / layout.global_batch_size,
    )


def emulated_layout(
    work: Workload,
    cluster: Cluster,
    micro_batch_size: int,
    calibration: Calibration,
    software: Software | None = None,
    *,
    precisions: Sequence[Precision] = (),
) -> Placement:
    """One worker per node on this machine's processor, at the recipe's own micro-batch; the fastest precision."""
    program = our_trainer() if software is None else software
    works = [replace(work, precision=precision) for precision in precisions or (work.precision,)]
    found = [placed(work, cluster, own_layout(work, cluster, micro_batch_size), calibration, program) for work in works]
    return max(found, key=lambda entry: entry.tokens_per_second)


def own_layout(work: Workload, cluster: Cluster, micro_batch_size: int) -> Layout:
    """What our trainer runs when a recipe sets the micro-batch: every device holds the whole model."""
    micro = max(1, min(micro_batch_size, work.global_batch_size // cluster.world_size))
    return _layout(work, cluster, "replicated", False, micro)


def machine(
    name: str,
    *,
    gpus_per_node: int = 1,
    num_nodes: int = 1,
    memory_gib: float | None = None,
    network_bytes_per_second: float = throughput.NODE_NETWORK_BYTES_PER_SECOND,
) -> Cluster:
    """A cluster of one accelerator by its name in the hardware table, for an estimate without an offer."""
    device = accelerator(name)
    if memory_gib is not None:
        device = replace(device, memory_gib=memory_gib)
    return Cluster(device, gpus_per_node, num_nodes, network_bytes_per_second)

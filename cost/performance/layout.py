"""How one training run is spread over devices: nodes, sharding, micro-batch, accumulation, precision.

Invariant: `world_size * micro_batch_size * grad_accumulation` sequences make one optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cost.market.hardware import Precision

Sharding = Literal["replicated", "zero1", "zero2", "zero3"]
"""Divided between devices: nothing (DDP), the optimizer's state, gradients too, parameters too (FSDP).

Source: Rajbhandari et al. 2020 (arXiv:1910.02054). FSDP's SHARD_GRAD_OP is zero2 and FULL_SHARD is zero3.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """`micro_batch_size` is in sequences per device and pass; `grad_accumulation` passes make one step."""

    num_nodes: int
    gpus_per_node: int
    sharding: Sharding
    micro_batch_size: int
    grad_accumulation: int
    activation_checkpointing: bool
    precision: Precision

    @property
    def world_size(self) -> int:
        """Devices over all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all devices."""
        return self.world_size * self.micro_batch_size * self.grad_accumulation

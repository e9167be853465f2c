"""What a training framework does with the same arithmetic: kernels, state in memory, what it saves and recomputes.

Invariant: nothing here is fitted; every field is a fact about the program, read from its documentation or source.
What remains between two programs with the same facts is one fitted number each, in cost/data/calibration.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionKernel = Literal["flash2", "flash3", "plain"]
Optimizer = Literal["adamw", "muon"]

SELECTIVE_RECOMPUTE_SHARE = 0.3
"""Of a forward pass, where every second matrix product is kept (torchtitan's selective checkpointing)."""


@dataclass(frozen=True, slots=True)
class Software:
    """One trainer. Bytes are per parameter, before sharding.

    `framework` names the fitted effects; one without an entry gets the pooled constants. `fused` says that norms,
    activations and losses are compiled or written by hand into few kernels. `attention_share` is the share of the
    causal pairs that is computed (a sliding window computes less than all). `reducer_copy` says that a second copy
    of the gradients is kept for the all-reduce (PyTorch's DDP by default), `rotary` that queries and keys are rotated,
    `wide_norms` that norms read fp32 under autocast, and so keep it. `keeps_all`: layers are compiled one by one, and
    nothing is recomputed; `chunked_loss`, that logits of a few tokens at a time are all there ever is of them.
    """

    framework: str
    fused: bool = False
    attention: AttentionKernel = "flash2"
    attention_share: float = 1.0
    optimizer: Optimizer = "adamw"
    weight_bytes: float = 4.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 8.0
    reduce_bytes: float = 4.0
    selective_checkpointing: bool = False
    fused_loss: bool = False
    chunked_loss: bool = False
    keeps_all: bool = False
    reducer_copy: bool = True
    rotary: bool = True
    wide_norms: bool = False

    def recomputed_share(self, activation_checkpointing: bool) -> float:
        """Share of the forward pass that the backward pass computes again."""
        if activation_checkpointing:
            return 1.0
        return SELECTIVE_RECOMPUTE_SHARE if self.selective_checkpointing else 0.0


OUR_FRAMEWORK = "slm"


def our_trainer(*, optimizer: Optimizer = "muon", compiled: bool = False) -> Software:
    """trainer/ as it is: autocast over fp32 weights, gradients and moments; torch's flash attention; DDP or FSDP."""
    return Software(
        framework=OUR_FRAMEWORK,
        fused=compiled,
        optimizer=optimizer,
        wide_norms=not compiled,
        chunked_loss=True,
        keeps_all=compiled,
    )

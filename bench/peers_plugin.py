"""Our model for `peers.py --impl plugin --plugin bench/peers_plugin.py`: the `llama` preset at the peers' shape.

Loss and model are the trainer's own, and so is what its loop does for a CPU before the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.config import ModelConfig
from trainer.memory import keep_freed_memory
from trainer.model.presets import expand
from trainer.model.transformer import build_model

StepLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def build(shape: Mapping[str, int], dtype: str) -> tuple[nn.Module, StepLoss, int, bool]:
    """Model, mean loss of a batch, weights in matrix products, and whether the loop is to use autocast."""
    width = shape["d"]
    sizes = {
        "vocab_size": shape["V"],
        "sequence_length": shape["T"],
        "num_layers": shape["L"],
        "width": width,
        "num_heads": shape["h"],
        "num_kv_heads": shape["h"],
        "hidden_size": (8 * width // 3 + 63) // 64 * 64,
    }
    config = ModelConfig(**expand({"preset": "llama", **sizes}))
    keep_freed_memory()

    def step_loss(module: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = module(tokens_BT, targets_BT)
        return loss / targets_BT.numel()

    return build_model(config, seed=0), step_loss, config.workload().matrix_params, dtype == "bf16"

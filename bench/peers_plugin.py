"""Our model for `peers.py --impl plugin --plugin bench/peers_plugin.py`: the `llama` preset at the peers' shape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.config import ModelConfig
from trainer.model import build_model


def build(
    shape: Mapping[str, int], dtype: str
) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor], int, bool]:
    """Model, mean loss of a batch, weights in matrix products, and whether the loop is to use autocast."""
    width = shape["d"]
    config = ModelConfig(
        vocab_size=shape["V"],
        sequence_length=shape["T"],
        num_layers=shape["L"],
        width=width,
        num_heads=shape["h"],
        num_kv_heads=shape["h"],
        hidden_size=(8 * width // 3 + 63) // 64 * 64,
        qk_norm=False,
    )
    model = build_model(config, seed=0)

    def step_loss(module: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = module(tokens_BT, targets_BT)
        return loss / targets_BT.numel()

    return model, step_loss, config.workload().matrix_params if hasattr(config, "workload") else 0, dtype == "bf16"

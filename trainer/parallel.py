"""The model as it is trained, and how it is spread over workers: copies (DDP) or shards (FSDP2), both through Fabric.

In both the gradients of a step are averaged over workers while the backward pass still runs, and not at all in the
passes before the last of an accumulated step (`fabric.no_backward_sync`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trainer.config import TrainConfig
from trainer.memory import keep_freed_memory
from trainer.model import attention
from trainer.model.fp8 import require_fp8, use_fp8
from trainer.model.loss import chunk_gradients, linear_cross_entropy
from trainer.model.transformer import Transformer, build_model, load_initial

log = logging.getLogger(__name__)

COMPILED_FORMS = 64
"""Of one function, before torch gives up and runs it as it is."""


def fabric_precision(config: TrainConfig) -> Literal["bf16-mixed", "32-true"]:
    """The precision to build Fabric with: weights and optimizer state are fp32 in both."""
    return "bf16-mixed" if config.precision == "bf16" else "32-true"


def set_up_model(config: TrainConfig, fabric: Any) -> tuple[Transformer, nn.Module]:
    """The model itself, and what to call in its place: wrapped by Fabric's strategy, and compiled where asked for."""
    if fabric.device.type == "cpu":
        keep_freed_memory()
    weights = build_model(config.model, config.seed)
    if config.initial_weights is not None:
        load_initial(weights, Path(config.initial_weights))
    weights.activation_checkpointing, weights.max_documents = (
        config.execution.activation_checkpointing,
        config.batch.max_documents,
    )
    if config.execution.fp8:
        require_fp8(fabric.device)
        use_fp8(weights.blocks)
    if fabric.global_rank == 0:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        log.info("attention: %s", attention.describe(fabric.device, dtype))
    if config.execution.compile:
        compile_parts(weights)
    return weights, fabric.setup_module(weights)


def compile_parts(weights: Transformer) -> None:
    """Compile one layer for all, and one chunk of the loss: seconds, where the whole model takes minutes."""
    # Layers that differ (windows, value embeddings), training and evaluation, and a last, smaller batch.
    torch._dynamo.config.recompile_limit = COMPILED_FORMS
    for block in weights.blocks:
        block.compile()
    weights.cross_entropy = partial(linear_cross_entropy, chunk=torch.compile(chunk_gradients, dynamic=False))


def strategy_class(config: TrainConfig) -> type[Any]:
    """What to build a strategy from, with `strategy_options`; a subclass may say where ranks and devices come from."""
    strategy: type[Any] = DDPStrategy if config.execution.sharding == "replicated" else ModelParallelStrategy
    return strategy


def strategy_options(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Keyword arguments of `strategy_class`."""
    if config.execution.sharding == "replicated":
        # Gradients live in the buckets that are sent: no second copy of them.
        return {"gradient_as_bucket_view": True}
    return {"parallelize_fn": _sharded_by(config), "data_parallel_size": world_size, "tensor_parallel_size": 1}


def _sharded_by(config: TrainConfig) -> Callable[[nn.Module, Any], nn.Module]:
    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        """One group per layer, gathered shortly before it is used; the rest of the model is another."""
        devices = mesh["data_parallel"]
        halves = config.precision == "bf16" and devices.device_type == "cuda"
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if halves else None
        options = {"mesh": devices} | ({"mp_policy": policy} if policy is not None else {})
        for block in model.get_submodule("blocks").children():
            fully_shard(block, **options)
        fully_shard(model, **options)
        return model

    return shard

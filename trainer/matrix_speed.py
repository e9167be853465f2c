"""Times this processor's matrix products in fp32 and in bf16, in a fifth of a second.

One thread, and its own processor time, so that other programs on the machine change the result little.
"""

from __future__ import annotations

import time

import torch

from trainer.config import ModelConfig
from trainer.processor import ProcessorSpeed, has_bf16_units, processor_name

SECONDS_PER_TIMING = 0.05
SQUARE_SIDE = 1024
MOST_ROWS = 2048
"""More rows than this change the speed of a product no more, but the time of one."""


def time_processor(model: ModelConfig, micro_batch_size: int) -> ProcessorSpeed:
    """The speeds of one core, for this model's largest product and for a large square one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = min(MOST_ROWS, micro_batch_size * model.sequence_length)
        own = (rows, model.width, model.hidden_size)
        square = (SQUARE_SIDE, SQUARE_SIDE, SQUARE_SIDE)
        fp32, bf16, square_fp32, square_bf16 = (
            _flops_per_second(size, dtype) for size in (own, square) for dtype in (torch.float32, torch.bfloat16)
        )
    finally:
        torch.set_num_threads(threads)
    return ProcessorSpeed(processor_name(), has_bf16_units(), fp32, bf16, square_fp32, square_bf16, is_measured=True)


def _flops_per_second(size: tuple[int, int, int], dtype: torch.dtype) -> float:
    rows, inputs, outputs = size
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    torch.nn.functional.linear(x, weight)  # the first call sets kernels up
    count, began_at = 0, time.process_time()
    while (seconds := time.process_time() - began_at) < SECONDS_PER_TIMING:
        torch.nn.functional.linear(x, weight)
        count += 1
    return 2.0 * rows * inputs * outputs * count / seconds

"""What /proc/cpuinfo says of a processor, and which precision follows from that and from a timing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.config import ModelConfig
from trainer.processor import ProcessorSpeed, has_bf16_units, processor_name

ZEN4 = "model name\t: AMD EPYC 9R14\nflags\t\t: fpu sse2 avx512f avx512_bf16\n"
LAPTOP = "model name\t: Intel(R) Core(TM) i7-8565U\nflags\t\t: fpu sse2 avx2\n"
ARM = "Features\t: fp asimd bf16\n"
TIMED = ProcessorSpeed("a CPU", True, 100e9, 200e9, 110e9, 210e9, is_measured=True)


@pytest.mark.parametrize(("text", "units"), [(ZEN4, True), (LAPTOP, False), (ARM, True), ("", None)])
def test_flags_say_whether_there_are_bf16_units(text: str, units: bool | None) -> None:
    assert has_bf16_units(text) is units


def test_a_processor_is_named_as_the_system_names_it() -> None:
    assert processor_name(LAPTOP) == "Intel(R) Core(TM) i7-8565U"
    assert processor_name("") != ""


def test_the_faster_precision_is_chosen_and_bf16_only_where_there_may_be_a_unit() -> None:
    assert TIMED.precision == "bf16"
    assert replace(TIMED, bf16_flops=99e9).precision == "fp32"
    assert replace(TIMED, has_bf16_units=False).precision == "fp32"
    assert replace(TIMED, has_bf16_units=None).precision == "bf16"
    emulated = ProcessorSpeed("a CPU", False, 150e9, 30e9, 150e9, 30e9, is_measured=True)
    assert emulated.reason == ("fp32: a CPU has no bf16 units; one core is timed at 150 GFLOP/s in fp32 and 30 in bf16")


def test_a_timing_measures_both_precisions() -> None:
    pytest.importorskip("torch")
    from trainer.matrix_speed import time_processor

    found = time_processor(ModelConfig(), micro_batch_size=2)
    assert found.is_measured
    assert min(found.fp32_flops, found.bf16_flops, found.square_fp32_flops, found.square_bf16_flops) > 1e8

"""What this machine's processor computes quickly: the choice between bf16 and fp32, and the numbers behind it.

A processor without bf16 units emulates that type, several times more slowly than fp32. Standard library only: planning
reads the result of a timing that another process made (`trainer.matrix_speed`).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cost.market.hardware import CPU_BF16_FLOPS_PER_CORE, CPU_EMULATED_BF16_FLOPS_PER_CORE, CPU_FP32_FLOPS_PER_CORE

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""Names in /proc/cpuinfo of units that multiply bf16 (x86, and Arm)."""
GIGA = 1e9


@dataclass(frozen=True)
class ProcessorSpeed:
    """FLOP/s of one core, in products of the sizes that a model has, and in large square ones."""

    processor: str
    has_bf16_units: bool | None
    """None where the system does not say."""
    fp32_flops: float
    bf16_flops: float
    square_fp32_flops: float
    """Of side 1024, to which the throughput model's shares refer."""
    square_bf16_flops: float
    is_measured: bool
    """Otherwise these are the numbers of a table."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """The faster one; bf16 only where there is or may be a unit for it."""
        return "bf16" if self.has_bf16_units is not False and self.bf16_flops > self.fp32_flops else "fp32"

    @property
    def reason(self) -> str:
        """Why it is this precision, in one line for the log."""
        units = {True: "has bf16 units", False: "has no bf16 units", None: "does not say whether it has bf16 units"}
        kind = "timed" if self.is_measured else "assumed"
        return (
            f"{self.precision}: {self.processor} {units[self.has_bf16_units]}; one core is {kind} at "
            f"{self.fp32_flops / GIGA:.0f} GFLOP/s in fp32 and {self.bf16_flops / GIGA:.0f} in bf16"
        )


def assumed_speed() -> ProcessorSpeed:
    """What is believed of this processor before it was timed."""
    text = _cpu_info()
    units = has_bf16_units(text)
    bf16 = CPU_EMULATED_BF16_FLOPS_PER_CORE if units is False else CPU_BF16_FLOPS_PER_CORE
    fp32 = CPU_FP32_FLOPS_PER_CORE
    return ProcessorSpeed(processor_name(text), units, fp32, bf16, fp32, bf16, is_measured=False)


def has_bf16_units(cpu_info: str | None = None) -> bool | None:
    """By the flags in the text of /proc/cpuinfo; None where there are none."""
    text = _cpu_info() if cpu_info is None else cpu_info
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return None if found is None else not BF16_FLAGS.isdisjoint(found[1].split())


def processor_name(cpu_info: str | None = None) -> str:
    """As /proc/cpuinfo has it, else the architecture."""
    text = _cpu_info() if cpu_info is None else cpu_info
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine() or "this processor"


def _cpu_info() -> str:
    try:
        return CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

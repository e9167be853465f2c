"""Accelerators that can be rented: peak arithmetic, memory, links, and every spelling that price lists use.

One table serves the planner's roofline and the trainer's measured utilization, so both divide by the same peak.
Invariant: peaks are dense tensor-core figures; a shader rate, a sparse figure or the rate of a pair never enters.
Figures with their sources and known contradictions: cost/data/accelerators.csv.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from cost.tables import table_rows

Precision = Literal["fp8", "bf16", "fp16", "fp32"]

GIGA = 10**9
TERA = 10**12
BYTES_PER_GIB = 2**30
PCIE_BYTES_PER_SECOND: Mapping[str, float] = MappingProxyType(
    {"Gen3 x16": 15.75 * GIGA, "Gen4 x16": 31.5 * GIGA, "Gen5 x16": 63.0 * GIGA, "Gen6 x16": 121.0 * GIGA}
)
"""One direction of a link of 16 lanes, after line coding. Source: PCI-SIG base specifications 3.0 to 6.0."""

LOCAL_CPU = "cpu"
CPU_FP32_FLOPS_PER_CORE = 100.5e9
"""Square fp32 product of side 1024 by torch 2.13 on one core of an AMD EPYC with AVX-512 (2026-11-23)."""
CPU_BF16_FLOPS_PER_CORE = 212.3e9
"""The same product in bf16 (AVX512_BF16); the best of 30 timings each."""
CPU_EMULATED_BF16_FLOPS_PER_CORE = 30e9
"""A bf16 product on one core without bf16 units: assumed, a fifth of what such a core reaches in fp32."""
CPU_MEMORY_BYTES_PER_SECOND_PER_CORE = 10e9
"""Assumed share of the memory bandwidth of one core; it bounds nothing that is measured on a CPU."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. Rates are per second, links in one direction, `None` where no source states a figure."""

    name: str
    architecture: str
    compute_capability: str
    bf16_flops: float | None
    fp16_flops: float | None
    fp8_flops: float | None
    fp32_flops: float | None
    memory_gib: float
    memory_bytes_per_second: float
    intra_node: str
    nvlink_group: int
    """How many devices of a node share NVLink or an equal of it: 1 for none, 2 for a bridged pair."""
    nvlink_bytes_per_second: float | None
    pcie_bytes_per_second: float
    tdp_watts: float | None
    native_bf16: bool
    flash_attention_2: bool
    flash_attention_3: bool
    flash_attention_4: bool
    sources: str
    conflicts: str

    @property
    def memory_bytes(self) -> float:
        """Device memory as the driver reports it, before anything is allocated."""
        return self.memory_gib * BYTES_PER_GIB

    def peak_flops(self, precision: Precision) -> float | None:
        """Dense FLOP/s in this precision; None where the device has no such unit or no source states it."""
        peaks: dict[Precision, float | None] = {
            "fp8": self.fp8_flops,
            "bf16": self.bf16_flops if self.native_bf16 else None,
            "fp16": self.fp16_flops,
            "fp32": self.fp32_flops,
        }
        return peaks[precision]

    def link_bytes_per_second(self, num_devices: int) -> float:
        """One direction between devices of one node: NVLink where it joins that many, else PCIe."""
        if self.nvlink_bytes_per_second is not None and num_devices <= self.nvlink_group:
            return self.nvlink_bytes_per_second
        return self.pcie_bytes_per_second


def _optional(text: str, unit: float = 1.0) -> float | None:
    return float(text) * unit if text else None


def _accelerator(row: Mapping[str, str]) -> Accelerator:
    bidirectional = _optional(row["nvlink_gb_per_second_bidirectional"], GIGA)
    return Accelerator(
        name=row["accelerator"],
        architecture=row["vendor_arch"],
        compute_capability=row["compute_capability"],
        bf16_flops=_optional(row["bf16_dense_tflops"], TERA),
        fp16_flops=_optional(row["fp16_dense_tflops"], TERA),
        fp8_flops=_optional(row["fp8_dense_tflops"], TERA),
        fp32_flops=_optional(row["fp32_tflops"], TERA),
        memory_gib=float(row["memory_gib"]),
        memory_bytes_per_second=float(row["memory_gb_per_second"]) * GIGA,
        intra_node=row["intra_node"],
        nvlink_group=int(row["nvlink_group"]),
        nvlink_bytes_per_second=None if bidirectional is None else bidirectional / 2,
        pcie_bytes_per_second=PCIE_BYTES_PER_SECOND[row["pcie"]],
        tdp_watts=_optional(row["tdp_watts"]),
        native_bf16=row["native_bf16"] == "yes",
        flash_attention_2=row["flash_attention_2"].startswith("yes"),
        flash_attention_3=row["flash_attention_3"].startswith("yes"),
        flash_attention_4=row["flash_attention_4"].startswith("yes"),
        sources=f"{row['sources_flops']}; {row['sources_other']}",
        conflicts=row["conflicts"],
    )


@cache
def accelerators() -> Mapping[str, Accelerator]:
    """The whole table by name, in the file's order."""
    rows = [_accelerator(row) for row in table_rows("accelerators.csv")]
    return MappingProxyType({row.name: row for row in rows})


def accelerator(name: str) -> Accelerator:
    """Look up one canonical name; KeyError where there is none (see `canonical_name` for other spellings)."""
    return accelerators()[name]


def local_cpu(
    num_cores: float,
    memory_gib: float = 4.0,
    *,
    bf16_flops_per_core: float = CPU_BF16_FLOPS_PER_CORE,
    fp32_flops_per_core: float = CPU_FP32_FLOPS_PER_CORE,
) -> Accelerator:
    """This machine's processor as a device, for the embedded local cloud and for utilization on a laptop."""
    return Accelerator(
        name=LOCAL_CPU,
        architecture="CPU",
        compute_capability="",
        bf16_flops=num_cores * bf16_flops_per_core,
        fp16_flops=None,
        fp8_flops=None,
        fp32_flops=num_cores * fp32_flops_per_core,
        memory_gib=memory_gib,
        memory_bytes_per_second=num_cores * CPU_MEMORY_BYTES_PER_SECOND_PER_CORE,
        intra_node="shared memory",
        nvlink_group=1,
        nvlink_bytes_per_second=None,
        pcie_bytes_per_second=num_cores * CPU_MEMORY_BYTES_PER_SECOND_PER_CORE,
        tdp_watts=None,
        native_bf16=True,
        flash_attention_2=False,
        flash_attention_3=False,
        flash_attention_4=False,
        sources="measured by torch 2.13 on one core of an AMD EPYC with AVX-512 (2026-11-23)",
        conflicts="",
    )


_PREFIXES = ("NVIDIA", "GEFORCE", "TESLA", "AMD", "INSTINCT", "HGX", "QUADRO")
_FIXED_SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "RTXA6000": "A6000",
        "RTX6000ADA": "RTX6000-Ada",
        "RTX6000ADAGENERATION": "RTX6000-Ada",
        "6000ADA": "RTX6000-Ada",
        "RTXPRO6000BLACKWELL": "RTXPRO6000",
        "RTXPRO6000S": "RTXPRO6000",
        "RTXPRO6000WS": "RTXPRO6000",
        "RTXPRO6000SERVER": "RTXPRO6000",
        "RTXPRO6000PCIE": "RTXPRO6000",
        "RTXPRO6000WK": "RTXPRO6000",
        "RTXPRO600096GB": "RTXPRO6000",
        "MI300": "MI300X",
        "H200SXM": "H200",
        "H200141G": "H200",
        "B200SXM": "B200",
        "B200SXM6": "B200",
        "B300SXM": "B300",
        "B300SXM6": "B300",
        "GH200SXM": "GH200",
        "V100SXM2": "V100",
        "V10032GB": "V100",
        "RTXL40S": "L40S",
    }
)
MEMORY_OF_LARGE_A100_GIB = 60.0
"""An A100 reporting more than this is the 80 GB one."""


def _squeezed(spelling: str) -> str:
    words = re.split(r"[\s_/()-]+", spelling.upper())
    return "".join(word for word in words if word not in _PREFIXES)


def canonical_name(spelling: str, *, memory_gib: float | None = None, hint: str = "") -> str | None:
    """Our name of an accelerator as a price list spells it; None where the table has no such row.

    `hint` is any other text of the same row (instance type, GPU name): it tells SXM from PCIe where the spelling
    does not. An A100 of 80 GB or an H100 whose form no text states is taken for the slower PCIe card.
    """
    if spelling in accelerators():
        return spelling
    squeezed = _squeezed(spelling)
    for name in accelerators():
        if _squeezed(name) == squeezed:
            return name
    if squeezed in _FIXED_SPELLINGS:
        return _FIXED_SPELLINGS[squeezed]
    text = f"{squeezed} {hint.upper()}"
    if re.match(r"A100(?!0)", squeezed):
        return _form_of_a100(text, memory_gib)
    if re.match(r"H100(?!0)", squeezed):
        return _form_of_h100(text)
    return None


_SXM_WORDS = re.compile(r"SXM|HBM3|\bP4DE?\.|\bP5\.|\bA2-|\bA3-|\bND\d|_ND\d|BM\.GPU|\b\d[AH]100\.")
"""SXM by name, or an instance type that has only SXM: AWS p4d, p4de, p5; GCP a2, a3; Azure ND; OCI; Verda."""
_NVL_WORDS = re.compile(r"NVL(?!INK)|NC\d+ADIS?_H100|NC\d+ADS_H100")
"""NVL by name, or Azure's NC series with H100."""


def _form_of_a100(text: str, memory_gib: float | None) -> str:
    large = "80G" in text if memory_gib is None else memory_gib > MEMORY_OF_LARGE_A100_GIB
    if not large:
        return "A100-40GB"
    return "A100-80GB-SXM" if _SXM_WORDS.search(text) else "A100-80GB-PCIe"


def _form_of_h100(text: str) -> str:
    if _NVL_WORDS.search(text):
        return "H100-NVL"
    return "H100-SXM" if _SXM_WORDS.search(text) else "H100-PCIe"

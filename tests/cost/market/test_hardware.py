"""The accelerator table against data sheets, and the spellings that price lists use."""

from __future__ import annotations

import pytest

from cost.market.hardware import accelerator, accelerators, canonical_name, local_cpu

TERA = 1e12


def test_peaks_are_dense_tensor_rates() -> None:
    """Each of these was seen wrong in a widely used table: a shader rate, a sparse figure, a pair, another card."""
    assert accelerator("RTX3090").bf16_flops == 71 * TERA
    assert accelerator("RTX4090").bf16_flops == pytest.approx(165.2 * TERA)
    assert accelerator("A6000").bf16_flops == pytest.approx(154.8 * TERA)
    assert accelerator("A40").bf16_flops == pytest.approx(149.7 * TERA)
    assert accelerator("H200").bf16_flops == 989 * TERA
    assert accelerator("H100-NVL").bf16_flops == 835 * TERA
    assert accelerator("A10G").bf16_flops == 70 * TERA


@pytest.mark.parametrize("name", ["V100", "T4"])
def test_volta_and_turing_have_no_bf16_and_no_flash_attention(name: str) -> None:
    assert accelerator(name).peak_flops("bf16") is None
    assert accelerator(name).peak_flops("fp16") is not None
    assert not accelerator(name).flash_attention_2


def test_every_row_has_a_source_and_a_plausible_balance() -> None:
    assert len(accelerators()) >= 20
    for row in accelerators().values():
        assert row.sources.strip("; ")
        peak = row.fp16_flops or 0.0
        # FLOPs per byte of memory traffic: 40 to 520 on every card of this table; a factor of 1000 would show.
        assert 40 < peak / row.memory_bytes_per_second < 520, row.name


def test_links_are_nvlink_only_where_it_joins_that_many() -> None:
    assert accelerator("H100-SXM").link_bytes_per_second(8) == 450e9
    assert accelerator("A6000").link_bytes_per_second(2) == 56.25e9
    assert accelerator("A6000").link_bytes_per_second(4) == 31.5e9
    assert accelerator("RTX4090").link_bytes_per_second(2) == 31.5e9


@pytest.mark.parametrize(
    ("spelling", "memory_gib", "hint", "name"),
    [
        ("A100", 40.0, "p4d.24xlarge", "A100-40GB"),
        ("A100-80GB", 80.0, "p4de.24xlarge", "A100-80GB-SXM"),
        ("A100-80GB", 80.0, "Standard_NC24ads_A100_v4", "A100-80GB-PCIe"),
        ("A100-80GB-640GB", 80.0, "8A100.176V", "A100-80GB-SXM"),
        ("A100-SXM", 40.0, "", "A100-40GB"),
        ("A100-80G-PCIe-NVLink", 80.0, "n3-A100x8-NVLink", "A100-80GB-PCIe"),
        ("H100", 80.0, "gpu_1x_h100_pcie", "H100-PCIe"),
        ("H100", 80.0, "gpu_8x_h100_sxm5", "H100-SXM"),
        ("H100", 94.0, "Standard_NC40ads_H100_v5", "H100-NVL"),
        ("H100-80G-PCIe-NVLink", 80.0, "n3-H100x8-NVLink", "H100-PCIe"),
        ("H100", 79.6, "NVIDIA-H100-80GB-HBM3", "H100-SXM"),
        ("H100", 80.0, "", "H100-PCIe"),
        ("Tesla-V100", 16.0, "", "V100"),
        ("RTX-PRO-6000", 96.0, "", "RTXPRO6000"),
        ("RTX-6000-Ada", 48.0, "", "RTX6000-Ada"),
        ("RTXA6000", 48.0, "", "A6000"),
        ("RTX-4090", 24.0, "", "RTX4090"),
        ("HGX B300", 288.0, "", "B300"),
        ("NVIDIA GeForce RTX 5090", 32.0, "", "RTX5090"),
        ("RTX6000", 24.0, "gpu_1x_rtx6000", None),
        ("A1000", 8.0, "", None),
        ("TPU-v5", None, "", None),
    ],
)
def test_spellings_of_price_lists(spelling: str, memory_gib: float | None, hint: str, name: str | None) -> None:
    assert canonical_name(spelling, memory_gib=memory_gib, hint=hint) == name


def test_the_local_processor_scales_with_its_cores() -> None:
    item, two = local_cpu(1), local_cpu(2)
    assert item.peak_flops("fp32") == pytest.approx(100.5e9)
    assert two.peak_flops("bf16") == 2 * (item.peak_flops("bf16") or 0.0)

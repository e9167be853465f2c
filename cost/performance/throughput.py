"""Tokens per second of one layout on one kind of device, with an interval that says how sure that is.

The roofline of cost/performance/roofline.py gives a step; a framework and a device each shift it by one fitted factor.
A framework or device without rows gets the pooled constants and a wider interval. Invariant: the seconds by part add
up to the step. Constants with their sources: cost/data/calibration.json, written by bench/fit_throughput.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Self

from cost.market.hardware import GIGA, LOCAL_CPU, Accelerator
from cost.performance.layout import Layout
from cost.performance.roofline import PARTS, Constants, demand, peak_flops, step_seconds
from cost.performance.software import Software, our_trainer
from cost.performance.workload import Workload

Basis = Literal["measured", "framework", "pooled"]
"""Measured: this framework on this accelerator; framework: it on others; pooled: only other frameworks."""

NODE_NETWORK_BYTES_PER_SECOND = 12.5 * GIGA
"""Between nodes where nothing better is known: 100 Gbit/s per node, what a rented node without InfiniBand has."""

# Our trainer on one core of an AMD EPYC with AVX-512, torch 2.13 (2026-11-23), timed on 1.0 and 7.3 million
# weights, bf16 and fp32, micro-batches of 4 and 16, T 128 and 512: these numbers give each of the seven within 20 %.
CPU_EFFICIENCY = 0.54
"""Share of the measured peak that all products together reach."""
CPU_ATTENTION_EFFICIENCY = 0.16
CPU_SECONDS_PER_LAYER_AND_PASS = 4e-3
CPU_MUON_EFFICIENCY = 0.85
"""Muon's square products, in bf16 whatever the precision of the rest."""
CPU_SECONDS_PER_LAYER_UPDATE = 2.5e-3
CPU_LINK_BYTES_PER_SECOND = 1 * GIGA
"""Gloo between processes of one machine; assumed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The 5 % and 95 % quantiles of log(predicted / actual) over cross-validated rows of one basis."""

    low: float
    high: float
    num_rows: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants, and log factors on the speed per framework and device, on attention's rate per framework."""

    constants: Constants
    framework_speed: Mapping[str, float]
    framework_attention: Mapping[str, float]
    accelerator_speed: Mapping[str, float]
    pairs: frozenset[tuple[str, str]]
    """Which framework was seen on which device."""
    intervals: Mapping[Basis, Interval]
    measured: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """Log of measured over modelled speed, per framework and device, of our own runs."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `bench/fit_throughput.py` wrote."""
        document: dict[str, Any] = json.loads(text)
        return cls(
            constants=Constants(**{name: entry["value"] for name, entry in document["constants"].items()}),
            framework_speed={name: entry["speed"] for name, entry in document["frameworks"].items()},
            framework_attention={name: entry["attention"] for name, entry in document["frameworks"].items()},
            accelerator_speed=dict(document["accelerators"]),
            pairs=frozenset((framework, device) for framework, device in document["pairs"]),
            intervals={basis: Interval(**entry) for basis, entry in document["intervals"].items()},
        )

    def basis(self, framework: str, accelerator: str) -> Basis:
        """How much is known about this program on this device."""
        pair = (framework, accelerator)
        if pair in self.measured or pair in self.pairs:
            return "measured"
        return "framework" if framework in self.framework_speed else "pooled"

    def log_speed(self, framework: str, accelerator: str) -> float:
        """What multiplies the roofline's speed, as a logarithm."""
        fitted = self.framework_speed.get(framework, 0.0) + self.accelerator_speed.get(accelerator, 0.0)
        return fitted + self.measured.get((framework, accelerator), 0.0)

    def with_measurement(self, framework: str, accelerator: str, *, measured: float, modelled: float) -> Self:
        """A copy corrected by a measured run, of which `modelled` is this calibration's estimate."""
        ratio = self.measured.get((framework, accelerator), 0.0) + math.log(measured / modelled)
        return dataclasses.replace(self, measured={**self.measured, (framework, accelerator): ratio})


@cache
def default_calibration() -> Calibration:
    """The project's own constants."""
    return Calibration.from_json((files("cost") / "data" / "calibration.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class ThroughputEstimate:
    """Over all devices. Of ten comparable runs, nine lay inside their `interval`."""

    tokens_per_second: float
    mfu: float
    seconds_per_step: float
    seconds_by_part: Mapping[str, float]
    interval: tuple[float, float]
    basis: Basis

    @property
    def bound_by(self) -> str:
        """The part that takes most of a step."""
        return max(self.seconds_by_part, key=lambda part: self.seconds_by_part[part])


def estimate(
    workload: Workload,
    accelerator: Accelerator,
    layout: Layout,
    calibration: Calibration,
    *,
    software: Software | None = None,
    node_network_bytes_per_second: float = NODE_NETWORK_BYTES_PER_SECOND,
) -> ThroughputEstimate:
    """Tokens per second over all devices; `software` is our own trainer unless it says otherwise."""
    program = our_trainer() if software is None else software
    if accelerator.name == LOCAL_CPU:
        seconds = _cpu_step_seconds(workload, accelerator, layout, program)
    else:
        need = demand(
            workload, accelerator, layout, program, node_network_bytes_per_second=node_network_bytes_per_second
        )
        attention = math.exp(calibration.framework_attention.get(program.framework, 0.0))
        seconds = step_seconds(need, calibration.constants, attention_speed=attention)
    slowdown = math.exp(-calibration.log_speed(program.framework, accelerator.name))
    by_part = {part: value * slowdown for part, value in zip(PARTS, seconds, strict=True)}
    step = sum(by_part.values())
    tokens_per_second = layout.global_batch_size * workload.sequence_length / step
    peak = peak_flops(accelerator, layout.precision) * layout.world_size
    basis = calibration.basis(program.framework, accelerator.name)
    error = calibration.intervals[basis]
    return ThroughputEstimate(
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * workload.flops_per_token / peak,
        seconds_per_step=step,
        seconds_by_part=by_part,
        interval=(tokens_per_second * math.exp(-error.high), tokens_per_second * math.exp(-error.low)),
        basis=basis,
    )


def _cpu_step_seconds(
    workload: Workload, accelerator: Accelerator, layout: Layout, software: Software
) -> tuple[float, ...]:
    """A processor: everything at fixed shares of its measured peak, and fixed costs per layer."""
    need = demand(workload, accelerator, layout, software, node_network_bytes_per_second=CPU_LINK_BYTES_PER_SECOND)
    rate = need.peak_flops * CPU_EFFICIENCY
    repeated = 1.0 + need.recomputed_share / 3.0
    muon_rate = peak_flops(accelerator, "bf16") * CPU_MUON_EFFICIENCY
    return (
        need.passes * (need.block_flops * repeated + need.head_flops) / rate,
        need.passes * need.attention_flops * repeated / (need.peak_flops * CPU_ATTENTION_EFFICIENCY),
        0.0,
        0.0,
        (need.passes * need.gathered_bytes + need.reduced_bytes_per_step) / CPU_LINK_BYTES_PER_SECOND,
        need.muon_flops_per_step / muon_rate + CPU_SECONDS_PER_LAYER_UPDATE * need.layers,
        CPU_SECONDS_PER_LAYER_AND_PASS * need.layers * need.passes,
    )

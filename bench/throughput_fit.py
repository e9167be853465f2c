"""Fits the roofline's constants and the effects of frameworks and devices to published runs.

Maximum a posteriori in logarithms: every constant has a prior from data sheets and papers, every effect is drawn
toward zero (partial pooling), rows that lie far off count less (Huber 1964), rows of one cell share weight, because
their errors repeat. Solved by Gauss-Newton on the prediction's derivative, a few milliseconds per iteration.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from runs_file import Run

from cost.performance.roofline import Constants, Demand, demand, step_seconds

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prior:
    """A constant's most plausible value and the standard deviation of its logarithm."""

    value: float
    spread: float
    source: str


PRIORS: Mapping[str, Prior] = {
    "matmul": Prior(0.85, 0.10, "large bf16 products on an A100: 250-270 of 312 TFLOP/s (cuBLAS)"),
    "power": Prior(
        0.32, 0.20, "H100 SXM reaches 620-680 of 989 TFLOP/s at 700 W, an H100 PCIe about 400 of 756 at 350 W"
    ),
    "graphics_power": Prior(0.55, 0.20, "L4 reaches about half of its peak at 72 W; GDDR and fans take their share"),
    "attention": Prior(0.65, 0.25, "flash-attn 2 on an A100, forward and backward: 160-190 TFLOP/s (arXiv:2307.08691)"),
    "head_size_exponent": Prior(0.25, 0.15, "flash-attn 2 at head size 64 against 128 (arXiv:2307.08691, figures 4-6)"),
    "hopper_flash2": Prior(0.65, 0.15, "flash-attn 2 on an H100: 35 % utilization, 3 reaches 75 % (arXiv:2407.08608)"),
    "recompute": Prior(0.85, 0.12, "forward products run nearer the peak than backward ones"),
    "activation_traffic": Prior(100.0, 0.5, "some 15 reads and writes of bf16 per block, each way, plus casts"),
    "fused_traffic": Prior(0.5, 0.3, "fusion removes about half of the reads and writes"),
    "logits_traffic": Prior(14.0, 0.4, "bf16 and fp32 logits, softmax and gradient"),
    "fp8_gain": Prior(0.65, 0.15, "fp8 products against bf16 ones: 1.5-1.8 times (TransformerEngine)"),
    "fp8_traffic": Prior(20.0, 0.5, "amax and casts of inputs and gradients"),
    "optimizer": Prior(1.0, 0.3, "fused AdamW is bound by memory"),
    "nvlink_exposed": Prior(0.3, 0.4, "FSDP and DDP overlap most of their messages"),
    "pcie_exposed": Prior(0.5, 0.3, "without peer-to-peer, copies through the host overlap badly"),
    "network": Prior(0.8, 0.3, "nccl-tests over RoCE and InfiniBand"),
    "pcie": Prior(0.28, 0.4, "all-reduce through host memory: 6-12 GB/s on Gen4 x16"),
    "launch": Prior(2.4e-4, 0.5, "some 50 kernels per layer, forward and backward, at 5 us"),
}
NAMES = tuple(field.name for field in dataclasses.fields(Constants))
FRAMEWORK_SPREAD = 0.15
FRAMEWORK_ATTENTION_SPREAD = 0.4
ACCELERATOR_SPREAD = 0.08
ROW_SPREAD = 0.06
HUBER_LIMIT = 1.5
CELL_EXPONENT = 0.5
"""A cell of n rows weighs n to this power: between one voice per row and one per cell."""
STEP = 1e-4
MAX_ITERATIONS = 30
WARM_ITERATIONS = 6
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Fit:
    """Logarithms throughout."""

    constants: Vector
    framework_speed: Mapping[str, float]
    framework_attention: Mapping[str, float]
    accelerator_speed: Mapping[str, float]

    def log_tokens_per_second(self, row: Row) -> float:
        """Prediction; an unknown framework or device gets the pooled constants."""
        attention = self.framework_attention.get(row.framework, 0.0)
        speed = self.framework_speed.get(row.framework, 0.0) + self.accelerator_speed.get(row.accelerator, 0.0)
        return _log_speed(row, self.constants, attention) + speed

    def named_constants(self) -> Constants:
        """As the planner uses them."""
        return Constants(*(float(value) for value in np.exp(self.constants)))


@dataclass(frozen=True, slots=True)
class Row:
    """What a fit needs of a run."""

    run: Run
    framework: str
    accelerator: str
    need: Demand
    log_actual: float

    @classmethod
    def of(cls, run: Run) -> Row:
        """Count the run's work once."""
        if run.tokens_per_second is None:
            raise ValueError(f"{run.id} has no throughput")
        need = demand(
            run.workload,
            run.accelerator,
            run.layout,
            run.software,
            node_network_bytes_per_second=run.node_network_bytes_per_second,
        )
        return cls(run, run.software.framework, run.accelerator.name, need, math.log(run.tokens_per_second))


def prior_fit() -> Fit:
    """What is believed before any row is seen."""
    return Fit(_prior_means(), {}, {}, {})


def fit(rows: Sequence[Row], start: Fit | None = None) -> Fit:
    """The most probable constants and effects; `start` from a near fit saves iterations."""
    if not rows:
        return prior_fit()
    frameworks = sorted({row.framework for row in rows})
    devices = sorted({row.accelerator for row in rows})
    problem = _Problem(rows, frameworks, devices)
    point = problem.start(start)
    for _ in range(MAX_ITERATIONS if start is None else WARM_ITERATIONS):
        step = problem.newton_step(point)
        point = point + np.clip(step, -0.7, 0.7)
        if float(np.max(np.abs(step))) < TOLERANCE:
            break
    return problem.unpack(point)


class _Problem:
    """Rows against the vector (constants, framework speed, framework attention, device speed)."""

    def __init__(self, rows: Sequence[Row], frameworks: list[str], devices: list[str]) -> None:
        self.rows = rows
        self.frameworks = frameworks
        self.devices = devices
        self.framework_of = np.array([frameworks.index(row.framework) for row in rows])
        self.device_of = np.array([devices.index(row.accelerator) for row in rows])
        self.actual = np.array([row.log_actual for row in rows])
        sizes = Counter(row.run.cell for row in rows)
        self.weight = np.array([sizes[row.run.cell] ** (CELL_EXPONENT - 1.0) for row in rows])
        speed_spread = [FRAMEWORK_SPREAD] * len(frameworks) + [FRAMEWORK_ATTENTION_SPREAD] * len(frameworks)
        spread = [PRIORS[name].spread for name in NAMES] + speed_spread + [ACCELERATOR_SPREAD] * len(devices)
        self.precision = np.array(spread) ** -2.0
        self.mean = np.concatenate([_prior_means(), np.zeros(len(spread) - len(NAMES))])

    def start(self, near: Fit | None) -> Vector:
        if near is None:
            return self.mean.copy()
        speed = [near.framework_speed.get(name, 0.0) for name in self.frameworks]
        attention = [near.framework_attention.get(name, 0.0) for name in self.frameworks]
        device = [near.accelerator_speed.get(name, 0.0) for name in self.devices]
        return np.concatenate([near.constants, speed, attention, device])

    def newton_step(self, point: Vector) -> Vector:
        predicted, slopes = self._predict(point)
        residual = (predicted - self.actual) / ROW_SPREAD
        huber = np.minimum(1.0, HUBER_LIMIT / np.maximum(np.abs(residual), 1e-12)) * self.weight
        scaled = slopes / ROW_SPREAD
        normal = (scaled.T * huber) @ scaled + np.diag(self.precision)
        gradient = scaled.T @ (huber * residual) + self.precision * (point - self.mean)
        step: Vector = -np.linalg.solve(normal, gradient)
        return step

    def _predict(self, point: Vector) -> tuple[Vector, Vector]:
        num_constants, num_frameworks = len(NAMES), len(self.frameworks)
        constants = point[:num_constants]
        speed = point[num_constants : num_constants + num_frameworks]
        attention = point[num_constants + num_frameworks : num_constants + 2 * num_frameworks][self.framework_of]
        device = point[num_constants + 2 * num_frameworks :]
        base = self._log_speeds(constants, attention)
        slopes = np.zeros((len(self.rows), len(point)))
        for index in range(num_constants):
            moved = constants.copy()
            moved[index] += STEP
            slopes[:, index] = (self._log_speeds(moved, attention) - base) / STEP
        every = np.arange(len(self.rows))
        slopes[every, num_constants + self.framework_of] = 1.0
        slopes[every, num_constants + num_frameworks + self.framework_of] = slopes[:, NAMES.index("attention")]
        slopes[every, num_constants + 2 * num_frameworks + self.device_of] = 1.0
        return base + speed[self.framework_of] + device[self.device_of], slopes

    def _log_speeds(self, constants: Vector, attention: Vector) -> Vector:
        named = Constants(*np.exp(constants).tolist())
        speeds = np.exp(attention).tolist()
        return np.array([_log_rate(row.need, named, speed) for row, speed in zip(self.rows, speeds, strict=True)]) + (
            np.array([math.log(row.run.layout.world_size) for row in self.rows])
        )

    def unpack(self, point: Vector) -> Fit:
        num_constants, num_frameworks = len(NAMES), len(self.frameworks)
        effects = point[num_constants:].tolist()
        return Fit(
            constants=point[:num_constants].copy(),
            framework_speed=dict(zip(self.frameworks, effects[:num_frameworks], strict=True)),
            framework_attention=dict(zip(self.frameworks, effects[num_frameworks : 2 * num_frameworks], strict=True)),
            accelerator_speed=dict(zip(self.devices, effects[2 * num_frameworks :], strict=True)),
        )


def _prior_means() -> Vector:
    return np.log(np.array([PRIORS[name].value for name in NAMES]))


def _log_rate(need: Demand, constants: Constants, attention_speed: float) -> float:
    """Of one device."""
    return math.log(need.tokens * need.passes / sum(step_seconds(need, constants, attention_speed=attention_speed)))


def _log_speed(row: Row, constants: Vector, attention: float) -> float:
    named = Constants(*np.exp(constants).tolist())
    return _log_rate(row.need, named, math.exp(attention)) + math.log(row.run.layout.world_size)

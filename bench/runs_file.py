"""Published training runs from a CSV file: each row becomes a workload, a device, a layout and a program.

Columns are those of cost/data/calibration_runs.csv. A row may leave out what it does not know; the defaults below say
what is assumed then. Nothing here looks at a row's throughput to guess anything about its set-up.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cost.errors import UserError
from cost.market.hardware import GIGA, TERA, Accelerator, Precision, accelerator, accelerators, canonical_name
from cost.performance.layout import Layout, Sharding
from cost.performance.memory import peak
from cost.performance.software import Software
from cost.performance.workload import Mlp, Workload

REQUIRED_COLUMNS = ("id", "gpu", "n_layers", "d_model", "seq_len")
ODD_ROWS = ("tl-4090x2-issue", "llmc-125M-2048-a100", "openlm-")
"""Named as odd by the README of the data: their sources measured something else than a tuned run."""
DEFAULT_VOCABULARY = 50304
DEFAULT_HEAD_SIZE = 64
DEFAULT_TOKENS_PER_PASS = 32768
"""Per device, where a row tells no micro-batch: about what the rows that tell it use."""
DEFAULT_TOKENS_PER_STEP = 2**19
"""Where a row tells neither micro-batch nor global batch; with a micro-batch alone, no accumulation is assumed."""
DEVICES_PER_NODE = 8
CLUSTER_NODE_BYTES_PER_SECOND = 200 * GIGA
"""Per node, where a run spans nodes and does not tell its network: 1.6 Tbit/s, usual for A100 and H100 clusters."""
CLOSE_PAIR_MEAN_KEYS = 512
"""FlexAttention rows of modded-nanogpt mask by document and window: mean keys per query, from its window schedule."""
SLIDING_WINDOW_SHARE = 0.81
"""Nanochat's SSSL pattern: three layers of four see half the context: (3 · 0.75 + 1) / 4 of the causal pairs."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that says too little, or is known to be odd."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """One published run. `size` is its matrix weights without the head, to two digits: what a cell is made of."""

    id: str
    group: str
    gpu_type: str
    size: str
    accelerator: Accelerator
    workload: Workload
    layout: Layout
    software: Software
    node_network_bytes_per_second: float
    tokens_per_second: float | None
    peak_memory_gib: float | None
    knows_micro_batch: bool

    @property
    def cell(self) -> tuple[str, str]:
        """Rows of one cell are left out together."""
        return (self.gpu_type, self.size)


_PURE = {"weight_bytes": 2.0, "gradient_bytes": 2.0, "reduce_bytes": 2.0}
"""Weights and gradients in bf16, the optimizer's state apart."""
_TRAITS: Sequence[tuple[str, Software]] = (
    ("llm-foundry|composer|mosaic", Software("llm-foundry", reduce_bytes=2.0, rotary=False)),
    ("llmq", Software("llmq", fused=True, optimizer_bytes=4.0, fused_loss=True, reducer_copy=False, **_PURE)),
    (
        r"llm\.c|llmc",
        Software("llm.c", fused=True, rotary=False, optimizer_bytes=12.0, fused_loss=True, reducer_copy=False, **_PURE),
    ),
    ("modded", Software("modded-nanogpt", fused=True, reduce_bytes=2.0)),
    ("nanochat", Software("nanochat", fused=True, reduce_bytes=2.0, reducer_copy=False)),
    ("nanogpt", Software("nanogpt", rotary=False)),
    ("torchtitan", Software("torchtitan", reducer_copy=False)),
    ("fms", Software("fms-fsdp")),
    ("lit-gpt|litgpt|lightning|fabric|tinyllama", Software("lit-gpt")),
    ("deepspeed", Software("hf-trainer", optimizer_bytes=12.0, **_PURE)),
    ("hf trainer|accelerate|transformers", Software("hf-trainer")),
    ("nanotron", Software("nanotron")),
    ("megatron|nemo", Software("megatron", fused=True)),
)
"""Frameworks by name, the first match wins; what is known of each from its source. Others get Software's defaults."""

_OTHER_DEVICES: Mapping[str, tuple[float, float | None, float, float, float, float | None]] = {
    # name: bf16 TFLOP/s, fp8 TFLOP/s, GiB, GB/s, W, NVLink GB/s in one direction
    "RTX4080": (97.5, 195, 16, 717, 320, None),
    "RTX4070TI": (80.2, 160, 12, 504, 285, None),
    "RTX4060TI": (44.1, 88, 16, 288, 165, None),
    "RTX3090TI": (80, None, 24, 1008, 450, None),
    "RTX3080": (59.5, None, 10, 760, 320, None),
    "RTX5080": (112.6, 225, 16, 960, 360, None),
    "RTX5070TI": (87.9, 176, 16, 896, 300, None),
    "RTX5060TI": (47.4, 95, 16, 448, 180, None),
    "A5000": (111.1, None, 24, 768, 230, None),
    "A800": (312, None, 80, 2039, 400, 200),
    "H800": (989, 1979, 80, 3350, 700, 200),
    "H20": (148, 296, 96, 4000, 400, 450),
    "GB200": (2450, 4900, 186, 8000, 1200, 900),
    "MI250X": (383, None, 128, 3277, 560, 200),
    "MI325X": (1307, 2615, 256, 6000, 1000, 448),
}
"""Devices of published runs that nobody on our price lists rents; data-sheet figures from memory."""


def read_runs(path: Path) -> tuple[list[Run], list[Skipped]]:
    """The runs of a file that tell a throughput, and why the others are skipped."""
    runs, skipped = read_rows(path)
    skipped += [Skipped(run.id, "no throughput") for run in runs if run.tokens_per_second is None]
    return [run for run in runs if run.tokens_per_second is not None], skipped


def read_rows(path: Path) -> tuple[list[Run], list[Skipped]]:
    """Every row of a file that tells a GPU and a shape; raise UserError where it cannot be a file of runs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a CSV file of runs.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if not any(name in header for name in ("tok_s_total", "tok_s_per_gpu")):
        missing.append("tok_s_total or tok_s_per_gpu")
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; see cost/data/calibration_runs.csv for a whole header."
        )
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for number, raw in enumerate(reader, start=2):
        row = {
            (name or "").strip(): (value or "").strip() if isinstance(value, str) else "" for name, value in raw.items()
        }
        row["id"] = row["id"] or f"line {number}"
        parsed = parse_row(row)
        if isinstance(parsed, Run):
            runs.append(parsed)
        else:
            skipped.append(parsed)
    return runs, skipped


def parse_row(row: Mapping[str, str]) -> Run | Skipped:
    """One row with stripped cells."""
    if row["id"].startswith(ODD_ROWS):
        return Skipped(row["id"], "named as odd by the data's README")
    if not row["gpu"]:
        return Skipped(row["id"], "no GPU")
    lacking = [name for name in ("n_layers", "d_model", "seq_len") if (_number(row, name) or 0) < 1]
    if lacking:
        return Skipped(row["id"], f"no shape: {', '.join(lacking)} missing")
    devices = max(1, int(_number(row, "n_gpus") or 1))
    device, gpu_type = _device(row)
    software = _software(row)
    precision = _precision(row)
    workload = _workload(row, precision)
    layout = _layout(row, workload, software, devices, precision)
    layout, software = _that_fits(workload, device, layout, software)
    per_device = _number(row, "tok_s_per_gpu")
    total = _number(row, "tok_s_total")
    speed = total or (per_device or 0.0) * devices
    block_weights = workload.active_matrix_params - workload.vocab_size * workload.width
    return Run(
        id=row["id"],
        group=row.get("group") or software.framework,
        gpu_type=gpu_type,
        size=f"{block_weights:.1e}",
        accelerator=device,
        workload=workload,
        layout=layout,
        software=software,
        node_network_bytes_per_second=_network(row.get("interconnect", ""), devices),
        tokens_per_second=speed if speed > 0 else None,
        peak_memory_gib=_number(row, "peak_mem_gib"),
        knows_micro_batch=_number(row, "micro_batch_seqs") is not None,
    )


def _number(row: Mapping[str, str], name: str) -> float | None:
    """A finite number, written plainly, with thousands separators, or as 24k; None where the cell holds none."""
    match = re.fullmatch(r"[~≈]?\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([kmb])?", row.get(name, "").replace(",", "").lower())
    if match is None:
        return None
    try:
        value = float(match[1])
    except ValueError:
        return None
    value *= {"k": 1e3, "m": 1e6, "b": 1e9}.get(match[2] or "", 1.0)
    return value if math.isfinite(value) else None


def _device(row: Mapping[str, str]) -> tuple[Accelerator, str]:
    """The device and its type. Unknown spellings fall back to the table's nearest by memory, then to an A100."""
    spelling = row["gpu"]
    memory = _number(row, "gpu_mem_gb")
    hint = f"{row.get('interconnect', '')} {'PCIe' if 'pcie' in spelling.lower() else 'SXM'}"
    name = canonical_name(spelling, memory_gib=memory, hint=hint)
    if name is None:
        squeezed = re.sub(r"NVIDIA|GEFORCE|AMD|INSTINCT|[^A-Z0-9]", "", spelling.upper())
        for other, figures in sorted(_OTHER_DEVICES.items(), key=lambda item: -len(item[0])):
            if other in squeezed:
                return _other_device(other, figures), other
        nearest = min(accelerators().values(), key=lambda known: abs(math.log(known.memory_gib / (memory or 80.0))))
        return dataclasses.replace(nearest, name=spelling), spelling
    device = accelerator(name)
    watts = re.search(r"(\d{3,4})\s*W", spelling)
    if watts:
        device = dataclasses.replace(device, name=f"{name}-{watts[1]}W", tdp_watts=float(watts[1]))
    if "HBM2" in spelling.upper() and name.startswith("H100"):
        h100_pcie = accelerator("H100-PCIe")
        device = dataclasses.replace(device, memory_bytes_per_second=h100_pcie.memory_bytes_per_second)
    if memory is not None and memory > device.memory_gib:
        device = dataclasses.replace(device, memory_gib=memory)
    return device, re.sub(r"^([AH]100).*", r"\1", name)


def _other_device(name: str, figures: tuple[float, float | None, float, float, float, float | None]) -> Accelerator:
    bf16, fp8, memory, bandwidth, watts, nvlink = figures
    stacked = bandwidth > 1500
    return dataclasses.replace(
        accelerator("A100-80GB-SXM" if stacked else "RTX4090"),
        name=name,
        bf16_flops=bf16 * TERA,
        fp16_flops=bf16 * TERA,
        fp8_flops=None if fp8 is None else fp8 * TERA,
        memory_gib=memory,
        memory_bytes_per_second=bandwidth * GIGA,
        tdp_watts=watts,
        nvlink_bytes_per_second=None if nvlink is None else nvlink * GIGA,
        nvlink_group=1 if nvlink is None else DEVICES_PER_NODE,
        sources="from memory",
    )


def _software(row: Mapping[str, str]) -> Software:
    """A framework's known traits, and what this row says about its own use of it."""
    text = f"{row.get('framework', '')} {row.get('group', '')}".lower()
    name = (row.get("framework") or row.get("group") or "unknown").lower()
    software = next((traits for pattern, traits in _TRAITS if re.search(pattern, text)), Software(name))
    attention = row.get("attention", "").lower()
    optimizer = row.get("optimizer", "").lower()
    share = 1.0
    if "flex" in attention:
        share = min(1.0, CLOSE_PAIR_MEAN_KEYS / ((_number(row, "seq_len") or 1.0) / 2))
    elif "sliding" in attention or "window" in attention:
        share = SLIDING_WINDOW_SHARE
    return dataclasses.replace(
        software,
        fused=software.fused or row.get("compile", "") in ("1", "yes", "true"),
        attention="flash3" if re.search(r"fa3|flash.?attn.?3|flash.?3", attention) else "flash2",
        attention_share=share,
        optimizer="muon" if "muon" in optimizer else "adamw",
        selective_checkpointing="select" in row.get("act_ckpt", "").lower(),
    )


def _precision(row: Mapping[str, str]) -> Precision:
    text = row.get("precision", "").lower()
    for precision in ("fp8", "fp16", "fp32"):
        if text.startswith((precision, f"amp_{precision}")):
            return precision
    return "fp16" if row["gpu"].upper().startswith(("V100", "T4")) else "bf16"


def _workload(row: Mapping[str, str], precision: Precision) -> Workload:
    width = int(_number(row, "d_model") or 1)
    heads = int(_number(row, "n_heads") or max(1, width // DEFAULT_HEAD_SIZE))
    kv_heads = int(_number(row, "n_kv_heads") or heads)
    text = row.get("mlp", "").lower()
    mlp: Mlp = "swiglu" if "glu" in text else ("relu2" if "relu2" in text else "gelu")
    hidden = int(_number(row, "d_ff") or (8 * width / 3 if mlp == "swiglu" else 4 * width))
    return Workload.from_shape(
        num_tokens=1,
        num_layers=int(_number(row, "n_layers") or 1),
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=hidden,
        vocab_size=int(_number(row, "vocab") or DEFAULT_VOCABULARY),
        sequence_length=int(_number(row, "seq_len") or 1),
        global_batch_size=1,
        tied_embeddings=row.get("tied", "") not in ("0", "no", "false"),
        mlp=mlp,
        precision=precision,
    )


def _layout(
    row: Mapping[str, str], workload: Workload, software: Software, devices: int, precision: Precision
) -> Layout:
    nodes = max(1, math.ceil(devices / DEVICES_PER_NODE))
    while devices % nodes:
        nodes += 1
    length = workload.sequence_length
    batch_tokens = _number(row, "global_batch_tokens")
    micro_batch = int(_number(row, "micro_batch_seqs") or 0)
    if micro_batch < 1:
        per_device = (batch_tokens or math.inf) / devices
        micro_batch = max(1, int(min(per_device, DEFAULT_TOKENS_PER_PASS) // length))
    passes = int(_number(row, "grad_accum") or 1)
    if not batch_tokens and not row.get("micro_batch_seqs"):
        batch_tokens = DEFAULT_TOKENS_PER_STEP
    if batch_tokens:
        passes = max(1, round(batch_tokens / (devices * micro_batch * length)))
    checkpointing = row.get("act_ckpt", "").lower() in ("1", "yes", "true", "full")
    return Layout(
        num_nodes=nodes,
        gpus_per_node=devices // nodes,
        sharding=_sharding(row.get("sharding", "").lower(), software, devices),
        micro_batch_size=micro_batch,
        grad_accumulation=passes,
        activation_checkpointing=checkpointing,
        precision=precision,
    )


def _sharding(text: str, software: Software, devices: int) -> Sharding:
    if devices == 1:
        return "replicated"
    if re.search(r"zero-?3|full_shard|hsdp", text):
        return "zero3"
    if re.search(r"zero-?1", text) or software.framework == "llmq":
        return "zero1"
    if re.search(r"grad_op|zero", text):
        return "zero2"
    if "fsdp" in text:
        return "zero3"
    return "replicated"


def _that_fits(workload: Workload, device: Accelerator, layout: Layout, software: Software) -> tuple[Layout, Software]:
    """A run that ran must have fitted: where fp32 state on every device does not, it was bf16, else sharded."""
    if layout.sharding != "replicated":
        return layout, software
    in_bf16 = dataclasses.replace(software, optimizer_bytes=4.0, **_PURE)
    sharded = dataclasses.replace(layout, sharding="zero3")
    for candidate in (software, in_bf16):
        estimate = peak(workload, device, layout, software=candidate)
        if estimate.total_bytes <= estimate.capacity_bytes:
            return layout, candidate
    return sharded, software


def _network(text: str, devices: int) -> float:
    """Bytes per second of a whole node, from a text such as '1600Gbps/node' or '400Gb/s RDMA per GPU'."""
    match = re.search(r"(\d+)\s*G(?:b/s|bps|bit/s)", text)
    if match is None:
        return CLUSTER_NODE_BYTES_PER_SECOND
    per_node = float(match[1]) * GIGA / 8
    return per_node * min(devices, DEVICES_PER_NODE) if re.search(r"per (gpu|device)|/gpu", text, re.I) else per_node

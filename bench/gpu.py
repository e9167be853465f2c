"""Everything that only a GPU can show, in nine minutes: `python bench/gpu.py --out gpu.json` on a CUDA machine.

Needs torch >= 2.11, lightning, numpy and transformers, nothing else of slm's extras; flash-attn is used where its wheel
was brought along. Parts that no time is left for, or that a package or a card cannot do, are named as skipped.
`--tiny` runs the same code on the CPU with shapes that mean nothing, so that it cannot rot.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from tasks.run_store_keys import METRICS, PROGRESS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost.errors import SlmError
from cost.market.hardware import accelerator, canonical_name
from cost.performance import memory, throughput
from cost.performance.layout import Layout
from cost.performance.software import our_trainer
from trainer.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer.loop import Signal, train
from trainer.metrics import flops_per_token, peak_flops
from trainer.model import attention
from trainer.model.documents import document_offsets
from trainer.model.fp8 import require_fp8
from trainer.model.presets import expand
from trainer.optim import Updates, scale_and_clip
from trainer.parallel import fabric_precision, set_up_model
from trainer.run_store.base import DirectoryStore

TOTAL_SECONDS = 9 * 60
SECONDS_PER_SHAPE = 30
SECONDS_PER_PEER = 12
PARITY_STEPS = 200
TOKENS_PER_STEP = 2**18
"""Of one optimizer step, accumulated from as many micro-batches as that takes; ours and the peer's alike."""
MAX_DOCUMENTS = 16
"""Of one row, where documents are measured."""
VOCAB_SIZE = 32_768
SHAPES = {"124m": 1024, "350m": 2048, "tinyllama-1.1b": 2048, "1.5b": 2048}
"""Shape to sequence length."""
LARGEST_ERROR = 3e-2
"""Relative, of bf16 attention against fp32: output and each gradient."""


@dataclass(frozen=True)
class Bench:
    """One machine, and until when to use it."""

    device: torch.device
    tiny: bool
    ends_at: float

    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fabric(self, config: TrainConfig) -> Any:
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        return Fabric(accelerator=kind, devices=1, precision=fabric_precision(config))


# -- attention


def attention_errors(bench: Bench) -> list[dict[str, Any]]:
    """Each backend against the dense fp32 reference: relative errors of the output and the three gradients."""
    T, head_size = (33, 16) if bench.tiny else (1024, 128)
    ways = {**attention.BACKENDS, "sdpa": attention.attend_sdpa, "attend": attention.attend}
    rows = []
    for name, way in ways.items():
        for documents in (False, True):
            for window in (None, T // 4):
                generator = torch.Generator().manual_seed(0)
                shapes = [(2, T, 8, head_size), (2, T, 2, head_size), (2, T, 2, head_size)]
                exact = [torch.randn(s, generator=generator).to(bench.device).requires_grad_() for s in shapes]
                fast = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
                ids_BT = torch.arange(T, device=bench.device).div(T // 5, rounding_mode="floor").repeat(2, 1)
                where = (document_offsets(ids_BT, 6) if documents else None, T, window)
                outputs = [way(*fast, *where), attention.attend_dense(*exact, *where)]
                for output in outputs:
                    output.float().square().sum().backward()
                pairs = [(outputs[0], outputs[1]), *((f.grad, e.grad) for f, e in zip(fast, exact, strict=True))]
                errors = [relative_error(found, wanted) for found, wanted in pairs]
                rows.append(
                    {
                        "backend": name,
                        "documents": documents,
                        "window": window,
                        "errors": errors,
                        "holds": max(errors) < LARGEST_ERROR,
                    }
                )
    return rows


def relative_error(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None and wanted is not None
    return float((found.detach().float() - wanted.detach()).norm() / wanted.detach().norm())


# -- training steps


def model_shape(name: str, preset: str = "llama", *, tiny: bool = False) -> ModelConfig:
    if tiny:
        sizes: dict[str, Any] = {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 4, "hidden_size": 96}
        return ModelConfig(**expand({"preset": preset, "vocab_size": 256, "sequence_length": 32, **sizes}))
    return ModelConfig(
        **expand({"preset": preset, "shape": name, "vocab_size": VOCAB_SIZE, "sequence_length": SHAPES[name]})
    )


class Steps:
    """Whole optimizer steps of the real trainer's parts on one batch shape."""

    def __init__(self, bench: Bench, config: TrainConfig) -> None:
        self.bench, self.config, self.fabric = bench, config, bench.fabric(config)
        with bench.device:  # which weights they are does not matter here, and the device makes them at once
            self.weights, self.model = set_up_model(config, self.fabric)
        self.updates = Updates(self.weights, config.optimizer)

    def step(self, *batch: Tensor, passes: int = 1) -> float:
        """Tokens and targets, and documents if there are any, B x T each; the same in each pass."""
        num_targets = passes * batch[1].numel()
        for _ in range(passes):
            loss = self.model(*batch)
            self.fabric.backward(loss)
        scale_and_clip(self.updates.parameters.values(), 1 / num_targets, self.config.optimizer.clip_norm)
        self.updates.step(1.0)
        self.updates.zero_grad()
        return float(loss.detach()) / batch[1].numel()


def random_batch(bench: Bench, config: TrainConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens that follow from the one before, mostly: something to learn."""
    model, generator = config.model, torch.Generator().manual_seed(seed)
    shape = (config.batch.micro_batch_size, model.sequence_length + 1)
    noise = torch.randint(model.vocab_size, shape, generator=generator)
    rows = noise.clone()
    for t in range(1, shape[1]):
        learned = (rows[:, t - 1] * 3 + 7) % model.vocab_size
        rows[:, t] = torch.where(noise[:, t] % 10 == 0, noise[:, t], learned)
    rows = rows.to(bench.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def loss_parity(bench: Bench) -> dict[str, Any]:
    """The same run in fp32, bf16 and (where the card has it) 8 bits: mean losses of its last tenth."""
    num_steps = 10 if bench.tiny else PARITY_STEPS
    model = model_shape("124m", tiny=bench.tiny)
    if not bench.tiny:
        model = replace(model, num_layers=6, sequence_length=512, vocab_size=4096)
    base = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        batch=BatchConfig(micro_batch_size=2 if bench.tiny else 16),
    )
    ways: dict[str, dict[str, Any]] = {
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "fp8": {"precision": "bf16", "execution": ExecutionConfig(fp8=True)},
    }
    found: dict[str, Any] = {"num_steps": num_steps}
    for name, fields in ways.items():
        config = replace(base, **fields)
        if config.execution.fp8:
            try:
                require_fp8(bench.device)
            except SlmError as error:
                found[name] = {"skipped": str(error)}
                continue
        steps = Steps(bench, config)
        losses = [steps.step(*random_batch(bench, config, seed)) for seed in range(num_steps)]
        found[name] = {"last_loss": statistics.mean(losses[-max(1, num_steps // 10) :])}
        if name != "fp32":
            found[name]["relative_difference"] = found[name]["last_loss"] / found["fp32"]["last_loss"] - 1
        del steps
        free(bench)
    return found


def documents_of(config: TrainConfig, tokens_BT: Tensor) -> Tensor:
    """As many documents of equal length in each row as it may have: B x T."""
    assert config.batch.max_documents is not None
    T = config.model.sequence_length
    return (
        torch.arange(T, device=tokens_BT.device)
        .mul(config.batch.max_documents)
        .div(T, rounding_mode="floor")
        .expand_as(tokens_BT)
    )


def passes_of(bench: Bench, batch: tuple[Tensor, ...]) -> int:
    """Micro-batches of one optimizer step."""
    return 2 if bench.tiny else max(1, TOKENS_PER_STEP // batch[0].numel())


def speed(
    bench: Bench, name: str, optimizer: str = "muon", *, fp8: bool = False, documents: bool = False
) -> dict[str, Any]:
    """Tokens per second, utilization and memory of one shape, compiled, with the largest micro-batch that fits."""
    model = model_shape(name, tiny=bench.tiny)
    config = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(name=optimizer),
        batch=BatchConfig(micro_batch_size=1, max_documents=MAX_DOCUMENTS if documents else None),
        execution=ExecutionConfig(compile=not bench.tiny, fp8=fp8),
    )
    card = card_of(bench)
    micro = 2
    if card is not None:
        software = our_trainer(optimizer=optimizer, compiled=True)
        each_layout = Layout(1, 1, "replicated", 1, 1, False, "bf16")
        fits = max(1, memory.largest_micro_batch(model.workload(), card, each_layout, software=software))
        micro = 2 ** int(math.log2(fits))
    while True:
        try:
            measured = timed(bench, replace(config, batch=replace(config.batch, micro_batch_size=micro)))
            break
        except torch.cuda.OutOfMemoryError:
            free(bench)
            if micro == 1:
                return {"shape": name, "skipped": "not even one sequence fits"}
            micro //= 2
    row = {"shape": name, "optimizer": optimizer, "fp8": fp8, "documents": documents, "micro_batch_size": micro}
    row |= measured
    row["num_params"] = model.workload().num_params
    row["mfu"] = utilization(bench, config, row["tokens_per_second"])
    if card is not None:
        layout = Layout(1, 1, "replicated", micro, 1, False, "bf16")
        workload = model.workload(num_tokens=10**9, global_batch_size=micro)
        guess = throughput.estimate(workload, card, layout, throughput.default_calibration(), software=software)
        room = memory.peak(workload, card, layout, software=software)
        row["predicted_tokens_per_second"] = guess.tokens_per_second
        row["predicted_memory_gib"] = room.total_gib
    return row


def timed(bench: Bench, config: TrainConfig) -> dict[str, Any]:
    """Steps for the time that is given to a shape, after those that compile."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    steps, batch = Steps(bench, config), random_batch(bench, config)
    if config.batch.max_documents is not None:
        batch = (*batch, documents_of(config, batch[0]))
    passes = passes_of(bench, batch)
    began = time.monotonic()
    for _ in range(2):
        steps.step(*batch)
    bench.wait()
    warm_up_seconds = time.monotonic() - began
    wanted = 0.5 if bench.tiny else min(SECONDS_PER_SHAPE, max(5.0, bench.seconds_left() - 20))
    count, began = 0, time.monotonic()
    while time.monotonic() - began < wanted:
        steps.step(*batch, passes=passes)  # reads the loss, so it waits for the device
        count += 1
    bench.wait()
    seconds = time.monotonic() - began
    del steps
    result = {
        "tokens_per_second": count * passes * batch[0].numel() / seconds,
        "num_steps": count,
        "tokens_per_step": passes * batch[0].numel(),
        "seconds": seconds,
        "warm_up_seconds": warm_up_seconds,
        "memory_gib": peak_gib(bench),
    }
    free(bench)
    return result


def transformers_speed(bench: Bench, name: str, micro_batch_size: int) -> dict[str, Any]:
    """transformers' Llama of the same shape: SDPA, compiled, bf16 autocast, fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = model_shape(name, tiny=bench.tiny)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.sequence_length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with bench.device:
        theirs = LlamaForCausalLM(config)
    compiled = torch.compile(theirs, backend="eager" if bench.tiny else "inductor")
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, fused=True)
    micro = micro_batch_size
    while True:
        try:
            return _transformers_timed(bench, compiled, theirs, optimizer, model, micro)
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            free(bench)
            if micro == 1:
                return {"skipped": "not even one sequence fits"}
            micro //= 2


def _transformers_timed(
    bench: Bench, compiled: Any, theirs: Any, optimizer: torch.optim.Optimizer, model: ModelConfig, micro: int
) -> dict[str, Any]:
    config = TrainConfig(model=model, batch=BatchConfig(micro_batch_size=micro))
    tokens_BT, targets_BT = random_batch(bench, config)

    def step(passes: int) -> None:
        for _ in range(passes):
            with torch.autocast(bench.device.type, torch.bfloat16):
                logits = compiled(input_ids=tokens_BT).logits
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets_BT.flatten())
            (loss / passes).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())

    began = time.monotonic()
    for _ in range(2):
        step(1)
    bench.wait()
    warm_up_seconds = time.monotonic() - began
    wanted = 0.5 if bench.tiny else min(SECONDS_PER_PEER, max(5.0, bench.seconds_left() - 10))
    passes = passes_of(bench, (tokens_BT,))
    count, began = 0, time.monotonic()
    while time.monotonic() - began < wanted:
        step(passes)
        count += 1
    bench.wait()
    rate = count * passes * tokens_BT.numel() / (time.monotonic() - began)
    return {
        "tokens_per_second": rate,
        "mfu": utilization(bench, config, rate),
        "micro_batch_size": micro,
        "num_steps": count,
        "warm_up_seconds": warm_up_seconds,
        "memory_gib": peak_gib(bench),
    }


def checkpoint_stall(bench: Bench) -> dict[str, Any]:
    """How long training waits for a checkpoint, by the real loop on made-up data."""
    model = model_shape("350m", tiny=bench.tiny)
    config = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(name="adamw"),
        num_steps=6,
        batch=BatchConfig(global_batch_size=2, micro_batch_size=2),
        evaluation=EvaluationConfig(eval_every_steps=6, eval_sequences=2),
        checkpoint=CheckpointConfig(every_steps=2, interval_seconds=1e9),
    )
    with tempfile.TemporaryDirectory(prefix="slm-gpu-") as name:
        folder = Path(name)
        write_random_data(folder / "data", model)
        store = DirectoryStore(folder / "store")
        train(
            config,
            fabric=bench.fabric(config),
            data_dir=folder / "data",
            store=store,
            lease_id="gpu",
            signals=NoSignals(),
            phase=lambda name: None,
        )
        rows = [json.loads(line) for key in store.list(METRICS) for line in store.read(key).splitlines()]
        progress = json.loads(store.read(PROGRESS))
    stalls = [row["checkpoint_stall_seconds"] for row in rows[2:]] + [progress["checkpoint_stall_seconds"]]
    free(bench)
    gib = 12 * model.workload().num_params / 2**30  # weights and two moments in fp32
    return {"shape": "350m", "checkpoint_gib": gib, "first_stall_seconds": stalls[0], "last_stall_seconds": stalls[-1]}


class NoSignals:
    def poll(self, step: int) -> Signal:
        return Signal()


def write_random_data(folder: Path, model: ModelConfig) -> None:
    """One source of random tokens in the form of `slm prepare`."""
    folder.mkdir(parents=True)
    size = 40 * model.sequence_length + 1
    splits = {}
    for number, split in enumerate(("train", "heldout")):
        tokens = np.random.default_rng(number).integers(0, model.vocab_size, size, dtype=np.uint16)
        tokens.astype("<u2").tofile(folder / f"{split}.bin")
        shard = {"file": f"{split}.bin", "num_tokens": size, "sha256": ""}
        splits[split] = {"sources": [{"name": "text", "weight": 1.0, "shards": [shard]}]}
    index = {
        "version": 1,
        "vocab_size": model.vocab_size,
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": "0" * 64,
        "bytes_per_token": 1.0,
        "splits": splits,
        "heldout_unigram_entropy_nats": math.log(model.vocab_size),
        "fingerprint": "0" * 64,
    }
    (folder / "index.json").write_text(json.dumps(index))


# -- the machine


def card_of(bench: Bench) -> Any:
    """The planner's entry of this card; None on a CPU or for an unknown one."""
    if bench.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(bench.device)
    name = canonical_name(properties.name, memory_gib=properties.total_memory / 2**30)
    return None if name is None else accelerator(name)


def utilization(bench: Bench, config: TrainConfig, tokens_per_second: float) -> float | None:
    peak = peak_flops(bench.device, config)
    return None if peak is None else tokens_per_second * flops_per_token(config.model) / peak


def peak_gib(bench: Bench) -> float | None:
    return torch.cuda.max_memory_allocated(bench.device) / 2**30 if bench.device.type == "cuda" else None


def free(bench: Bench) -> None:
    torch.compiler.reset()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def machine(bench: Bench) -> dict[str, Any]:
    on_cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "attention": attention.describe(bench.device, torch.bfloat16),
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "tiny": bench.tiny,
    }


# -- all of it


def parts(bench: Bench) -> Iterator[tuple[str, float, Callable[[dict[str, Any]], Any]]]:
    """Name, seconds that it needs at least, and what gives its result from those before it."""
    names = list(SHAPES)[:1] if bench.tiny else list(SHAPES)
    yield "attention", 5, lambda _: attention_errors(bench)
    for name in names:
        yield f"speed {name}", 45, lambda _, name=name: speed(bench, name)
    if importlib.util.find_spec("transformers") is not None:
        for name in names:

            def peer(found: dict[str, Any], name: str = name) -> dict[str, Any]:
                ours = found.get(f"speed {name}", {})
                theirs = transformers_speed(bench, name, ours.get("micro_batch_size", 4))
                if "tokens_per_second" in ours and "tokens_per_second" in theirs:
                    theirs["ours_over_theirs"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
                return theirs

            yield f"transformers {name}", 30, peer
    yield "loss parity", 40, lambda _: loss_parity(bench)
    yield "checkpoint stall", 20, lambda _: checkpoint_stall(bench)
    yield f"speed documents {names[-1]}", 40, lambda _: speed(bench, names[-1], documents=True)
    if not bench.tiny:
        yield f"speed fp8 {names[-1]}", 40, lambda _: fp8_speed(bench, names[-1])


def fp8_speed(bench: Bench, name: str) -> dict[str, Any]:
    require_fp8(bench.device)
    return speed(bench, name, fp8=True)


def run(bench: Bench, out: Path | None) -> dict[str, Any]:
    """Every part's result; `out`, if given, holds after each part what was found so far."""
    found: dict[str, Any] = {"machine": machine(bench)}
    for name, seconds, part in parts(bench):
        if not bench.tiny and bench.seconds_left() < seconds:
            found[name] = {"skipped": f"{bench.seconds_left():.0f} s are left, it needs {seconds:.0f}"}
        else:
            began = time.monotonic()
            try:
                found[name] = part(found)
            except SlmError as error:
                found[name] = {"skipped": str(error)}
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("transformers") is None:
        found["transformers"] = {"skipped": "transformers is not installed"}
    return found


def table(found: dict[str, Any]) -> str:
    """What the JSON says, for eyes."""
    lines = [f"{found['machine']['device']}, torch {found['machine']['torch']}, {found['machine']['attention']}", ""]
    lines.append(
        f"{'shape':28} {'tokens/s':>10} {'predicted':>10} {'MFU':>6} {'GiB':>6} {'predicted':>10} {'batch':>6}"
    )

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for name, row in found.items():
        if isinstance(row, dict) and "tokens_per_second" in row:
            cells = [
                shown(row["tokens_per_second"], "10,.0f"),
                shown(row.get("predicted_tokens_per_second"), "10,.0f").rjust(10),
                shown(row["mfu"], "6.1%").rjust(6),
                shown(row["memory_gib"], "6.1f").rjust(6),
                shown(row.get("predicted_memory_gib"), "10.1f").rjust(10),
                f"{row['micro_batch_size']:6}",
            ]
            ratio = f"  ours x{row['ours_over_theirs']:.2f}" if "ours_over_theirs" in row else ""
            lines.append(f"{name:28} {' '.join(cells)}{ratio}")
    lines.append("")
    held = found["attention"]
    worst = max(max(row["errors"]) for row in held)
    lines.append(f"attention: {sum(row['holds'] for row in held)} of {len(held)} hold, largest error {worst:.1e}")
    for name in ("loss parity", "checkpoint stall"):
        lines.append(f"{name}: {json.dumps(found[name])}")
    lines += [f"{n}: skipped, {r['skipped']}" for n, r in found.items() if isinstance(r, dict) and "skipped" in r]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with shapes that mean nothing")
    parser.add_argument("--json", action="store_true", help="print the JSON, and the table on standard error")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="to use at most")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("no CUDA device here; --tiny runs the same code on the CPU.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.tiny else "cuda:0")
    bench = Bench(device, arguments.tiny, time.monotonic() + arguments.seconds)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    found = run(bench, arguments.out)
    print(table(found), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(found, indent=1))
    with contextlib.suppress(KeyError):
        return 0 if all(row["holds"] for row in found["attention"]) else 1
    return 1


if __name__ == "__main__":
    sys.exit(main())

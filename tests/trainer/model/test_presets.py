from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost.errors import UserError
from cost.market.hardware import BYTES_PER_GIB, accelerator
from cost.performance.layout import Layout
from cost.performance.memory import CONTEXT_BYTES, peak
from cost.performance.software import our_trainer
from trainer.config import ModelConfig
from trainer.model.presets import PRESETS, SHAPES, expand

PUBLISHED = {
    ("gpt2", "124m", 50257, 1024): 124_439_808,  # openai-community/gpt2
    ("llama", "tinyllama-1.1b", 32000, 2048): 1_100_048_384,  # TinyLlama/TinyLlama-1.1B
}


@pytest.mark.parametrize(("words", "num_params"), PUBLISHED.items())
def test_a_named_shape_has_the_published_size(words: tuple[str, str, int, int], num_params: int) -> None:
    preset, shape, vocab_size, sequence_length = words
    fields = expand({"preset": preset, "shape": shape, "vocab_size": vocab_size, "sequence_length": sequence_length})
    assert ModelConfig(**fields).workload().num_params == num_params


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_preset_comes_in_every_shape(preset: str, shape: str) -> None:
    config = ModelConfig(**expand({"preset": preset, "shape": shape, "vocab_size": 50_304, "sequence_length": 1024}))
    wanted = {"124m": 124e6, "350m": 350e6, "tinyllama-1.1b": 1.1e9, "1.5b": 1.5e9, "3b": 3e9}[shape]
    assert config.workload().matrix_params == pytest.approx(wanted, rel=0.25)
    assert config.num_heads % config.num_kv_heads == 0


def test_matrices_of_two_and_of_three_cost_the_same() -> None:
    sizes = {preset: ModelConfig(**expand({"preset": preset, "depth": 12})) for preset in ("qwen3", "speedrun")}
    assert sizes["qwen3"].hidden_size * 3 == sizes["speedrun"].hidden_size * 2 == 6144


def test_a_depth_fixes_width_and_heads() -> None:
    config = ModelConfig(**expand({"depth": 20}))
    assert (config.num_layers, config.width, config.num_heads, config.size_of_heads) == (20, 1280, 10, 128)
    for depth in range(1, 40):
        config = ModelConfig(**expand({"depth": depth}))
        assert config.size_of_heads * config.num_heads == config.width and config.size_of_heads % 2 == 0


def test_what_is_given_beside_a_preset_counts() -> None:
    assert expand({"preset": "speedrun", "mlp": "swiglu", "qk_norm": False})["mlp"] == "swiglu"
    assert expand({"shape": "124m", "width": 512})["width"] == 512
    assert expand({"width": 64}) == {"width": 64}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"preset": "lama"}, "there is no such preset; one of llama, qwen3, gpt2, speedrun"),
        ({"shape": "7b"}, "there is no such shape; one of 124m"),
        ({"depth": 0}, "should be a whole number of layers"),
        ({"depth": True}, "should be a whole number of layers"),
        ({"depth": 4, "shape": "124m"}, "give one of the two"),
    ],
)
def test_a_wrong_word_is_said(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        expand(words)


H200_RESULT = Path(__file__).resolve().parents[3] / "bench" / "results" / "2026-11-26-gpu.json"


def measured_on_one_gpu() -> list[dict[str, Any]]:
    found = json.loads(H200_RESULT.read_text())["result"]
    return [row for name, row in found.items() if name.startswith("speed ")]


@pytest.mark.parametrize("row", measured_on_one_gpu(), ids=lambda row: row["shape"])
def test_the_planner_predicts_the_memory_that_a_gpu_needed(row: dict[str, Any]) -> None:
    fields = {"preset": "llama", "shape": row["shape"], "vocab_size": 32_768}
    model = ModelConfig(**expand({**fields, "sequence_length": 1024 if row["shape"] == "124m" else 2048}))
    assert model.workload().num_params == row["num_params"]
    layout = Layout(1, 1, "replicated", row["micro_batch_size"], 1, False, "bf16")
    software = our_trainer(optimizer=row["optimizer"], compiled=True)
    predicted = peak(model.workload(), accelerator("H200"), layout, software=software)
    # What torch allocated; the process itself comes on top of it.
    allocated_gib = (predicted.total_bytes - CONTEXT_BYTES) / BYTES_PER_GIB
    assert allocated_gib == pytest.approx(row["memory_gib"], rel=0.08)

"""export, generate and import as commands, on a run that was really trained: a few steps of a small llama."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost.ledger.database import connect
from orchestrator import cli
from orchestrator.runs.options import RunOptions
from orchestrator.runs.records import Runs
from orchestrator.settings import Home
from tasks.data.tokenizer import train_tokenizer
from tasks.recipe.load import load_recipe
from tests.orchestrator.views.test_json_docs import Checker, sections
from trainer.model.presets import expand

pytest.importorskip("safetensors", reason="safetensors is not installed (extra export)")

VOCAB_SIZE = 300
MODEL = {
    "preset": "llama",
    "vocab_size": VOCAB_SIZE,
    "sequence_length": 16,
    "num_layers": 2,
    "width": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "hidden_size": 32,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One run, demo-1, with a checkpoint of step 3; and demo-2, which has not begun."""
    home = Home(tmp_path_factory.mktemp("home")).create()
    data_dir = prepared(home.data_root / "tiny")
    db = connect(home.database)
    runs = Runs(db)
    for _ in range(2):
        recipe = load_recipe("demo").model_dump_json()
        created = runs.create(
            recipe_name="demo", recipe_digest="d", recipe_json=recipe, options=RunOptions("fake"), cap_usd=Decimal(1)
        )
        assert created.run_id in ("demo-1", "demo-2")
    db.close()
    store = home.store_dir("demo-1")
    store.mkdir(parents=True)
    (store / "spec.json").write_text(json.dumps({"store_uri": str(store), "data_dir": str(data_dir)}))
    program = f"""
from pathlib import Path
from lightning.fabric import Fabric
from trainer.config import BatchConfig, EvaluationConfig, ExecutionConfig, ModelConfig, TrainConfig
from trainer.loop import Signal, train
from trainer.run_store.base import DirectoryStore

class Quiet:
    def poll(self, step):
        return Signal()

config = TrainConfig(model=ModelConfig(**{expand(MODEL)!r}), num_steps=3, precision="fp32",
                     batch=BatchConfig(2, micro_batch_size=2), evaluation=EvaluationConfig(eval_sequences=2),
                     execution=ExecutionConfig(num_threads=1))
train(config, fabric=Fabric(accelerator="cpu", devices=1), data_dir=Path({str(data_dir)!r}),
      store=DirectoryStore(Path({str(store)!r})), lease_id="l", signals=Quiet(), phase=lambda name: None)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return home


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True)
    text = Path(__file__).read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(iter([text]), VOCAB_SIZE, ["<|endoftext|>"]).to_bytes())
    splits = {}
    for split in ("train", "heldout"):
        np.random.default_rng(0).integers(0, VOCAB_SIZE, 400, dtype=np.uint16).tofile(folder / f"{split}.bin")
        shard = {"file": f"{split}.bin", "num_tokens": 400, "sha256": ""}
        splits[split] = {"sources": [{"name": "text", "weight": 1.0, "shards": [shard]}]}
    index = {
        "version": 1,
        "vocab_size": VOCAB_SIZE,
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": "t" * 64,
        "bytes_per_token": 1.0,
        "splits": splits,
        "heldout_unigram_entropy_nats": 5.0,
        "fingerprint": "f" * 64,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def in_home(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLM_HOME", str(home.root))
    monkeypatch.chdir(tmp_path)


def slm(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return int(end.value.code or 0), out.getvalue()


def document(*arguments: str) -> dict[str, Any]:
    code, text = slm(*arguments, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_run_is_exported_and_imported_again_and_the_page_tells_every_key(home: Home, tmp_path: Path) -> None:
    exported = document("export", "demo-1")
    assert exported["folder"] == "demo-1-hf"
    assert exported["checkpoint"] == "step 3"
    assert exported["architecture"] == "LlamaForCausalLM"
    assert (tmp_path / "demo-1-hf" / "model.safetensors").exists()
    imported = document("import", "demo-1-hf")
    assert imported["folder"] == str(home.root / "models" / "demo-1-hf")
    assert imported["num_params"] == exported["num_params"]
    assert imported["has_tokenizer"] is True
    checker = Checker(sections())
    for section, found in {"slm export": exported, "slm import": imported}.items():
        for name, value in found.items():
            checker.check(value, section, name)
        assert set(checker.page[section]) == checker.seen[section]


def test_a_recipe_goes_on_from_imported_weights(home: Home, tmp_path: Path) -> None:
    assert slm("export", "demo-1", "--out", "hf")[0] == 0
    fields = document("import", "hf", "--out", "weights")["model"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training: {num_steps: 1, initial_weights: weights}\n")
    config = load_recipe(recipe, fields).train_config()
    assert config.initial_weights == str(tmp_path / "weights" / "weights.pt")
    from trainer.model.transformer import build_model, load_initial

    model = build_model(config.model, seed=9)
    load_initial(model, Path(config.initial_weights))
    import torch

    saved = torch.load(config.initial_weights, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in model.named_parameters())


def test_generated_text_begins_with_the_prompt_and_depends_on_the_seed_alone(capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", "demo-1", "--tokens", "30", "--seed", seed, "def main("])
        assert not end.value.code
        texts.append(capfd.readouterr().out)
    assert all(text.startswith("def main(") and len(text) > len("def main(\n") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_a_run_without_weights_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["export", "demo-2"], ["generate", "demo-2", "x"]):
        code, _ = slm(*command)
        assert code == 2
        assert "run demo-2 has not begun, so it has no weights" in capsys.readouterr().err


def test_what_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _ = slm("import", str(tmp_path / "nothing"))
    assert code == 2
    error = capsys.readouterr().err
    assert "cannot read" in error and "config.json" in error and "Traceback" not in error

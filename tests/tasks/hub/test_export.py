"""Logits equal those of transformers with the same weights, and what goes there and back is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cost.errors import UserError
from tasks.data.tokenizer import Tokenizer, encode, train_tokenizer
from tasks.hub import huggingface as hf
from tasks.hub.export import export_hf, export_main, import_hf, import_main
from tasks.hub.weights import Weights, read_model, write_model
from trainer.config import ModelConfig
from trainer.model.presets import expand
from trainer.model.transformer import Transformer, build_model

pytest.importorskip("safetensors", reason="safetensors is not installed (extra export)")

SHAPE = {
    "vocab_size": 300,
    "sequence_length": 24,
    "num_layers": 3,
    "width": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_size": 48,
}
CONFIGS = {
    "llama": ModelConfig(**expand({**SHAPE, "preset": "llama"})),
    "llama, tied": ModelConfig(**expand({**SHAPE, "preset": "llama", "tied_embeddings": True, "rope_base": 500_000.0})),
    "qwen3": ModelConfig(**expand({**SHAPE, "preset": "qwen3"})),
    "qwen3, wide heads": ModelConfig(**expand({**SHAPE, "preset": "qwen3", "head_size": 16, "tied_embeddings": True})),
    "gpt2": ModelConfig(**expand({**SHAPE, "preset": "gpt2", "num_kv_heads": 4})),
}
TEXTS = ["def main():\n    return 'naïve café', 12345  # 😀\r\n\t\n\n", "  It's   we'LL <|endoftext|> x\u00a0y", ""]


def random_model(config: ModelConfig) -> Transformer:
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.05)
    return model


def weights_of(model: Transformer) -> Weights:
    return Weights(model.config, {name: value.detach() for name, value in model.named_parameters()}, "step 7")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = Path(__file__).read_text(encoding="utf-8")
    return train_tokenizer(iter([text]), SHAPE["vocab_size"], ["<|endoftext|>", "<|pad|>"])


def some_tokens() -> Tensor:
    return torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    model = random_model(CONFIGS[name])
    export_hf(weights_of(model), tokenizer, tmp_path / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_tokens()).logits, model.logits(some_tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_wrote_is_read(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    settings = hf.hf_config(CONFIGS[name], end_of_text=298)
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "hf", max_shard_size="40KB")  # several files
    weights, found = import_hf(tmp_path / "hf")
    assert weights.config == CONFIGS[name]
    assert found is None
    model = build_model(weights.config, seed=0)
    model.load_state_dict(weights.tensors, strict=not weights.config.tied_embeddings)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(some_tokens()), theirs(some_tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_every_byte_is_the_same(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = weights_of(random_model(CONFIGS[name]))
    export_hf(before, tokenizer, tmp_path / "hf")
    assert import_main([str(tmp_path / "hf"), "--out", str(tmp_path / "model")]) == 0
    after = read_model(tmp_path / "model")
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(value, before.tensors[name]) for name, value in after.tensors.items())
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == tokenizer.to_bytes()


def test_the_exported_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    export_hf(weights_of(random_model(CONFIGS["llama"])), tokenizer, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*TEXTS, Path(hf.__file__).read_text(encoding="utf-8")]:
        plain = text.replace("<|endoftext|>", "")
        ids = encode(tokenizer.encoding(), plain)
        assert theirs(plain, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == plain
    assert theirs("a<|endoftext|>", add_special_tokens=False)["input_ids"][-1] == tokenizer.end_of_text
    assert theirs.eos_token_id == tokenizer.end_of_text


def test_merges_are_what_makes_each_token() -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"cd", b"abcd", b"bc", b"abc"]
    assert hf.merges(ranks)[:4] == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"b", b"c")]
    assert hf.merges(ranks)[4] == (b"ab", b"c")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mlp": "relu2"}, "model.mlp=relu2"),
        ({"window": 8}, "model.window=8"),
        (expand({"preset": "speedrun"}), "model.logit_softcap=15.0"),
    ],
)
def test_what_transformers_has_not_is_refused(
    fields: dict[str, Any], told: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = build_model(replace(CONFIGS["llama"], **fields), seed=0)
    with pytest.raises(UserError, match=told):
        export_hf(weights_of(model), tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mamba"}, "slm imports llama, qwen3, gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling={'rope_type': 'yarn'}"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"num_hidden_layers": 4}, "lack 'model.layers.3.input_layernorm.weight'"),
    ],
)
def test_what_cannot_be_imported_is_said(
    change: dict[str, Any], told: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    export_hf(weights_of(random_model(CONFIGS["llama"])), tokenizer, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    changed = {name: value for name, value in {**json.loads(path.read_bytes()), **change}.items() if value is not None}
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        import_hf(tmp_path / "hf")
    assert told in str(caught.value)


def test_a_folder_that_is_there_is_not_written_over(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export_hf(weights_of(random_model(CONFIGS["llama"])), tokenizer, tmp_path / "hf")


def test_a_model_folder_that_is_none_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model that `slm import` wrote"):
        read_model(tmp_path)
    write_model(tmp_path / "model", weights_of(random_model(CONFIGS["gpt2"])), tokenizer)
    (tmp_path / "model" / "weights.pt").unlink()
    with pytest.raises(UserError, match="import it again"):
        read_model(tmp_path / "model")


def test_a_store_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    from cost.errors import SlmError

    (tmp_path / "store").mkdir()
    with pytest.raises(SlmError, match="has no checkpoint"):
        export_main(["--store", str(tmp_path / "store"), "--data-dir", str(tmp_path), "--out", str(tmp_path / "hf")])

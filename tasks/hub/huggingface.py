"""Weights and tokenizers as `transformers` keeps them, and back: Llama, Qwen3 and GPT-2.

Pure mappings, without `transformers`: names, layouts and configurations. Invariant: importing what was exported gives
the same configuration and the same bytes of every weight; what the other side cannot express is refused, never
approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cost.errors import UserError
from tasks.data.tokenizer import Tokenizer
from tasks.recipe.sections import END_OF_TEXT
from trainer.config import ModelConfig
from trainer.model.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
PARTS = ("mlp", "norm", "positions", "biases", "qk_norm", "residual_scalars", "value_embeddings", "logit_softcap")
"""The fields that tell families apart."""
LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
LLAMA_TOPS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
GPT2_NAMES = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
GPT2_TOPS = {"embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}
GPT2_QKV = ("attention.query", "attention.key", "attention.value")
"""One matrix there, and every matrix lies the other way round."""


def family_of(config: ModelConfig) -> str:
    """Which of FAMILIES a model is.

    Raises:
        UserError: None of them; says which fields stand against the nearest.
    """
    differences = {}
    for family in FAMILIES:
        wanted = {part: getattr(ModelConfig(**PRESETS[family]), part) for part in PARTS}
        differences[family] = [
            f"model.{part}={getattr(config, part)}" for part in PARTS if getattr(config, part) != wanted[part]
        ]
        if config.window is not None:
            differences[family].append(f"model.window={config.window}")
        if family == "gpt2" and (config.num_kv_heads != config.num_heads or config.head_size is not None):
            differences[family].append(f"model.num_kv_heads={config.num_kv_heads}")
    nearest = min(FAMILIES, key=lambda family: len(differences[family]))
    if differences[nearest]:
        raise UserError(
            f"transformers has no model with {', '.join(differences[nearest])} (the nearest is {nearest}); it can be "
            f"used by `slm generate`, and a run with model.preset={nearest} can be exported."
        )
    return nearest


# -- configurations


def hf_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """`config.json`."""
    family = family_of(config)
    common = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if family == "gpt2":
        return common | {
            "n_positions": config.sequence_length,
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.hidden_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
        }
    found = common | {
        "max_position_embeddings": config.sequence_length,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.size_of_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "attention_bias": False,
    }
    return found | ({"use_sliding_window": False} if family == "qwen3" else {"mlp_bias": False})


def model_config(found: Mapping[str, Any]) -> ModelConfig:
    """Ours, from a `config.json`.

    Raises:
        UserError: Another family, or a part that ours has not.
    """
    family = str(found.get("model_type"))
    if family not in FAMILIES:
        raise UserError(f"config.json is of a {family!r} model; slm imports {', '.join(FAMILIES)}.")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_scaling": rope_type != "default",
        "attention_bias": bool(found.get("attention_bias")),
        "mlp_bias": bool(found.get("mlp_bias")),
        "use_sliding_window": bool(found.get("use_sliding_window")),
        "hidden_act": family != "gpt2" and found.get("hidden_act", "silu") != "silu",
        "activation_function": family == "gpt2" and found.get("activation_function", "gelu_new") != "gelu_new",
        "scale_attn_by_inverse_layer_idx": bool(found.get("scale_attn_by_inverse_layer_idx")),
    }
    if names := [name for name, refuse in refused.items() if refuse]:
        given = ", ".join(f"{name}={found.get(name, rope_type)}" for name in names)
        raise UserError(f"config.json asks for {given}, which slm's {family} has not, so its weights cannot be used.")
    parts = dict(PRESETS[family])
    try:
        if family == "gpt2":
            sizes = {
                "sequence_length": found["n_positions"],
                "num_layers": found["n_layer"],
                "width": found["n_embd"],
                "num_heads": found["n_head"],
                "num_kv_heads": found["n_head"],
                "hidden_size": found.get("n_inner") or 4 * found["n_embd"],
                "norm_eps": found.get("layer_norm_epsilon", 1e-5),
                "tied_embeddings": found.get("tie_word_embeddings", True),
            }
        else:
            heads = found["num_attention_heads"]
            head_size = found.get("head_dim") or found["hidden_size"] // heads
            sizes = {
                "sequence_length": found["max_position_embeddings"],
                "num_layers": found["num_hidden_layers"],
                "width": found["hidden_size"],
                "num_heads": heads,
                "num_kv_heads": found.get("num_key_value_heads") or heads,
                "head_size": None if head_size * heads == found["hidden_size"] else head_size,
                "hidden_size": found["intermediate_size"],
                "norm_eps": found.get("rms_norm_eps", 1e-6),
                "rope_base": float(rope.get("rope_theta", found.get("rope_theta", 10_000.0))),
                "tied_embeddings": found.get("tie_word_embeddings", False),
            }
        return ModelConfig(**{**parts, **sizes, "vocab_size": found["vocab_size"]})
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]!r}, so the model's shape is unknown.") from None


def recipe_model(config: ModelConfig) -> dict[str, Any]:
    """The fields that a recipe's `model` needs to be this model: those that are not the defaults."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default
    }


# -- weights


def to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under their names."""
    family, found = family_of(config), {}
    for name, value in weights.items():
        top, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            if top == "head" and config.tied_embeddings:
                continue
            theirs = GPT2_TOPS.get(top) if family == "gpt2" else LLAMA_TOPS[top]
            found["lm_head.weight" if theirs is None else f"{_gpt2_prefix(family)}{theirs}.{kind}"] = value
            continue
        _, layer, part = top.split(".", 2)
        if family != "gpt2":
            found[f"model.layers.{layer}.{LLAMA_NAMES[part]}.{kind}"] = value
        elif part not in GPT2_QKV:
            matrix = kind == "weight" and value.ndim == 2
            found[f"transformer.h.{layer}.{GPT2_NAMES[part]}.{kind}"] = value.T if matrix else value
        elif part == GPT2_QKV[0]:
            import torch

            parts = [weights[f"blocks.{layer}.{each}.{kind}"] for each in GPT2_QKV]
            joined = torch.cat(parts)
            found[f"transformer.h.{layer}.attn.c_attn.{kind}"] = joined.T if kind == "weight" else joined
    return {name: value.contiguous() for name, value in found.items()}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their weights under our names, in fp32; a tied head is left out.

    Raises:
        UserError: One is missing or has another shape.
    """
    family, found = family_of(config), {}
    plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}

    def take(name: str) -> Tensor:
        if name not in plain:
            raise UserError(f"the weights lack {name!r}, which a {family} of this shape has.")
        return plain[name].float()

    tops = GPT2_TOPS if family == "gpt2" else LLAMA_TOPS
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    for ours, theirs in tops.items():
        if ours == "head" and config.tied_embeddings:
            continue
        for kind in kinds if ours == "norm" else ("weight",):
            found[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    if family == "gpt2" and not config.tied_embeddings:
        found["head.weight"] = take("lm_head.weight")
    for layer in range(config.num_layers):
        if family != "gpt2":
            for ours, theirs in LLAMA_NAMES.items():
                if config.qk_norm or not ours.endswith(("query_norm", "key_norm")):
                    found[f"blocks.{layer}.{ours}.weight"] = take(f"model.layers.{layer}.{theirs}.weight")
            continue
        for kind in ("weight", "bias"):
            for ours, theirs in GPT2_NAMES.items():
                value = take(f"h.{layer}.{theirs}.{kind}")
                found[f"blocks.{layer}.{ours}.{kind}"] = value.T if value.ndim == 2 else value
            joined = take(f"h.{layer}.attn.c_attn.{kind}")
            for ours, value in zip(GPT2_QKV, (joined.T if kind == "weight" else joined).chunk(3), strict=True):
                found[f"blocks.{layer}.{ours}.{kind}"] = value
    return {name: value.contiguous() for name, value in found.items()}


def _gpt2_prefix(family: str) -> str:
    return "transformer." if family == "gpt2" else ""


# -- tokenizers


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer.json` of the `tokenizers` library: the same ids for the same text."""
    letters = _byte_letters()
    spelled = ["".join(letters[byte] for byte in token) for token in tokenizer.ranks]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(spelled) + number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, text in enumerate(tokenizer.special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: number for number, text in enumerate(spelled)},
            "merges": [["".join(letters[b] for b in half) for half in pair] for pair in merges(tokenizer.ranks)],
        },
    }


def tokenizer_config(sequence_length: int) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer_from_json(content: Mapping[str, Any]) -> Tokenizer:
    """Ours, from a byte-level `tokenizer.json` whose merges are in the order of their ids.

    Raises:
        UserError: It is of another kind.
    """
    model, bytes_of = content.get("model", {}), {letter: byte for byte, letter in enumerate(_byte_letters())}
    pattern = _pattern_of(content.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or content.get("normalizer") or pattern is None:
        raise UserError("tokenizer.json is not byte-level BPE, so slm cannot encode text with it.")
    vocab: dict[str, int] = model["vocab"]
    specials = {str(item["content"]): int(item["id"]) for item in content.get("added_tokens", [])}
    plain = sorted((number, text) for text, number in vocab.items() if text not in specials)
    try:
        ranks = tuple(bytes(bytes_of[letter] for letter in text) for _, text in plain)
    except KeyError as error:
        raise UserError(f"tokenizer.json has a token with {error.args[0]!r}, which stands for no byte.") from None
    ordered = [number for number, _ in plain] == list(range(len(plain)))
    after = sorted(specials.values()) == list(range(len(plain), len(plain) + len(specials)))
    if not ordered or not after:
        raise UserError("tokenizer.json has special tokens between the others, which slm's form cannot say.")
    names = tuple(sorted(specials, key=specials.__getitem__))
    return Tokenizer(pattern, ranks, names)


def merges(ranks: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token beyond the bytes is made of: what is left of it when all earlier merges are done."""
    known = {token: number for number, token in enumerate(ranks)}
    found = []
    for token in ranks:
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [known.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] >= known[token]:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:  # else no merges lead to it, and it is only found whole
            found.append((parts[0], parts[1]))
    return found


def _pattern_of(pre_tokenizer: Mapping[str, Any]) -> str | None:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"] and "Regex" in steps[0].get("pattern", {}):
        return str(steps[0]["pattern"]["Regex"])
    if kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space"):
        return r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
    return None


def _byte_letters() -> list[str]:
    """How byte-level vocabularies spell each byte: itself where it can be seen, else a letter beyond Latin-1."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def read_json(text: bytes, name: str) -> dict[str, Any]:
    """Raises UserError when it is no JSON object."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} should hold a JSON object.")
    return content

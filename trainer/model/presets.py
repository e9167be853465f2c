"""Names for choices of a model's fields: which parts (a preset), and how large (a shape's name, or a depth).

`expand` turns the words `preset`, `shape` and `depth` of a recipe's model into plain fields of ModelConfig; a field
that is given beside them counts. Nothing else in the trainer knows these names. Standard library only.
Sources: Llama (Touvron et al. 2023, arXiv:2302.13971), Qwen3 (arXiv:2505.09388), GPT-2 (Radford et al. 2019), and for
`speedrun` modded-nanogpt's and nanochat's logs, as docs/trainer.md tells part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost.errors import UserError

Fields = dict[str, Any]

PRESETS: dict[str, Fields] = {
    "llama": {"qk_norm": False, "zero_init": False},
    "qwen3": {"qk_norm": True, "zero_init": False, "rope_base": 1_000_000.0, "norm_eps": 1e-6},
    "gpt2": {
        "mlp": "gelu",
        "norm": "layer",
        "positions": "learned",
        "biases": True,
        "qk_norm": False,
        "tied_embeddings": True,
        "zero_init": False,
    },
    "speedrun": {
        "mlp": "relu2",
        "qk_norm": True,
        "tied_embeddings": False,
        "zero_init": True,
        "residual_scalars": True,
        "logit_softcap": 15.0,
    },
}
SHAPES: dict[str, Fields] = {
    "124m": {"num_layers": 12, "width": 768, "num_heads": 12, "num_kv_heads": 12, "hidden_size": 2048},
    "350m": {"num_layers": 24, "width": 1024, "num_heads": 16, "num_kv_heads": 8, "hidden_size": 3072},
    "tinyllama-1.1b": {"num_layers": 22, "width": 2048, "num_heads": 32, "num_kv_heads": 4, "hidden_size": 5632},
    "1.5b": {"num_layers": 28, "width": 2048, "num_heads": 16, "num_kv_heads": 8, "hidden_size": 5632},
    "3b": {"num_layers": 28, "width": 3072, "num_heads": 24, "num_kv_heads": 8, "hidden_size": 8192},
}
WIDTH_PER_LAYER = 64
DEPTH_HEAD_SIZE = 128
"""A depth alone fixes nanochat's shapes: 64 of width per layer, heads of about 128."""
HIDDEN_MULTIPLE = 64


def expand(model: Mapping[str, Any]) -> Fields:
    """A recipe's `model` with `preset`, `shape` and `depth` replaced by what they stand for.

    Raises:
        UserError: No such preset or shape, a depth that is no positive number, or both a shape and a depth.
    """
    given = dict(model)
    preset, shape, depth = (given.pop(word, None) for word in ("preset", "shape", "depth"))
    if shape is not None and depth is not None:
        raise UserError(f"model.shape = {shape!r} and model.depth = {depth!r}: give one of the two")
    parts = {} if preset is None else _named("preset", preset, PRESETS)
    if shape is not None:
        sizes = _named("shape", shape, SHAPES)
    elif depth is not None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise UserError(f"model.depth = {depth!r}: should be a whole number of layers, 1 or more")
        sizes = by_depth(depth)
    else:
        sizes = {}
    if sizes and {**parts, **given}.get("mlp", "swiglu") != "swiglu":
        sizes["hidden_size"] = 4 * sizes["width"]  # two matrices instead of three
    if sizes and preset == "gpt2":
        sizes["num_kv_heads"] = sizes["num_heads"]
    return {**parts, **sizes, **given}


def by_depth(depth: int) -> Fields:
    """The shape of a model of so many layers."""
    width = WIDTH_PER_LAYER * depth
    num_heads = max(1, width // DEPTH_HEAD_SIZE)
    while width % (2 * num_heads):
        num_heads -= 1
    hidden = -(-8 * width // 3 // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
    return {
        "num_layers": depth,
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "hidden_size": hidden,
    }


def _named(word: str, name: Any, known: Mapping[str, Fields]) -> Fields:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"model.{word} = {name!r}: there is no such {word}; one of {', '.join(known)}")
    return dict(known[name])

"""`python -m tasks export | import`: a run's weights for `transformers`, and a transformers folder for a run.

Folders appear whole, by one rename. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cost.errors import SlmError, UserError
from tasks.data.tokenizer import Tokenizer
from tasks.hub import huggingface as hf
from tasks.hub.weights import Weights, newest_weights, tokenizer_in, write_model
from tasks.stores.opening import open_store

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"


def export_main(argv: Sequence[str]) -> int:
    """Write `--out` from the newest checkpoint of `--store`."""
    parser = argparse.ArgumentParser(prog="python -m tasks export", description="Write a run's weights for others.")
    parser.add_argument("--store", required=True, help="the run store")
    parser.add_argument("--data-dir", type=Path, required=True, help="prepared data, for its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args(argv)
    weights = newest_weights(open_store(arguments.store, create=False))
    facts = export_hf(weights, tokenizer_in(arguments.data_dir), arguments.out)
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


def import_main(argv: Sequence[str]) -> int:
    """Write `--out` from a folder of transformers."""
    parser = argparse.ArgumentParser(prog="python -m tasks import", description="Read weights of others.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args(argv)
    weights, tokenizer = import_hf(arguments.folder)
    _whole(arguments.out, lambda folder: write_model(folder, weights, tokenizer))
    facts = {
        "folder": str(arguments.out),
        "num_params": sum(value.numel() for value in weights.tensors.values()),
        "model": [f"model.{name}={json.dumps(value)}" for name, value in hf.recipe_model(weights.config).items()],
        "has_tokenizer": tokenizer is not None,
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


def export_hf(weights: Weights, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        UserError: transformers has no such model, the folder is there already, or safetensors is not installed.
    """
    save_file = _safetensors().save_file
    config = hf.hf_config(weights.config, tokenizer.end_of_text)
    tensors = hf.to_hf(weights.tensors, weights.config)

    def fill(folder: Path) -> None:
        save_file(tensors, str(folder / SAFETENSORS), metadata={"format": "pt"})
        documents = {
            "config.json": config,
            "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id")},
            "tokenizer.json": hf.tokenizer_json(tokenizer),
            "tokenizer_config.json": hf.tokenizer_config(weights.config.sequence_length),
        }
        for name, content in documents.items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    _whole(out, fill)
    return {
        "folder": str(out),
        "format": "hf",
        "architecture": config["architectures"][0],
        "checkpoint": weights.origin,
        "num_params": sum(value.numel() for value in weights.tensors.values()),
        "num_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def import_hf(folder: Path) -> tuple[Weights, Tokenizer | None]:
    """Weights of a folder of transformers, and its tokenizer where ours can be that.

    Raises:
        UserError: No such folder, no weights in it, or a model that ours is not.
    """
    load_file = _safetensors().load_file
    config = hf.model_config(hf.read_json(_read(folder / "config.json"), "config.json"))
    index = folder / SAFETENSORS_INDEX
    names = [SAFETENSORS]
    if index.exists():
        names = sorted(set(hf.read_json(index.read_bytes(), index.name).get("weight_map", {}).values()))
    tensors: dict[str, Any] = {}
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}; slm reads weights in safetensors only.")
        tensors |= load_file(str(folder / name))
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = hf.tokenizer_from_json(hf.read_json(_read(folder / "tokenizer.json"), "tokenizer.json"))
        except UserError as error:
            sys.stderr.write(f"{error} The weights are imported without it.\n")
    return Weights(config, hf.from_hf(tensors, config), f"{folder}"), tokenizer


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("this needs safetensors: pip install 'slm-spot[export]'.") from None
    return safetensors.torch


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def _whole(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a hidden folder and rename it; nothing is left of one that fails."""
    if out.exists():
        raise UserError(f"{out} is there already; give another folder, or remove it.")
    hidden = out.parent / f".{out.name}.{os.getpid()}"
    try:
        hidden.mkdir(parents=True)
        fill(hidden)
        hidden.rename(out)
    except OSError as error:
        raise SlmError(f"cannot write {out}: {error.strerror}; free space there, or give another folder.") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)

"""A run's newest weights, or an imported model's, without a trainer: for export, generation and a new run's start.

Imported models lie in a folder of MODEL_FILE (the recipe's `model`), IMPORTED_WEIGHTS and, where it could be read, the
tokenizer.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cost.errors import SlmError, UserError
from tasks.recipe import IMPORTED_WEIGHTS
from tasks.shards import TOKENIZER_NAME
from tasks.tokenizer import Tokenizer, read_tokenizer
from trainer.chain import Damaged, checkpoints_of_chain, fetch, read_manifest
from trainer.config import ModelConfig
from trainer.store import Store

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MODEL_FILE = "model.json"


@dataclass(frozen=True)
class Weights:
    """A model's shape, its weights in fp32 under the trainer's names, and where they are from."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: str


def newest_weights(store: Store) -> Weights:
    """Of the newest whole checkpoint.

    Raises:
        SlmError: There is none.
    """
    skipped = []
    for place in checkpoints_of_chain(store):
        with tempfile.TemporaryDirectory(prefix="slm-weights-") as name:
            try:
                manifest = read_manifest(store, place)
                fetch(store, place, manifest, Path(name))
            except Damaged as error:
                skipped.append(f"{place}: {error}")
                log.warning("the checkpoint at %s is damaged: %s; trying the one before", place, error)
                continue
            config = ModelConfig(**manifest.facts["config"]["model"])
            return Weights(config, _read_parts(Path(name)), f"step {place.step}")
    reason = f" that is whole ({'; '.join(skipped)})" if skipped else ""
    raise SlmError(f"{store.uri} has no checkpoint{reason}; let the run reach its first one.")


def _read_parts(folder: Path) -> dict[str, Tensor]:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    found: dict[str, Tensor] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model/") and isinstance(meta, TensorStorageMetadata)
    }
    load(dict(found), storage_reader=reader, no_dist=True)
    return {name.removeprefix("model/"): value for name, value in found.items()}


def write_model(folder: Path, weights: Weights, tokenizer: Tokenizer | None) -> None:
    """A folder that `read_model` reads."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights.tensors, folder / IMPORTED_WEIGHTS)
    if tokenizer is not None:
        (folder / TOKENIZER_NAME).write_bytes(tokenizer.to_bytes())
    facts = {"model": asdict(weights.config), "origin": weights.origin}
    (folder / MODEL_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_model(folder: Path) -> Weights:
    """Raises UserError when the folder is no imported model."""
    import torch

    try:
        facts = json.loads((folder / MODEL_FILE).read_bytes())
        tensors = torch.load(folder / IMPORTED_WEIGHTS, weights_only=True)
        return Weights(ModelConfig(**facts["model"]), tensors, str(facts["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no model that `slm import` wrote ({error}); import it again.") from None


def tokenizer_in(folder: Path) -> Tokenizer:
    """Of prepared data or an imported model."""
    return read_tokenizer(folder / TOKENIZER_NAME)

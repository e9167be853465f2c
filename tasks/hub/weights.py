"""A run's newest weights, or an imported model's, without a trainer: for export, generation and a new run's start.

Imported models lie in a folder of MODEL_FILE (the recipe's `model`), IMPORTED_WEIGHTS and, where it could be read, the
tokenizer.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cost.errors import SlmError, UserError
from tasks.data.shards import TOKENIZER_NAME
from tasks.data.tokenizer import Tokenizer, read_tokenizer
from tasks.recipe.schema import IMPORTED_WEIGHTS
from trainer.checkpoints.lineage import checkpoints_of_chain, read_manifest
from trainer.checkpoints.parts import Damaged
from trainer.config import ModelConfig
from trainer.run_store.base import Store

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
    from trainer.checkpoints.manager import read_tensors

    skipped = []
    for place in checkpoints_of_chain(store):
        try:
            config = ModelConfig(**read_manifest(store, place).facts["config"]["model"])
            return Weights(config, read_tensors(store, place), f"step {place.step}")
        except Damaged as error:
            skipped.append(f"{place}: {error}")
            log.warning("the checkpoint at %s is damaged: %s; trying the one before", place, error)
    reason = f" that is whole ({'; '.join(skipped)})" if skipped else ""
    raise SlmError(f"{store.uri} has no checkpoint{reason}; let the run reach its first one.")


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

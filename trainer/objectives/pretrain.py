"""Pre-training: cross-entropy of the next token, over every target that counts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trainer.data.loader import Batch
from trainer.model.loss import IGNORED
from trainer.objectives.base import LossSum

PRETRAIN = "pretrain"


class Pretrain:
    """The model computes this loss itself, together with its head, so that the logits are never there as a whole."""

    name = PRETRAIN

    @property
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """None."""
        return {}

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        """Nats, summed over the targets that are not IGNORED."""
        return LossSum(model(*batch.given()), (batch.targets != IGNORED).sum())

"""The protocol between the training loop and what a run minimizes: pre-training, fine-tuning, preferences.

`trainer.loop` owns everything that is the same for all of them: batches, gradient accumulation, the update, evaluation
and checkpoints. An objective turns a batch into a summed loss and the number of targets in that sum, and names the
frozen modules that it needs beside the model.
Invariant: the sums of the parts of a batch add up to the sum of the batch, so that a step is the same at every world
size and every micro-batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from trainer.data.loader import Batch


class LossSum(NamedTuple):
    """Two scalars on the batch's device. A batch without targets gives zero twice."""

    loss_sum: Tensor
    """With gradients for the model's parameters, where they are enabled."""
    num_targets: Tensor


class Objective(Protocol):
    """What a run minimizes: the mean of its loss over all targets."""

    @property
    def name(self) -> str:
        """Stands in every checkpoint; one of another objective is refused."""
        ...

    @property
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """What it holds beside the model, such as a reference model.

        The loop moves these modules to the device. They are not trained and not part of a checkpoint, so they must be
        the same after every restart. The planner has to count them: whoever adds one adds its memory and FLOPs to
        `cost.performance`.
        """
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss of `batch`, which is on the device of `model`.

        Training calls it with gradients enabled, evaluation without. `model` must be called exactly once with
        gradients, since the gradients of ranks are joined in its backward pass.
        """
        ...

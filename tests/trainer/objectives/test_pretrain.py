"""Pre-training as an objective: its sum, its count, and that both add up over the parts of a batch."""

from __future__ import annotations

import torch
from torch.nn import functional

from trainer.config import TrainConfig
from trainer.data.loader import Batch
from trainer.loop import masked_batch
from trainer.model.loss import IGNORED
from trainer.model.transformer import build_model
from trainer.objectives.pretrain import Pretrain


def some_batch(config: TrainConfig) -> Batch:
    """Four rows, of which the second counts for nothing and the third for half."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, config.model.sequence_length)
    tokens_BT, targets_BT = (torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2))
    targets_BT[1] = IGNORED
    targets_BT[2, : shape[1] // 2] = IGNORED
    return Batch(tokens_BT, targets_BT)


def test_the_loss_is_the_summed_cross_entropy_of_the_targets_that_count(tiny: TrainConfig) -> None:
    model, batch = build_model(tiny.model, seed=0), some_batch(tiny)
    found = Pretrain()(model, batch)
    by_hand = functional.cross_entropy(
        model.logits(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(found.loss_sum, by_hand)
    assert int(found.num_targets) == 16 + 0 + 8 + 16


def test_parts_of_a_batch_add_up_and_a_masked_one_adds_nothing(tiny: TrainConfig) -> None:
    model, batch, objective = build_model(tiny.model, seed=0), some_batch(tiny), Pretrain()
    whole = objective(model, batch)
    parts = [objective(model, batch.rows(row, row + 1)) for row in range(4)]
    parts.append(objective(model, masked_batch(tiny.model.sequence_length)))
    torch.testing.assert_close(torch.stack([part.loss_sum for part in parts]).sum(), whole.loss_sum)
    assert sum(int(part.num_targets) for part in parts) == int(whole.num_targets)
    assert [each.item() for each in parts[-1]] == [0.0, 0.0]

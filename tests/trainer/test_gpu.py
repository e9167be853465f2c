"""What only a CUDA device can show; `make gpu` runs these, everything else leaves them out."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch

from tests.support.configs import changed
from trainer.config import TrainConfig
from trainer.loop import Signal, fabric_precision, train
from trainer.model.attention import BACKENDS, attend_dense, attend_sdpa
from trainer.model.documents import document_offsets
from trainer.run_store.base import DirectoryStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


class NoSignals:
    def poll(self, step: int) -> Signal:
        return Signal()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_tokens", [1, 127, 2048])
@pytest.mark.parametrize("name", [*BACKENDS, "sdpa"])
def test_attention_agrees_with_its_definition_forward_and_backward(
    name: str, num_tokens: int, window: int | None, documents: bool
) -> None:
    way = BACKENDS.get(name, attend_sdpa)
    torch.manual_seed(0)
    shapes = [(2, num_tokens, 8, 64), (2, num_tokens, 2, 64), (2, num_tokens, 2, 64)]
    ids = torch.arange(num_tokens, device="cuda").div(90, rounding_mode="floor").repeat(2, 1)
    where = (document_offsets(ids, 23) if documents else None, num_tokens, window)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    twins = [item.detach().float().requires_grad_() for item in inputs]
    fast, exact = way(*inputs, *where), attend_dense(*twins, *where)
    torch.testing.assert_close(fast.float(), exact, atol=2e-2, rtol=2e-2)
    fast.float().square().sum().backward()
    exact.square().sum().backward()
    for item, twin in zip(inputs, twins, strict=True):
        assert item.grad is not None and twin.grad is not None
        # Of a single token's query and key the gradient is zero: the output is its value.
        assert (item.grad.float() - twin.grad).norm() < 3e-2 * twin.grad.norm() + 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_device_learns_and_resumes(
    precision: str, tiny: TrainConfig, data_dir: Path, tmp_path: Path
) -> None:
    config = changed(tiny, precision=precision, num_steps=40, eval_every_steps=40)
    store = DirectoryStore(tmp_path / "store")
    for stop_after in (15, None):
        fabric = lightning.Fabric(accelerator="cuda", devices=1, precision=fabric_precision(config))
        fabric.launch()
        result = train(
            config,
            fabric=fabric,
            data_dir=data_dir,
            store=store,
            lease_id="gpu",
            signals=NoSignals(),
            phase=lambda name: None,
            stop_after=stop_after,
        )
    assert (result.outcome, result.step) == ("finished", 40)
    assert result.heldout_loss is not None and result.heldout_loss < 2.5  # ln(64) = 4.16 before the first step

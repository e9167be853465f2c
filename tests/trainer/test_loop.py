"""One process: what a run does, says and writes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cost.errors import SlmError, UserError
from cost.performance.workload import Workload
from tests.support.configs import changed
from trainer.checkpoints.lineage import IncarnationStart, Place, Superseded, begin_incarnation, checkpoints_of_chain
from trainer.config import ModelConfig, TrainConfig
from trainer.data.loader import Batch
from trainer.loop import PHASES, Result, Signal, fabric_precision
from trainer.metrics import Progress, Rate, flops_per_token, peak_flops
from trainer.model.loss import IGNORED
from trainer.model.transformer import build_model, parameters_sha256
from trainer.objectives.base import LossSum
from trainer.run_store.base import DirectoryStore
from trainer.run_store.envelope import unwrap

RunSingle = Callable[..., Result]
MetricsOf = Callable[[Path], list[dict[str, Any]]]


class Asks:
    """Wants what `wishes` says for the step in progress."""

    def __init__(self, wishes: dict[int, Signal]) -> None:
        self.wishes = wishes
        self.polled: list[int] = []

    def poll(self, step: int) -> Signal:
        self.polled.append(step)
        return self.wishes.get(step, Signal())


def steps_saved(folder: Path) -> list[int]:
    return [place.step for place in checkpoints_of_chain(DirectoryStore(folder, create=False))]


def test_the_loss_falls_on_data_that_can_be_learned(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, with_optimizer: Callable[..., TrainConfig]
) -> None:
    config = with_optimizer(replace(tiny, num_steps=80), learning_rate=0.03)
    result = run_single(config, tmp_path)
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["first_heldout_loss"] == pytest.approx(math.log(64), abs=1e-4)
    assert result.heldout_loss == facts["heldout_loss"]
    assert result.heldout_loss < 2.5


def test_a_finished_run_says_so(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    phases: list[str] = []
    result = run_single(tiny, tmp_path, phase=phases.append)
    assert tuple(phases) == PHASES == ("data", "model", "load", "first_step")
    assert (result.outcome, result.step) == ("finished", 6)
    assert unwrap((tmp_path / "result.json").read_bytes(), "result.json") == {
        **asdict(result),
        "tokens": 6 * 8 * 16,
        "source_epochs": {"text": 33 / 149, "code": 15 / 43},  # 0.7 and 0.3 of 48 sequences
        "first_heldout_loss": pytest.approx(math.log(64), abs=1e-4),
        "unigram_entropy": 4.1,
    }
    assert steps_saved(tmp_path) == [6]


def test_progress_has_every_field_and_the_last_state(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    result = run_single(tiny, tmp_path)
    progress = Progress(**unwrap((tmp_path / "progress" / "latest.json").read_bytes(), "progress/latest.json"))
    assert (progress.step, progress.num_steps, progress.tokens) == (6, 6, 768)
    assert (progress.world_size, progress.incarnation, progress.checkpoint_step) == (1, 0, 6)
    assert progress.heldout_loss == result.heldout_loss
    assert progress.learning_rate == pytest.approx(0.01 / 3)  # the last of three decaying steps
    assert progress.mfu is None
    assert progress.tokens_per_second == progress.tokens_per_second_per_device
    assert progress.tokens_per_second is not None
    assert 0 < progress.checkpoint_stall_seconds < progress.elapsed_seconds
    assert 0 < progress.data_wait_seconds < progress.elapsed_seconds


def test_metrics_hold_every_step(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, metrics_of: MetricsOf
) -> None:
    run_single(tiny, tmp_path)
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.02 / 3, 0.01 / 3])
    assert all(row["tokens"] == 128 and row["seconds"] > row["data_wait_seconds"] > 0 for row in rows)
    assert ["heldout_loss" in row for row in rows] == [False, False, False, True, False, True]
    assert rows[0]["loss"] == pytest.approx(math.log(64), abs=1e-4)
    assert rows[0]["gradient_norm"] > 0


def test_signals_are_polled_once_a_step_and_a_wish_to_stop_saves_and_stops(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    signals = Asks({2: Signal(stop=True, reason="drain threshold")})
    result = run_single(tiny, tmp_path, signals=signals)
    assert (result.outcome, result.step) == ("stopped", 3)
    assert signals.polled == [0, 1, 2]
    assert steps_saved(tmp_path) == [3]
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "progress" / "latest.json").read_text())["checkpoint_step"] == 3


def test_a_wish_for_a_checkpoint_saves_and_goes_on(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    result = run_single(tiny, tmp_path, signals=Asks({1: Signal(checkpoint=True), 3: Signal(checkpoint=True)}))
    assert result.outcome == "finished"
    assert steps_saved(tmp_path) == [6, 4, 2]


def test_a_stop_in_the_last_step_is_a_finish(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    assert run_single(tiny, tmp_path, signals=Asks({5: Signal(stop=True)})).outcome == "finished"


def test_checkpoints_come_by_steps(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    run_single(changed(tiny, checkpoint_every_steps=2, keep_last=9), tmp_path)
    assert steps_saved(tmp_path) == [6, 4, 2]


def test_checkpoints_come_by_time(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    """One is begun only when the one before is durable, so that a slow disk leaves some out."""
    run_single(changed(tiny, checkpoint_interval_seconds=0.0, keep_last=9), tmp_path / "often")
    assert {1, 6} <= set(steps_saved(tmp_path / "often"))
    run_single(changed(tiny, checkpoint_interval_seconds=3600.0, keep_last=9), tmp_path / "seldom")
    assert steps_saved(tmp_path / "seldom") == [6]


def test_old_checkpoints_go(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    run_single(changed(tiny, checkpoint_every_steps=1, keep_last=3), tmp_path)
    assert steps_saved(tmp_path) == [6, 5, 4]


def test_a_run_that_is_complete_is_finished_again_without_a_step(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    first = run_single(tiny, tmp_path)
    (tmp_path / "result.json").unlink()
    signals = Asks({})
    assert run_single(tiny, tmp_path, signals=signals) == first
    assert signals.polled == []
    assert json.loads((tmp_path / "result.json").read_text())["weights_sha256"] == first.weights_sha256
    assert steps_saved(tmp_path) == [6]


def test_a_loss_that_is_not_finite_is_said_before_it_reaches_the_weights(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, with_optimizer: Callable[..., TrainConfig]
) -> None:
    config = with_optimizer(changed(tiny, checkpoint_every_steps=1), name="adamw", learning_rate=1e38, warmup_steps=0)
    message = (
        r"the loss is nan and the gradient norm \S+ at step 2, learning rate 1e\+38; the newest checkpoint is at "
        r"step 1 of incarnation 0. Start a new run with a smaller optimizer.learning_rate"
    )
    with pytest.raises(SlmError, match=message):
        run_single(config, tmp_path)
    assert steps_saved(tmp_path) == [1]


def test_a_model_of_too_small_a_vocabulary_is_refused(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    config = replace(tiny, model=replace(tiny.model, vocab_size=63))
    with pytest.raises(UserError, match=r"vocabulary of 64 tokens, the model one of 63; set model.vocab_size to 64"):
        run_single(config, tmp_path)


class TakesOver:
    """Begins incarnation 2 during one step, as a relaunch would while this process still lives."""

    def __init__(self, folder: Path, at_step: int) -> None:
        self.folder, self.at_step = folder, at_step

    def poll(self, step: int) -> Signal:
        if step == self.at_step:
            start = IncarnationStart(2, Place(0, 2), "lease-1", 1, "2026-11-23T00:00:00+00:00")
            assert begin_incarnation(DirectoryStore(self.folder), start)
        return Signal()


@pytest.mark.parametrize("checkpoint_every_steps", [2, None])
def test_a_superseded_run_ends_without_a_result_and_without_a_trace_in_the_chain(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, checkpoint_every_steps: int | None
) -> None:
    run_single(tiny, tmp_path, stop_after=2)
    config = changed(tiny, checkpoint_every_steps=checkpoint_every_steps)
    with pytest.raises(Superseded, match="incarnation 1 of this run was superseded by incarnation 2"):
        run_single(config, tmp_path, signals=TakesOver(tmp_path, at_step=3))
    assert steps_saved(tmp_path) == [2]
    assert not list((tmp_path / "checkpoints").glob("incarnation=1/*/manifest.json"))
    assert not (tmp_path / "result.json").exists()


def test_a_superseded_run_that_has_nothing_left_to_save_writes_no_result_either(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    run_single(tiny, tmp_path)
    (tmp_path / "result.json").unlink()
    takes_over = TakesOver(tmp_path, at_step=0)
    with pytest.raises(Superseded):
        run_single(tiny, tmp_path, phase=lambda name: takes_over.poll(0) if name == "load" else None)
    assert not (tmp_path / "result.json").exists()


# --- objectives ---


class Imitate:
    """Predict what a frozen reference model finds most likely, whatever the text says."""

    name = "imitate"

    def __init__(self, config: TrainConfig) -> None:
        self.reference = build_model(config.model, seed=99)

    @property
    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"reference": self.reference}

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        with torch.no_grad():
            predicted_BT = self.reference.logits(batch.tokens).argmax(-1)
        counts_BT = batch.targets != IGNORED
        return LossSum(model(batch.tokens, predicted_BT.where(counts_BT, IGNORED)), counts_BT.sum())


def test_another_objective_trains_in_the_same_loop_and_resumes_to_the_same_weights(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    pretrained = run_single(tiny, tmp_path / "pretrained")
    whole = run_single(tiny, tmp_path / "whole", objective=Imitate(tiny))
    run_single(tiny, tmp_path / "resumed", objective=Imitate(tiny), stop_after=3)
    resumed = run_single(tiny, tmp_path / "resumed", objective=Imitate(tiny))
    assert resumed == whole
    assert whole.weights_sha256 != pretrained.weights_sha256


def test_frozen_modules_are_neither_trained_nor_saved(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, saved_tensors: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    objective = Imitate(tiny)
    run_single(tiny, tmp_path / "other", objective=objective)
    reference = objective.reference
    assert parameters_sha256(dict(reference.named_parameters())) == parameters_sha256(
        dict(build_model(tiny.model, seed=99).named_parameters())
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reference.parameters())
    run_single(tiny, tmp_path / "pretrained")
    assert saved_tensors(tmp_path / "other").keys() == saved_tensors(tmp_path / "pretrained").keys()


def test_a_checkpoint_of_another_objective_is_refused(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    run_single(tiny, tmp_path, stop_after=2)
    with pytest.raises(UserError, match="objective was pretrain and is imitate"):
        run_single(tiny, tmp_path, objective=Imitate(tiny))


# --- what metrics are made of ---


def test_the_rate_is_of_the_newest_steps() -> None:
    rate = Rate()
    assert rate.tokens_per_second() is None
    rate.add(1000, 100.0)
    for _ in range(20):
        rate.add(100, 0.5)
    assert rate.tokens_per_second() == pytest.approx(200.0)


def test_flops_are_those_of_the_plan() -> None:
    shape = ModelConfig(vocab_size=100, sequence_length=8, num_layers=3, width=16, num_heads=4, num_kv_heads=2)
    planned = Workload.from_shape(
        num_tokens=1,
        num_layers=3,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        hidden_size=shape.hidden_size,
        vocab_size=100,
        sequence_length=8,
        global_batch_size=4,
    )
    assert flops_per_token(shape) == planned.flops_per_token
    # By hand: 6 FLOPs per weight of 3 layers (2x16x16 + 2x16x8 + 3x16x384) and the head (100x16), and
    # 12 x 3 layers x 16 x 4 keys on average for attention.
    assert flops_per_token(shape) == 6 * (3 * (512 + 256 + 18432) + 1600) + 12 * 3 * 16 * 4


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), TrainConfig()) is None


def test_precision_is_named_as_fabric_names_it() -> None:
    assert fabric_precision(TrainConfig(precision="bf16")) == "bf16-mixed"
    assert fabric_precision(TrainConfig(precision="fp32")) == "32-true"


class Leaving:
    """Holds checkpoints back from the second step on, and leaves after the fifth."""

    def poll(self, step: int) -> Signal:
        return Signal(hold=step >= 1, stop=step >= 4)


def test_on_the_way_out_no_checkpoint_is_begun_but_the_last(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    result = run_single(changed(tiny, checkpoint_every_steps=1), tmp_path, signals=Leaving())
    assert (result.outcome, result.step) == ("stopped", 5)
    assert [place.step for place in checkpoints_of_chain(DirectoryStore(tmp_path))] == [5, 1]


def test_compilation_is_a_phase_of_its_own_and_changes_nothing(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and guarded as always; the code behind it is torch's own, which takes seconds instead of minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    phases: list[str] = []
    config = replace(tiny, num_steps=2)
    compiled = run_single(changed(config, compile=True), tmp_path / "compiled", phase=phases.append)
    assert phases == ["data", "model", "load", "compile", "first_step"]
    assert compiled == run_single(config, tmp_path / "plain")

"""Interrupted anywhere, a run ends with the weights of one that never was."""

from __future__ import annotations

import itertools
import json
import logging
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cost.errors import SlmError, UserError
from tests.support.configs import changed
from trainer.checkpoints.lineage import Manifest, checkpoints_of_chain
from trainer.checkpoints.manager import Identity
from trainer.config import TrainConfig
from trainer.loop import Result, Signal
from trainer.run_store.base import Bytes, DirectoryStore, StoreError
from trainer.run_store.keys import MANIFEST

RunSingle = Callable[..., Result]


@pytest.mark.parametrize(
    ("name", "precision", "micro_batch_size"),
    list(itertools.product(["muon", "adamw"], ["fp32", "bf16"], [3, 8])),
)
def test_resumed_at_any_step_a_run_ends_with_bitwise_the_same_weights_and_losses(
    tiny: TrainConfig,
    run_single: RunSingle,
    tmp_path: Path,
    with_optimizer: Callable[..., TrainConfig],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
    name: str,
    precision: str,
    micro_batch_size: int,
) -> None:
    config = with_optimizer(changed(tiny, precision=precision, micro_batch_size=micro_batch_size), name=name)
    whole = run_single(config, tmp_path / "whole")
    curve = [(row["loss"], row["gradient_norm"]) for row in metrics_of(tmp_path / "whole")]
    for stop in range(1, config.num_steps):
        folder = tmp_path / f"stopped{stop}"
        assert run_single(config, folder, stop_after=stop).outcome == "stopped"
        torch.manual_seed(stop)  # nothing of this process may matter
        assert run_single(config, folder) == whole
        assert [(row["loss"], row["gradient_norm"]) for row in metrics_of(folder)] == curve


def test_resumed_at_every_step_in_turn_it_is_still_the_same(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    whole = run_single(tiny, tmp_path / "whole")
    for stop in range(1, tiny.num_steps + 1):
        result = run_single(tiny, tmp_path / "parts", stop_after=stop)
    assert result == whole
    incarnation = json.loads((tmp_path / "parts" / "incarnations" / "5.json").read_text())
    assert incarnation["parent"] == {"incarnation": 4, "step": 5}


def test_other_data_or_another_seed_ends_elsewhere(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    item = run_single(tiny, tmp_path / "one")
    assert run_single(replace(tiny, seed=6), tmp_path / "two").weights_sha256 != item.weights_sha256


def test_the_random_state_goes_on_where_it_was(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    class Draws:
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def poll(self, step: int) -> Signal:
            self.drawn.append(float(torch.rand(())))
            return Signal()

    whole, first, second = Draws(), Draws(), Draws()
    run_single(tiny, tmp_path / "whole", signals=whole)
    run_single(tiny, tmp_path / "parts", signals=first, stop_after=3)
    run_single(tiny, tmp_path / "parts", signals=second)
    assert first.drawn + second.drawn == whole.drawn
    assert len(set(whole.drawn)) == 6


def shallow(config: TrainConfig) -> TrainConfig:
    """As quick as it can be."""
    optimizer = replace(config.optimizer, name="adamw")
    return changed(config, model=replace(config.model, num_layers=1), optimizer=optimizer, micro_batch_size=8)


class Killed(BaseException):
    """Stands for a death: nothing after it runs, and nobody catches it."""


class DiesAtCall(DirectoryStore):
    """Dies before or after its n-th change of the store."""

    def __init__(self, root: Path, call: int, *, after: bool) -> None:
        super().__init__(root)
        self.call, self.after, self.count = call, after, 0
        self.lock = threading.Lock()  # the loop and the save in flight both change the store

    def _die_at(self, change: Callable[[], Any]) -> Any:
        with self.lock:
            self.count += 1
            if self.count > self.call or (self.count == self.call and not self.after):
                raise Killed
            result = change()
            if self.count == self.call:
                raise Killed
            return result

    def write(self, key: str, data: bytes) -> None:
        self._die_at(lambda: super(DiesAtCall, self).write(key, data))

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._die_at(lambda: super(DiesAtCall, self).create(key, data)))

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        self._die_at(lambda: super(DiesAtCall, self).write_pieces(key, pieces))

    def delete(self, key: str) -> None:
        self._die_at(lambda: super(DiesAtCall, self).delete(key))


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_change_of_the_store_a_run_loses_at_most_the_steps_since_its_last_save(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, after: bool
) -> None:
    config = changed(shallow(tiny), num_steps=4, checkpoint_every_steps=1, keep_last=2)
    whole = run_single(config, tmp_path / "whole")
    for call in itertools.count(1):
        folder = tmp_path / f"killed{call}"
        store = DiesAtCall(folder, call, after=after)
        try:
            assert run_single(config, store) == whole
            break
        except Killed:
            pass
        polled: list[int] = []

        class Counts:
            def poll(self, step: int, polled: list[int] = polled) -> Signal:
                polled.append(step)
                return Signal()

        saved = checkpoints_of_chain(DirectoryStore(folder))
        assert run_single(config, DirectoryStore(folder), signals=Counts()) == whole
        assert polled == list(range(saved[0].step if saved else 0, 4))
    assert call > 20  # four saves of a part, a manifest and its name, progress, pruning


def test_a_process_killed_for_real_at_random_moments_ends_with_the_same_weights(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, data_dir: Path
) -> None:
    config = changed(shallow(tiny), num_steps=150, checkpoint_every_steps=3, eval_every_steps=1000)
    whole = run_single(config, tmp_path / "whole")
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from lightning.fabric import Fabric
        from trainer.config import *
        from trainer.loop import Signal, train
        from trainer.run_store.base import DirectoryStore
        class Quiet:
            def poll(self, step): return Signal()
        config = eval(sys.argv[1])
        fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
        store = DirectoryStore(Path(sys.argv[2]))
        train(config, fabric=fabric, data_dir=Path(sys.argv[3]), store=store, lease_id="l", signals=Quiet(),
              phase=lambda name: print(name, flush=True))
    """)
    folder = tmp_path / "killed"
    rng = random.Random(3)
    for _ in range(4):
        command = [sys.executable, "-c", script, repr(config), str(folder), str(data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            assert any(line == "first_step\n" for line in process.stdout)
            time.sleep(rng.uniform(0.0, 0.5))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
            process.stdout.close()
    assert checkpoints_of_chain(DirectoryStore(folder))[0].step > 0
    assert run_single(config, folder) == whole


# --- damage ---


def damaged_run(run_single: RunSingle, config: TrainConfig, folder: Path) -> tuple[DirectoryStore, list[str]]:
    """A run stopped at step 4 with checkpoints at 2 and 4; the keys of the newest."""
    run_single(changed(config, checkpoint_every_steps=2), folder, stop_after=4)
    store = DirectoryStore(folder)
    return store, store.list("checkpoints/incarnation=0/step=4/")


def truncate(store: DirectoryStore, key: str) -> None:
    store.write(key, store.read(key)[:-1])


def flip(store: DirectoryStore, key: str) -> None:
    content = bytearray(store.read(key))
    content[len(content) // 2] ^= 1
    store.write(key, bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, DirectoryStore.delete])
@pytest.mark.parametrize("part", ["part-00000.bin", MANIFEST])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    tiny: TrainConfig,
    run_single: RunSingle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[DirectoryStore, str], None],
    part: str,
) -> None:
    whole = run_single(tiny, tmp_path / "whole")
    store, keys = damaged_run(run_single, tiny, tmp_path / "damaged")
    damage(store, next(key for key in keys if key.endswith(part)))
    with caplog.at_level(logging.WARNING):
        assert run_single(tiny, store) == whole
    incarnation = json.loads(store.read("incarnations/1.json"))
    assert incarnation["parent"] == {"incarnation": 0, "step": 2}
    if part == MANIFEST and damage is DirectoryStore.delete:
        assert incarnation["skipped"] == []  # never was a checkpoint
    else:
        assert [said.split(":")[0] for said in incarnation["skipped"]] == ["step 4 of incarnation 0"]
        assert "the checkpoint at step 4 of incarnation 0 is damaged" in caplog.text
        assert "trying the one before" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    store, _ = damaged_run(run_single, tiny, tmp_path)
    for key in store.list("checkpoints/"):
        if key.endswith("bin"):
            store.delete(key)
    message = (
        r"no checkpoint of this run in file://\S+ is whole \(step 4 of incarnation 0: part part-00000.bin is missing; "
        r"step 2 of incarnation 0: part part-00000.bin is missing\); bring the files back, or delete checkpoints/"
    )
    with pytest.raises(SlmError, match=message):
        run_single(tiny, store)
    assert store.list("incarnations/") == ["incarnations/0.json"]


def test_what_a_zombie_saved_after_it_was_superseded_is_not_resumed_from(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    whole = run_single(tiny, tmp_path / "whole")
    run_single(tiny, tmp_path / "run", stop_after=2)
    run_single(tiny, tmp_path / "run", stop_after=3)
    store = DirectoryStore(tmp_path / "run")
    for key in store.list("checkpoints/incarnation=1/step=3/"):  # incarnation 0 saves step 5, which holds other weights
        content = store.read(key)
        if key.endswith(MANIFEST):
            content = replace(Manifest.from_bytes(content), incarnation=0, step=5).to_bytes()
        store.write(key.replace("incarnation=1/step=3", "incarnation=0/step=5"), content)
    assert run_single(tiny, store) == whole
    assert json.loads(store.read("incarnations/2.json"))["parent"] == {"incarnation": 1, "step": 3}


class LosesOneRace(DirectoryStore):
    """Another group of workers takes the number that this one asks for first."""

    lost = False

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith("incarnations/") and not self.lost:
            self.lost = True
            other = {**json.loads(data), "lease_id": "other"}
            assert super().create(key, json.dumps(other).encode())
        return super().create(key, data)


def test_a_group_that_loses_the_race_for_an_incarnation_takes_the_next(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    whole = run_single(tiny, tmp_path / "whole")
    run_single(tiny, tmp_path / "run", stop_after=2)
    store = LosesOneRace(tmp_path / "run")
    assert run_single(tiny, store) == whole
    incarnations = [json.loads(store.read(f"incarnations/{number}.json")) for number in range(3)]
    assert [incarnation["lease_id"] for incarnation in incarnations] == ["lease-0", "other", "lease-0"]
    assert [incarnation["parent"] for incarnation in incarnations[1:]] == [{"incarnation": 0, "step": 2}] * 2


# --- another run, a full disk ---


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, with_optimizer: Callable[..., TrainConfig]
) -> None:
    run_single(tiny, tmp_path, stop_after=2)
    other = with_optimizer(changed(tiny, seed=6, micro_batch_size=8), learning_rate=0.02)
    message = (
        "the checkpoint is of another run: optimizer.learning_rate was 0.01 and is 0.02; seed was 5 and is 6. "
        "Set that back, or start a new run"
    )
    with pytest.raises(UserError, match=message):
        run_single(other, tmp_path)


def test_a_checkpoint_of_the_version_before_the_groups_is_still_of_the_same_run(tiny: TrainConfig) -> None:
    """Digest and flat fields as that version wrote them for TINY; two fields that may change are others."""
    flat = {"global_batch_size": 8, "micro_batch_size": 1, "max_documents": None, "fp8": False, "keep_last": 9}
    named = {"model": asdict(tiny.model), "optimizer": asdict(tiny.optimizer)}
    old = {
        "config": {**json.loads(json.dumps(named)), "num_steps": 6, "precision": "fp32", "seed": 5, **flat},
        "config_digest": "eb5e1490b12830ad1a30f4365330eae9c623ac298104d4e6c7e0d9da880633cd",
        "tokenizer_sha256": "t",
        "data_fingerprint": "f",
    }
    Identity(tiny, "t", "f").require_same(old)
    message = "of another run: global_batch_size was 8 and is 4; optimizer.learning_rate was 0.01 and is 0.5. Set that"
    with pytest.raises(UserError, match=message):
        optimizer = replace(tiny.optimizer, learning_rate=0.5)
        Identity(changed(tiny, global_batch_size=4, optimizer=optimizer), "t", "f").require_same(old)


def test_a_checkpoint_on_other_data_is_refused(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path, make_data: Callable[..., Path]
) -> None:
    run_single(tiny, tmp_path / "store", stop_after=2)
    data = make_data(tmp_path / "data", {"text": (1.0, [500])})
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps({**index, "tokenizer_sha256": "u" * 64}))
    with pytest.raises(UserError, match=r"tokenizer_sha256 was t{64} and is u{64}"):
        run_single(tiny, tmp_path / "store", data_dir=data)


def test_micro_batch_threads_and_intervals_may_change_between_two_parts_of_a_run(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    run_single(tiny, tmp_path, stop_after=2)
    other = changed(tiny, micro_batch_size=8, keep_last=5, eval_every_steps=3, checkpoint_interval_seconds=1.0)
    assert run_single(other, tmp_path).outcome == "finished"


def test_a_disk_full_at_the_store_is_said_and_the_older_checkpoint_is_intact(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    whole = run_single(tiny, tmp_path / "whole")
    run_single(tiny, tmp_path / "run", stop_after=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills:
        def poll(self, step: int) -> Signal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than the weights
            return Signal()

    message = (
        r"cannot write checkpoints/incarnation=1/step=4/part-00000.bin in the run store \S+/run: File too large; "
        "make it a folder that this user may write to"
    )
    try:
        with pytest.raises(StoreError, match=message):
            run_single(tiny, tmp_path / "run", stop_after=4, signals=Fills())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [tuple(place) for place in checkpoints_of_chain(DirectoryStore(tmp_path / "run"))] == [(0, 2)]
    assert run_single(tiny, tmp_path / "run") == whole


# --- saves in flight ---


class Gated(DirectoryStore):
    """Parts of a checkpoint are stored only once the gate is open."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        assert self.gate.wait(timeout=60)
        super().write_pieces(key, pieces)


def test_training_goes_on_while_a_checkpoint_is_stored_and_it_is_what_the_state_was(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    config = changed(tiny, checkpoint_interval_seconds=0.0)
    whole = run_single(tiny, tmp_path / "whole")
    store = Gated(tmp_path / "run")
    durable: list[int] = []

    class OpensLater:
        def poll(self, step: int) -> Signal:
            durable.append(len(checkpoints_of_chain(store)))
            if step == 3:
                store.gate.set()
            return Signal()

    run_single(config, store, signals=OpensLater(), stop_after=5)
    assert durable[:4] == [0, 0, 0, 0]  # steps 2 to 4 were made while the first was in flight
    places = checkpoints_of_chain(store)
    assert places[0].step == 5
    assert places[-1].step == 1
    for place in places[:-1]:
        for key in store.list(place.prefix):
            store.delete(key)
    assert run_single(tiny, DirectoryStore(store.root)) == whole
    assert json.loads(store.read("incarnations/1.json"))["parent"] == {"incarnation": 0, "step": 1}


def test_a_save_that_somebody_asked_for_is_stored_before_the_next_step(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path)
    seen: dict[int, list[int]] = {}

    class Notice:
        def poll(self, step: int) -> Signal:
            seen[step] = [place.step for place in checkpoints_of_chain(store)]
            return Signal(checkpoint=step == 1)

    run_single(tiny, store, signals=Notice(), stop_after=4)
    assert (seen[1], seen[2]) == ([], [2])


def test_what_fails_in_the_background_is_raised_at_a_following_step(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    class Refuses(DirectoryStore):
        refused = threading.Event()

        def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
            self.refused.set()
            raise StoreError("no room for a part")

    store = Refuses(tmp_path)
    polled: list[int] = []

    class WaitsForIt:
        def poll(self, step: int) -> Signal:
            polled.append(step)
            if step == 1:
                assert store.refused.wait(timeout=60)
                for thread in threading.enumerate():
                    if thread.name.startswith("save-"):
                        thread.join(timeout=60)
            return Signal()

    with pytest.raises(StoreError, match="no room for a part"):
        run_single(changed(tiny, checkpoint_interval_seconds=0.0), store, signals=WaitsForIt())
    assert polled == [0, 1]
    assert checkpoints_of_chain(store) == []


def test_milestones_are_kept_beside_the_newest(tiny: TrainConfig, run_single: RunSingle, tmp_path: Path) -> None:
    run_single(changed(tiny, checkpoint_every_steps=1, keep_last=2, milestone_every_steps=3), tmp_path)
    assert [place.step for place in checkpoints_of_chain(DirectoryStore(tmp_path))] == [6, 5, 3]


def test_the_interval_follows_what_saves_are_measured_to_cost(
    tiny: TrainConfig, run_single: RunSingle, tmp_path: Path
) -> None:
    config = changed(
        tiny, checkpoint_interval_seconds=0.0, losses_per_worker_hour=1e-9, num_steps=40, eval_every_steps=100
    )
    run_single(config, tmp_path)
    progress = json.loads((tmp_path / "progress" / "latest.json").read_text())
    # Saves cost milliseconds and losses come every 100,000 years: after those of the plan's interval, only the last.
    assert progress["checkpoint_interval_seconds"] == 900
    assert progress["checkpoint_step"] == 40
    assert 0 < progress["checkpoint_stall_seconds"] <= progress["checkpoint_save_seconds"] + 1

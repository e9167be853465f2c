"""Checkpoints on every kind of store: fencing, and processes that are killed while they save."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.stores.s3 import S3Store
from tests.support.s3_server import BUCKET, CREDENTIALS, s3_server
from trainer.checkpoints.lineage import Manifest, Place, Superseded, checkpoints_of_chain, read_manifest
from trainer.checkpoints.manager import Checkpoints, Counters, Identity
from trainer.checkpoints.parts import write_part
from trainer.config import TrainConfig
from trainer.run_store.base import DirectoryStore, Store
from trainer.run_store.keys import MANIFEST

ROOT = Path(__file__).resolve().parents[3]
IDENTITY = Identity(TrainConfig(), "tokenizer", "data")
NAMES = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["directory", "s3"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Each call is another process's view of the same store."""
    if request.param == "directory":
        return lambda: DirectoryStore(tmp_path / "store")
    url, prefix = request.getfixturevalue("server"), f"run-{next(NAMES)}"
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return lambda: S3Store(BUCKET, prefix, endpoint_url=url)


def state(value: float) -> dict[str, Tensor]:
    return {"model/w": torch.full((1000,), value)}


def group(store: Store, tensors: dict[str, Tensor]) -> tuple[Checkpoints, Counters]:
    made = Checkpoints(store, rank=0, world_size=1, keep_last=2)
    return made, made.begin(tensors, IDENTITY, "lease")


def test_a_zombie_can_save_nothing_once_a_newer_group_has_begun(opened: Callable[[], Store]) -> None:
    zombie, _ = group(opened(), state(0.0))
    zombie.save(state(1.0), IDENTITY, Counters(step=1))
    tensors = state(0.0)
    newer, counters = group(opened(), tensors)
    assert (counters.step, float(tensors["model/w"][0])) == (1, 1.0)
    zombie.save(state(-2.0), IDENTITY, Counters(step=2), durable=False)
    with pytest.raises(Superseded, match="incarnation 0 of this run was superseded by incarnation 1"):
        zombie.wait()
    assert Place(0, 2).prefix + MANIFEST not in opened().list("checkpoints/")
    newer.save(state(2.0), IDENTITY, Counters(step=2))
    assert checkpoints_of_chain(opened()) == [Place(1, 2), Place(0, 1)]


def test_what_a_zombie_was_already_writing_is_ignored(opened: Callable[[], Store]) -> None:
    old, _ = group(opened(), state(0.0))
    old.save(state(1.0), IDENTITY, Counters(step=1))
    group(opened(), state(0.0))
    store, late = opened(), Place(0, 2)  # it had looked for a newer incarnation just before there was one
    part = write_part(store, late.prefix, "part-00000.bin", bytes(4000))
    manifest = replace(read_manifest(store, Place(0, 1)), step=2, parts=(part,))
    store.write(late.prefix + MANIFEST, manifest.to_bytes())
    store.write("checkpoints/incarnation=0/newest.json", json.dumps({"step": 2}).encode())
    tensors = state(0.0)
    _, counters = group(opened(), tensors)
    assert (counters.step, float(tensors["model/w"][0])) == (1, 1.0)
    assert json.loads(store.read("incarnations/2.json"))["parent"] == {"incarnation": 0, "step": 1}


def test_two_groups_that_begin_at_once_get_two_incarnations(opened: Callable[[], Store]) -> None:
    groups = [group(opened(), state(0.0))[0] for _ in range(3)]
    assert [each.incarnation for each in groups] == [0, 1, 2]


def test_a_damaged_part_is_passed_over_for_the_one_before(opened: Callable[[], Store]) -> None:
    saving, _ = group(opened(), state(0.0))
    for step in (1, 2):
        saving.save(state(float(step)), IDENTITY, Counters(step=step))
    store = opened()
    key = f"{Place(0, 2).prefix}part-00000.bin"
    store.write(key, store.read(key)[:-8])
    tensors = state(0.0)
    _, counters = group(opened(), tensors)
    assert (counters.step, float(tensors["model/w"][0])) == (1, 1.0)
    (said,) = json.loads(store.read("incarnations/1.json"))["skipped"]
    assert said.startswith("step 2 of incarnation 0: part part-00000.bin has ")


def test_a_manifest_says_what_a_reader_wants_to_know(opened: Callable[[], Store]) -> None:
    saving, _ = group(opened(), state(0.0))
    saving.save(state(1.0), IDENTITY, Counters(step=3, tokens=12_288))
    facts = Manifest.from_bytes(opened().read(Place(0, 3).prefix + MANIFEST)).facts
    assert facts["schedule"] == {"step": 3, "num_steps": TrainConfig().num_steps}
    assert facts["sample_position"] == 3 * TrainConfig().batch.global_batch_size
    assert facts["counters"]["tokens"] == 12_288
    assert (facts["tokenizer_sha256"], facts["data_fingerprint"]) == ("tokenizer", "data")
    assert facts["config"]["seed"] == TrainConfig().seed


def bench(name: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def test_processes_killed_while_they_save_lose_no_checkpoint() -> None:
    report = bench("prove_store_kills", "--kills", "10", "--seed", "1")
    assert (report["kills"], report["lost"]) == (10, 0)


def test_training_killed_anywhere_and_resumed_is_bitwise_the_same() -> None:
    report = bench("prove_resume", "--kills", "8", "--seed", "1")
    assert report["bitwise_the_same"]
    assert report["kills"] == 8

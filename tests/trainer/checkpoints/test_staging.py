"""Tensors to bytes and back in one process; several are in test_trainer_group."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.checkpoints.lineage import Damaged, Manifest, Place
from trainer.checkpoints.parts import write_part
from trainer.checkpoints.staging import Staging, empty_tensors, read_into
from trainer.run_store.base import DirectoryStore

PLACE = Place(0, 1)


class CountsReads(DirectoryStore):
    num_bytes = 0

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        content = super().read_range(key, offset, num_bytes)
        self.num_bytes += len(content)
        return content


def state() -> dict[str, Tensor]:
    return {
        "model/a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "model/empty": torch.empty(0, 5),
        "model/half": torch.arange(5, dtype=torch.bfloat16),
        "optimizer/a/step": torch.tensor(7.0),
        "random/cpu/0": torch.arange(11, dtype=torch.uint8),
    }


@pytest.fixture
def store(tmp_path: Path) -> CountsReads:
    return CountsReads(tmp_path)


def saved(store: DirectoryStore, tensors: dict[str, Tensor]) -> Manifest:
    staging = Staging(tensors, 0, lambda plan: [plan])
    staging.fill(tensors)
    part = write_part(store, PLACE.prefix, "part-00000.bin", staging.content())
    return Manifest(0, 1, 1, (part,), staging.tensors, {})


def test_every_kind_of_tensor_comes_back(store: CountsReads) -> None:
    manifest = Manifest.from_bytes(saved(store, state()).to_bytes())
    found = empty_tensors(manifest)
    read_into(found, manifest, store, PLACE)
    assert found.keys() == state().keys()
    for name, value in state().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert empty_tensors(manifest, "random/").keys() == {"random/cpu/0"}


def test_a_buffer_that_is_filled_again_holds_the_newest_state_and_no_more_memory(store: CountsReads) -> None:
    tensors = state()
    staging = Staging(tensors, 0, lambda plan: [plan])
    where = staging.buffer.data_ptr()
    staging.fill(tensors)
    tensors["model/a"] += 1.0
    tensors["optimizer/a/step"] = torch.tensor(8.0)  # another tensor of the same name
    first = bytes(staging.content())
    staging.fill(tensors)
    assert staging.buffer.data_ptr() == where
    assert bytes(staging.content()) != first
    part = write_part(store, PLACE.prefix, "part-00000.bin", staging.content())
    found = {"model/a": torch.empty(3, 4), "optimizer/a/step": torch.empty(())}
    read_into(found, Manifest(0, 1, 1, (part,), staging.tensors, {}), store, PLACE)
    assert float(found["optimizer/a/step"]) == 8.0
    assert torch.equal(found["model/a"], state()["model/a"] + 1.0)


def test_positions_are_aligned_and_do_not_overlap(store: CountsReads) -> None:
    spans = []
    for where in saved(store, state()).tensors.values():
        item = getattr(torch, where["dtype"]).itemsize
        for chunk in where["chunks"]:
            assert chunk["at"] % 64 == 0
            spans.append((chunk["at"], chunk["at"] + torch.Size(chunk["sizes"]).numel() * item))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_no_more_is_read_than_is_needed(store: CountsReads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoints.parts.BLOCK_BYTES", 1024)
    monkeypatch.setattr("trainer.checkpoints.staging.RUN_BYTES", 4096)
    tensors = {f"t/{number}": torch.full((1000,), float(number)) for number in range(50)}
    manifest = saved(store, tensors)
    found = {"t/7": torch.empty(1000)}
    read_into(found, manifest, store, PLACE)
    assert torch.equal(found["t/7"], tensors["t/7"])
    assert 4000 <= store.num_bytes <= 4000 + 2 * 1024
    store.num_bytes = 0
    everything = empty_tensors(manifest)
    read_into(everything, manifest, store, PLACE)
    assert all(torch.equal(everything[name], tensors[name]) for name in tensors)
    assert store.num_bytes < 1.6 * 50 * 4000


def test_a_tensor_that_was_not_saved_is_damage(store: CountsReads) -> None:
    manifest = saved(store, state())
    with pytest.raises(Damaged, match="1 tensors are not in it, the first being model/new"):
        read_into({"model/new": torch.empty(3)}, manifest, store, PLACE)


def test_an_unknown_type_is_damage(store: CountsReads) -> None:
    manifest = saved(store, {"a": torch.zeros(3)})
    manifest.tensors["a"]["dtype"] = "nn"
    with pytest.raises(Damaged, match="nn is no type of a tensor"):
        empty_tensors(manifest)

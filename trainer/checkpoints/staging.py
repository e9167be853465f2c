"""Tensors to bytes and back: each rank's share of a state in one buffer, and any rank's share out of saved parts.

`torch.distributed.checkpoint` plans: which rank writes which piece of which tensor (ranks that hold the same tensor
share the work), and which saved pieces a rank needs, at any world size and layout. The bytes are ours: a part is the
buffer as it is, so that staging is one copy, nothing is serialised, and a reader can go straight to what it needs.
Invariant: positions depend on shapes alone, so that every rank knows the layout of all parts without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from trainer.checkpoints.lineage import Damaged, Manifest, Place
from trainer.checkpoints.parts import read_span
from trainer.run_store.base import Store

ALIGNMENT_BYTES = 64
RUN_BYTES = 256 * 2**20
"""Read in one go; bounds the memory that loading needs beside the tensors."""


@dataclass(frozen=True)
class Slot:
    """Where one piece of a tensor lies in this rank's buffer."""

    name: str
    target: Tensor


class Staging:
    """This rank's share of a state, in one buffer that every save uses again.

    Built on all ranks together; `gather` returns what each rank gave. States must keep their names and shapes.
    """

    def __init__(self, state: Mapping[str, Tensor], rank: int, gather: Callable[[Any], list[Any]]) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(state), is_coordinator=rank == 0)
        plans, _ = planner.create_global_plan(gather(planner.create_local_plan()))
        self.tensors = layout(plans)
        mine = [(name, chunk) for name, where in self.tensors.items() for chunk in where["chunks"]]
        mine = [(name, chunk) for name, chunk in mine if chunk["part"] == rank]
        ends = [chunk["at"] + _num_bytes(chunk["sizes"], self._dtype(name)) for name, chunk in mine]
        self.buffer = torch.empty(max(ends, default=0), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._slots = [Slot(name, self._view(chunk, self._dtype(name))) for name, chunk in mine]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy this rank's share into the buffer; on return the tensors may change again. This is the stall."""
        for slot in self._slots:
            slot.target.copy_(local_tensor(state[slot.name]), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def content(self) -> memoryview:
        """The buffer's bytes themselves."""
        return self.buffer.numpy().data

    def _dtype(self, name: str) -> torch.dtype:
        return dtype_named(self.tensors[name]["dtype"])

    def _view(self, chunk: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        num_bytes = _num_bytes(chunk["sizes"], dtype)
        return self.buffer[chunk["at"] : chunk["at"] + num_bytes].view(dtype).view(chunk["sizes"])


def layout(plans: list[SavePlan]) -> dict[str, dict[str, Any]]:
    """For each tensor its type, its size and where its pieces lie: plain JSON, part n being rank n's."""
    tensors: dict[str, dict[str, Any]] = {}
    for part, plan in enumerate(plans):
        position = 0
        for item in plan.items:
            data = item.tensor_data
            assert data is not None, f"{item.index.fqn} is no tensor"
            dtype, sizes = data.properties.dtype, list(data.chunk.sizes)
            name = str(dtype).removeprefix("torch.")
            where = tensors.setdefault(item.index.fqn, {"dtype": name, "size": list(data.size), "chunks": []})
            if num_bytes := _num_bytes(sizes, dtype):
                chunk = {"offsets": list(data.chunk.offsets), "sizes": sizes, "part": part, "at": position}
                where["chunks"].append(chunk)
                position = -(-(position + num_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tensors


@dataclass(frozen=True)
class Wanted:
    """Rows of one saved piece: bytes `begin` to `end` of a part. What is `narrowed` out of them goes to `target`."""

    part: int
    begin: int
    end: int
    dtype: torch.dtype
    rows: list[int]
    narrowed: list[tuple[int, int]]
    target: Tensor

    def put(self, content: memoryview) -> None:
        """`content` is the bytes of the rows."""
        source = torch.frombuffer(bytearray(content), dtype=self.dtype).view(self.rows)
        for dimension, (offset, length) in enumerate(self.narrowed):
            source = source.narrow(dimension, offset, length)
        self.target.copy_(source)


def read_into(tensors: Mapping[str, Tensor], manifest: Manifest, store: Store, place: Place) -> int:
    """Fill `tensors` with what was saved under their names, reading no more than they need; the bytes that were read.

    Raises Damaged when a byte of that is not as it was saved, or a tensor is not in the checkpoint.
    """
    num_bytes = 0
    for run in _runs(_wanted(tensors, manifest)):
        begin, end = run[0].begin, max(item.end for item in run)
        content = read_span(store, place.prefix, manifest.parts[run[0].part], begin, end)
        for item in run:
            item.put(content[item.begin - begin : item.end - begin])
        num_bytes += end - begin
    return num_bytes


def empty_tensors(manifest: Manifest, prefix: str = "") -> dict[str, Tensor]:
    """Memory for every saved tensor whose name begins with `prefix`, whole."""
    return {
        name: torch.empty(where["size"], dtype=dtype_named(where["dtype"]))
        for name, where in manifest.tensors.items()
        if name.startswith(prefix)
    }


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def dtype_named(name: str) -> torch.dtype:
    """float32 as torch.float32."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Damaged(f"{name} is no type of a tensor")
    return dtype


def _wanted(tensors: Mapping[str, Tensor], manifest: Manifest) -> list[Wanted]:
    missing = sorted(tensors.keys() - manifest.tensors.keys())
    if missing:
        raise Damaged(f"{len(missing)} tensors are not in it, the first being {missing[0]}")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    saved: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: _storage_metadata(manifest.tensors[name]) for name in tensors
    }
    planner.set_up_planner(dict(tensors), Metadata(saved), is_coordinator=False)
    pieces = {(name, tuple(chunk["offsets"])): chunk for name in tensors for chunk in manifest.tensors[name]["chunks"]}
    wanted = []
    for item in planner.create_local_plan().items:
        name = item.storage_index.fqn
        chunk = pieces[name, tuple(item.storage_index.offset or ())]
        dtype = dtype_named(manifest.tensors[name]["dtype"])
        offsets, lengths, rows = list(item.storage_offsets), list(item.lengths), list(chunk["sizes"])
        begin = chunk["at"]
        if rows:  # only the rows that are needed, each of them whole
            begin += offsets[0] * _num_bytes(rows[1:], dtype)
            rows[0], offsets[0] = lengths[0], 0
        target = planner.resolve_tensor(item).detach()
        end = begin + _num_bytes(rows, dtype)
        narrowed = list(zip(offsets, lengths, strict=True))
        if end > begin:
            wanted.append(Wanted(chunk["part"], begin, end, dtype, rows, narrowed, target))
    return sorted(wanted, key=lambda name: (name.part, name.begin))


def _runs(wanted: list[Wanted]) -> Iterator[list[Wanted]]:
    """Neighbours in one part, to be read together."""
    run: list[Wanted] = []
    for name in wanted:
        if run and (name.part != run[0].part or name.begin - run[-1].end > RUN_BYTES / 64 or _length(run) > RUN_BYTES):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _length(run: list[Wanted]) -> int:
    return run[-1].end - run[0].begin


def _storage_metadata(where: Mapping[str, Any]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(item["offsets"]), torch.Size(item["sizes"])) for item in where["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype=dtype_named(where["dtype"])), torch.Size(where["size"]), chunks)


def _num_bytes(sizes: list[int], dtype: torch.dtype) -> int:
    return math.prod(sizes) * dtype.itemsize

"""Tensors that processes hold parts of, as safetensors of each and an index in JSON: storage for torch's checkpoints.

torch.distributed.checkpoint says which process writes and reads which part; what it would pickle is JSON here.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, SavePlan, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainc.kernels.library.atomic import naming, sync
from trainc.runtime.storage.checkpoint import INDEX, PartFor
from trainc.runtime.storage.foreign_files import UnreadableFile, checksum, interpreting, read_json

Files = dict[str, dict[str, Any]]
"""The checksums of files, by name."""


@dataclass(frozen=True)
class _Part:
    """Where a part of a tensor is: in which file and under which name, with the checksum of the file."""

    file: str
    key: str
    checksum: Mapping[str, Any]


def write_shards(place: Path, tensors: Mapping[str, Tensor]) -> Files:
    """Write a process's parts of tensors; whole ones are written once. All processes call this with the same names.

    Returns the files with their checksums on rank 0, after all were written; an empty dict on the others.
    """
    writer = _Writer(place)
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    with _own_errors():
        save(dict(tensors), storage_writer=writer, planner=planner)
    return writer.files


def read_shards(place: Path, part_for: PartFor | None = None) -> dict[str, Tensor]:
    """Return the tensors of which a folder holds parts: whole on the CPU, or what `part_for` gives for them.

    Raises UnreadableFile where the index does not fit the files.
    """
    with interpreting(place / INDEX):
        reader = _Reader(place)
        tensors = {
            name: _target(name, tensor, part_for)
            for name, tensor in reader.metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        planner = DefaultLoadPlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False, allow_partial_load=False
        )
        with _own_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant
            load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    return tensors


def _target(name: str, found: TensorStorageMetadata, part_for: PartFor | None) -> Tensor:
    """Return the empty tensor that one of a checkpoint is loaded into."""
    dtype = found.properties.dtype
    if part_for is not None:
        keys = [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]
        part = part_for([one for key in keys for one in key.split("/")], found.size, dtype)
        if part is not None:
            return part
    return torch.empty(found.size, dtype=dtype)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what went wrong in a process in place of torch's CheckpointException, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class _Writer(StorageWriter):
    """Writes what one process writes into a file of its own, and the index on rank 0."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files: Files = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: it writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        joined = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        file = f"tensors-{rank:05d}-of-{size:05d}.safetensors"
        tensors, places = {}, []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(f"`{item.index.fqn}` is no tensor")
            tensor = planner.resolve_data(item).detach()
            at = "" if item.index.offset is None else f"@{','.join(map(str, item.index.offset))}"
            key = f"{item.index.fqn}{at}"
            # A copy of its own: safetensors takes neither strides nor memory that two tensors share.
            tensors[key] = tensor.to("cpu", copy=True).contiguous()
            places.append((item.index, key, tensor.nbytes))
        with naming(self.place / file):
            save_file(tensors, self.place / file)
            sync(self.place / file)
        found = checksum(self.place / file)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(i, n, _Part(file, key, found)) for i, key, n in places])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        every = [result for own in results for result in own]
        parts = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for r in every}
        index: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = []
            for chunk in tensor.chunks:
                offset = tuple(chunk.offsets)
                part = parts.get((name, offset)) or parts[name, ()]
                where = {"offset": list(offset), "shape": list(chunk.sizes)}
                chunks.append({**where, "file": part.file, "key": part.key})
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": chunks}
        self.files = {part.file: dict(part.checksum) for part in parts.values()}
        with naming(self.place / INDEX):
            (self.place / INDEX).write_text(json.dumps(index))
            sync(self.place / INDEX)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    """Reads the parts that an index names."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._parts: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
        found: dict[str, Any] = {
            name: self._tensor(name, one) for name, one in read_json(place / INDEX).items()
        }
        self.metadata = Metadata(state_dict_metadata=found)

    def _tensor(self, name: str, found: Any) -> TensorStorageMetadata:
        """Return what the index says of a tensor; raises UnreadableFile where its parts do not make it up."""
        dtype = getattr(torch, str(found["dtype"]))
        if not isinstance(dtype, torch.dtype):
            raise UnreadableFile(f"{self.place / INDEX} is damaged: {dtype!r} is no dtype")
        shape, chunks = torch.Size(found["shape"]), []
        for part in found["parts"]:
            if Path(part["file"]).name != part["file"]:
                raise UnreadableFile(f"{self.place / INDEX} is damaged: it leads elsewhere")
            offset = torch.Size(part["offset"])
            chunks.append(ChunkStorageMetadata(offset, torch.Size(part["shape"])))
            self._parts[name, tuple(offset)] = part
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise UnreadableFile(f"{self.place / INDEX} is damaged: parts of `{name}` are missing")
        return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: it reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the index was read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        wanted: dict[str, list[Any]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR
            wanted.setdefault(self._part(item.storage_index)["file"], []).append(item)
        for file, items in wanted.items():
            with interpreting(self.place / file), safe_open(self.place / file, "pt") as tensors:
                for item in items:
                    key = self._part(item.storage_index)["key"]
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    rows = tuple(slice(start, start + size) for start, size in ends)
                    part = tensors.get_slice(key)[rows] if rows else tensors.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, index: MetadataIndex) -> dict[str, Any]:
        return self._parts[index.fqn, tuple(index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

"""Norms of sharded parameters: FSDP2 makes their gradients DTensors, of which each process holds a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing DTensor."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, any other as it is; all processes of its mesh must call this."""
    given: Any = tensor
    return cast(Tensor, given.full_tensor()) if is_sharded(tensor) else tensor


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return |t|^2 of every tensor, (len(tensors),), in float64, equal on all processes that share a tensor.

    Each process squares its shards; one all-reduce for each axis of a mesh adds them up.
    """
    shards: list[Any] = [_reduced(tensor) for tensor in tensors]
    found = torch.stack([_square(p.to_local() if is_sharded(p) else p) for p in shards])
    for mesh in dict.fromkeys(p.device_mesh for p in shards if is_sharded(p)):
        for axis in range(mesh.ndim):
            _sum_over(mesh, axis, found, shards)
    return found


def _sum_over(mesh: DeviceMesh, axis: int, found: Tensor, shards: Sequence[Any]) -> None:
    """Add up in place the squares of tensors that are sharded along an axis of the mesh; replicated ones stay."""
    sharded = [
        i
        for i, p in enumerate(shards)
        if is_sharded(p) and p.device_mesh == mesh and not p.placements[axis].is_replicate()
    ]
    if sharded:
        index = torch.tensor(sharded, device=found.device)
        sums = found[index]
        dist.all_reduce(sums, group=mesh.get_group(axis))
        found[index] = sums


def _reduced(tensor: Tensor) -> Any:
    """Return a tensor with its pending sums reduced: |a + b|^2 is not |a|^2 + |b|^2."""
    given: Any = tensor
    if is_sharded(tensor) and any(place.is_partial() for place in given.placements):
        return given.full_tensor()
    return given


def _square(shard: Tensor) -> Tensor:
    dtype = torch.promote_types(shard.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(shard, dtype=dtype)
    return norm.double().square()

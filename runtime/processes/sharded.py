"""Norms of sharded parameters: FSDP2 makes their gradients DTensors, of which each process holds a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing DTensor."""
    return hasattr(tensor, "device_mesh")


def reshard(module: nn.Module) -> None:
    """Drop the whole weights that FSDP2 keeps after a pass without gradients: the next pass gathers those of now."""
    for part in module.modules():
        if callable(free := getattr(part, "reshard", None)) and hasattr(part, "unshard"):
            free()


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, any other as it is; all processes of its mesh must call this."""
    given: Any = tensor
    return cast(Tensor, given.full_tensor()) if is_sharded(tensor) else tensor


def whole(state: Any) -> Any:
    """Return a state with full tensors in place of DTensors; all processes of their meshes must call this alike."""
    if isinstance(state, Tensor):
        return full(state)
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return type(state)(map(whole, state)) if type(state) in (list, tuple) else state


def shard_state(state: Any, like: Tensor) -> Any:
    """Return what belongs to a parameter with its whole tensors of that shape sharded as the parameter is."""
    if isinstance(state, Tensor):
        return shard_like(state, like) if state.shape == like.shape else state
    if isinstance(state, dict):
        return {key: shard_state(value, like) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(shard_state(value, like) for value in state)
    return state


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a DTensor, any other tensor as it is."""
    given: Any = tensor
    return cast(Tensor, given.to_local()) if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as another of its shape is, or as it is where that is whole; nothing is sent."""
    given: Any = like
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.detach().to(given.device)
    return distribute_tensor(whole, given.device_mesh, given.placements, src_data_rank=None)


def held_rows(tensor: Tensor) -> tuple[Tensor, range] | None:
    """Return the rows that this process holds of a DTensor, and which of all they are; None where it has no rows apart.

    That is a DTensor that is sharded along its first axis, over a mesh of one axis, as FSDP2 does.
    """
    given: Any = tensor
    if not is_sharded(tensor) or given.device_mesh.ndim != 1:
        return None
    from torch.distributed.tensor import Shard

    if type(given.placements[0]) is not Shard or given.placements[0].dim != 0:
        return None
    mesh, rows = given.device_mesh, tensor.shape[0]
    each = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * each, rows)
    held = range(start, min(start + each, rows))
    return local(tensor), held


def sum_over_processes(found: Tensor, like: Tensor) -> None:
    """Add up in place what each process of a DTensor's mesh of one axis has."""
    given: Any = like
    dist.all_reduce(found, group=given.device_mesh.get_group())


def sum_over_shards(found: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add up in place rows that each process has of its shards of some tensors, (len(tensors), ...)."""
    shards: Sequence[Any] = tensors
    for mesh in dict.fromkeys(p.device_mesh for p in shards if is_sharded(p)):
        for axis in range(mesh.ndim):
            _sum_over(mesh, axis, found, shards)


def squared_norms(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return |t|^2 of every tensor, (len(tensors),), in float64, equal on all processes that share a tensor.

    Each process squares its shards, in `dtype` at least; one all-reduce for each axis of a mesh adds them up.
    """
    shards: list[Any] = [_reduced(tensor) for tensor in tensors]
    found = stacked([squared_norm(local(p), dtype) for p in shards])
    sum_over_shards(found, shards)
    return found


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of each pair, (len(left),), in float64, equal on all processes that share the tensors.

    Both tensors of a pair are sharded alike. One all-reduce for each axis of a mesh adds the products up.
    """
    pairs = zip(map(local, left), map(local, right), strict=True)
    found = stacked([(a.double() * b.double()).sum() for a, b in pairs])
    sum_over_shards(found, left)
    return found


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Return numbers as one tensor on the device of the first; of none an empty one."""
    if not numbers:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([number.to(numbers[0].device) for number in numbers])


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


def squared_norm(shard: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return |t|^2 of what this process holds, (), in float64; its norm is taken in `dtype` at least."""
    wide = torch.promote_types(shard.dtype, dtype)
    norm: Tensor = torch.linalg.vector_norm(shard, dtype=wide)
    return norm.double().square()

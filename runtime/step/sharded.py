"""Parameters that FSDP2 shards: their gradients are DTensors, of which every process holds a piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is spread over processes; asked this way, DTensor need not be imported."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, whose pieces every process of its mesh must then ask for."""
    given: Any = tensor
    return cast(Tensor, given.full_tensor()) if is_sharded(tensor) else tensor


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return |t|^2 of every tensor, (len(tensors),), in float64, equal on all processes that share one.

    Each process squares the pieces it holds; the sums travel together, once for each axis of a mesh.
    """
    pieces: list[Any] = [_settled(tensor) for tensor in tensors]
    found = torch.stack([_square(p.to_local() if is_sharded(p) else p) for p in pieces])
    for mesh in dict.fromkeys(p.device_mesh for p in pieces if is_sharded(p)):
        for axis in range(mesh.ndim):
            _sum_over(mesh, axis, found, pieces)
    return found


def _sum_over(mesh: DeviceMesh, axis: int, found: Tensor, pieces: Sequence[Any]) -> None:
    """Add up in place the squares of pieces that lie apart along an axis of the mesh; copies are left alone."""
    import torch.distributed as dist

    apart = [
        i
        for i, p in enumerate(pieces)
        if is_sharded(p) and p.device_mesh == mesh and not p.placements[axis].is_replicate()
    ]
    if apart:
        index = torch.tensor(apart, device=found.device)
        sums = found[index]
        dist.all_reduce(sums, group=mesh.get_group(axis))
        found[index] = sums


def _settled(tensor: Tensor) -> Any:
    """Return a tensor without pending sums: the square of a sum is no sum of squares."""
    given: Any = tensor
    if is_sharded(tensor) and any(place.is_partial() for place in given.placements):
        return given.full_tensor()
    return given


def _square(piece: Tensor) -> Tensor:
    wide = torch.promote_types(piece.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(piece, dtype=wide)
    return norm.double().square()

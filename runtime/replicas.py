"""Replicas: per-example statistics of a step that several processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from trainc.runtime.step import Contribution


def world_size() -> int:
    """Return how many processes train together; 1 without torch.distributed."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Return the contributions of all replicas, in the units of the averaged gradient.

    A replica's loss weights sum to 1 and its contributions to its own gradient; averaging over R replicas divides
    weights and contributions by R, and squared norms by R^2.
    """
    import torch.distributed as dist

    from trainc.runtime.step import Contribution

    replicas = world_size()
    gathered: list[Any] = [None] * replicas
    own = [
        (c.weights.cpu(), {name: s.cpu() for name, s in c.squares.items()}) for c in contributions
    ]
    dist.all_gather_object(gathered, own)
    return [
        Contribution(weights / replicas, {name: s / replicas**2 for name, s in squares.items()})
        for one in gathered
        for weights, squares in cast("list[Any]", one)
    ]

"""A projection that is fused of several: its parts, and their factors as those of one adapter, as peft has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("q", "k", "v")
"""The equal parts of a fused projection, in the order of its outputs."""


def fuse(tensors: dict[str, Tensor], prefix: str, parts: tuple[str, ...]) -> None:
    """Put the A and B of the parts of a layer, if it has parts, in one A and one B."""
    import torch

    if not parts:
        return
    a = [tensors.pop(f"{prefix}{part}.lora_A.weight") for part in parts]
    b = [tensors.pop(f"{prefix}{part}.lora_B.weight") for part in parts]
    whole = b[0].new_zeros(len(PARTS) * len(b[0]), sum(map(len, a)))
    for i, part in enumerate(parts):
        whole[_block(part, i, b[i].shape)] = b[i]
    tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"] = torch.cat(a), whole


def split(
    tensors: dict[str, Tensor], prefix: str, parts: tuple[str, ...], rank: int, folder: Path
) -> None:
    """Undo `fuse`; raises ValueError where B is not zero outside of the parts."""
    if not parts:
        return
    a, b = (tensors.pop(f"{prefix}lora_{letter}.weight", None) for letter in "AB")
    if a is None or b is None:
        return
    rest = b.clone()
    for i, part in enumerate(parts):
        block = _block(part, i, (len(b) // len(PARTS), rank))
        tensors[f"{prefix}{part}.lora_A.weight"] = a[i * rank : (i + 1) * rank]
        tensors[f"{prefix}{part}.lora_B.weight"] = b[block]
        rest[block] = 0
    if rest.any():
        raise ValueError(
            f"`{prefix}lora_B.weight` in {folder} also changes outputs outside of `parts`: remove `parts`, and write"
            " the rank and alpha of that file"
        )


def _block(part: str, index: int, shape: Sequence[int]) -> tuple[slice, slice]:
    """Return where the B (outputs, rank) of a part stands in the fused one: its outputs, and its ranks."""
    (size, rank), first = shape, PARTS.index(part)
    return slice(first * size, (first + 1) * size), slice(index * rank, (index + 1) * rank)

"""A projection that is fused of several: its parts, and their factors as those of one adapter, as peft has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.structure.weights import UsedWeight

PARTS = ("q", "k", "v")
"""Queries, keys and values."""
Rows = tuple[range, ...]
"""Outputs of a layer that are one part of it."""


def rows_of_parts(weight: UsedWeight | None, outputs: int) -> dict[str, Rows]:
    """Return the outputs of queries, keys and values: as names tell them, or else equal thirds in this order.

    Raises ValueError where they cannot be told.
    """
    from trainc.compiler.structure.divisions import UNKNOWN_ORDER

    if weight is not None:
        named = {part.name: part.ranges for part in weight.division.parts if part.name in PARTS}
        if named:
            return named
        if weight.division.reason == UNKNOWN_ORDER:
            raise ValueError(
                f"has {outputs} outputs, of which it is not known which are queries, keys and values"
            )
    size, rest = divmod(outputs, len(PARTS))
    if rest:
        raise ValueError(
            f"has {outputs} outputs, which are not queries, keys and values of equal size"
        )
    return {part: (range(i * size, (i + 1) * size),) for i, part in enumerate(PARTS)}


def count(rows: Rows) -> int:
    """Return how many outputs a part has."""
    return sum(map(len, rows))


def spread(values: Mapping[str, Tensor], pairs: Mapping[str, Any], axis: int) -> Tensor:
    """Return the values of parts where their outputs are along an axis, and zeros for all other outputs."""
    import torch

    cuts: list[tuple[int, Tensor]] = []
    for part, value in values.items():
        sizes = [len(rows) for rows in pairs[part].rows]
        pieces = value.split(sizes, axis) if len(sizes) > 1 else (value,)
        cuts += [(rows.start, one) for rows, one in zip(pairs[part].rows, pieces, strict=True)]
    outputs = next(iter(pairs.values())).outputs
    found: list[Tensor] = []
    at = 0
    for start, piece in [*sorted(cuts, key=lambda cut: cut[0]), (outputs, None)]:
        if start > at:
            shape = list(cuts[0][1].shape)
            shape[axis] = start - at
            found.append(cuts[0][1].new_zeros(shape))
        if piece is not None:
            found.append(piece)
            at = start + piece.shape[axis]
    return torch.cat(found, axis)


def fuse(tensors: dict[str, Tensor], prefix: str, pairs: Mapping[str, Any]) -> None:
    """Put the A and B of the parts of a layer in one A and one B."""
    import torch

    a = [tensors.pop(f"{prefix}{part}.lora_A.weight") for part in pairs]
    b = [tensors.pop(f"{prefix}{part}.lora_B.weight") for part in pairs]
    ranks = [len(one) for one in a]
    whole = b[0].new_zeros(next(iter(pairs.values())).outputs, sum(ranks))
    for i, (pair, one) in enumerate(zip(pairs.values(), b, strict=True)):
        first = sum(ranks[:i])
        whole[_index(pair.rows), first : first + ranks[i]] = one
    tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"] = torch.cat(a), whole


def split(
    tensors: dict[str, Tensor], prefix: str, pairs: Mapping[str, Any], rank: int, folder: Path
) -> None:
    """Undo `fuse`; raises ValueError where B is not zero outside of the parts."""
    a, b = (tensors.pop(f"{prefix}lora_{letter}.weight", None) for letter in "AB")
    if a is None or b is None or len(b) != next(iter(pairs.values())).outputs:
        return  # which is said of the tensors that are not there
    rest = b.clone()
    for i, (part, pair) in enumerate(pairs.items()):
        ranks, rows = slice(i * rank, (i + 1) * rank), _index(pair.rows)
        tensors[f"{prefix}{part}.lora_A.weight"] = a[ranks]
        tensors[f"{prefix}{part}.lora_B.weight"] = b[rows, ranks]
        rest[rows, ranks] = 0
    if rest.any():
        raise ValueError(
            f"`{prefix}lora_B.weight` in {folder} also changes outputs outside of `parts`: remove `parts`, and write"
            " the rank and alpha of that file"
        )


def _index(rows: Rows) -> list[int]:
    return [row for one in rows for row in one]

"""Structures: what of a tensor is chosen as one unit: an entry, a row, a column, a block, n of m entries, or all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Kind = Literal["element", "row", "column", "block", "n_m", "layer"]

Reduce = Callable[[Tensor], Tensor]
"""The scores of units (count,), from those of their entries (count, size)."""


def l2_norm(entries: Tensor) -> Tensor:
    """Return the L2 norm of each unit, in float32 at least."""
    wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
    norms: Tensor = wide.abs().square().sum(1).sqrt()
    return norms


def rms(entries: Tensor) -> Tensor:
    """Return the root mean square of each unit, for units of different sizes."""
    return l2_norm(entries) / math.sqrt(max(1, entries.shape[1]))


def mean(entries: Tensor) -> Tensor:
    """Return the mean over each unit, of scores whose sign matters."""
    return entries.mean(1)


_CALL = re.compile(
    r"(?:(?P<kind>\w+)\s*\(\s*)?(?P<first>\d+)\s*(?(kind),|:)\s*(?P<second>\d+)\s*(?(kind)\))"
)


@dataclass(frozen=True, slots=True)
class Structure:
    """What is chosen as one. A row is one index of axis 0, a column one of axis 1, whatever axes follow.

    `size` is, of `block`, how many rows and columns a block has; of `n_m`, n and m: n of each m consecutive indices of
    axis 1. Of the other kinds it is None. Raises ValueError for sizes that make no sense.
    """

    kind: Kind = "element"
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"there is no structure `{self.kind}`")
        if (self.size is None) == (self.kind in ("block", "n_m")):
            raise ValueError(
                "`block` and `n_m` have two sizes, as in `block(1, 16)`, and others none"
            )
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"`{self}`: expected whole numbers, 1 or more")
        if self.kind == "n_m" and self.size is not None and self.size[0] > self.size[1]:
            raise ValueError(f"`{self}`: expected at most {self.size[1]} of {self.size[1]}")

    @classmethod
    def of(cls, text: str) -> Structure:
        """Return the structure that a text names: `row`, `block(1, 16)`, `n_m(2, 4)`, or `2:4` for the last.

        Raises ValueError for any other text.
        """
        found = _CALL.fullmatch(text.strip())
        if found is None:
            return cls(cast("Kind", text.strip()))
        kind = "n_m" if found["kind"] is None else found["kind"]
        return cls(cast("Kind", kind), (int(found["first"]), int(found["second"])))

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}({self.size[0]}, {self.size[1]})"

    @property
    def density(self) -> float | None:
        """Return the fraction that `n_m` keeps of every tensor; None where a budget says it."""
        return None if self.kind != "n_m" or self.size is None else self.size[0] / self.size[1]

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape has no such units, as `is not a matrix, ...`; None where it has."""
        if self.kind in ("element", "layer"):
            return None
        if len(shape) < 2:
            return f"is not a matrix, so it has no {_PLURAL[self.kind]}"
        if self.size is None:
            return None
        rows, columns = (1, self.size[1]) if self.kind == "n_m" else self.size
        for length, size, axis in ((shape[0], rows, "rows"), (shape[1], columns, "columns")):
            if length % size:
                return (
                    f"has {length} {axis}, and {length} is no multiple of {size}, as `{self}` needs"
                )
        return None

    def count(self, shape: tuple[int, ...]) -> int:
        """Return how many units a tensor of this shape has."""
        return math.prod(shape) // max(1, self.unit(shape))

    def unit(self, shape: tuple[int, ...]) -> int:
        """Return how many entries a unit has; 0 in a tensor without entries."""
        if self.kind in ("element", "n_m"):
            return 1
        if self.kind == "layer":
            return math.prod(shape)
        rows, columns = self._tile(shape)
        return rows * columns * math.prod(shape[2:])

    def scores(self, entries: Tensor, reduce: Reduce = l2_norm) -> Tensor:
        """Return the score of each unit, shape (count,), from a score of each entry."""
        shape = entries.shape
        if self.kind in ("element", "n_m") or not entries.numel():
            return entries.flatten()
        if self.kind == "layer":
            return reduce(entries.reshape(1, -1))
        rows, columns = self._tile(shape)
        tiles = entries.reshape(shape[0] // rows, rows, shape[1] // columns, columns, -1)
        return reduce(tiles.transpose(1, 2).flatten(0, 1).flatten(1))

    def mask(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return where the entries of chosen units are, bool of `shape`; `chosen` holds positions, int64."""
        units = torch.zeros(self.count(shape), dtype=torch.bool, device=chosen.device)
        units.index_fill_(0, chosen, True)
        if self.kind in ("element", "n_m") or not math.prod(shape):
            return units.view(shape)
        if self.kind == "layer":
            return units.expand(math.prod(shape)).reshape(shape)
        rows, columns = self._tile(shape)
        grid = units.view(shape[0] // rows, 1, shape[1] // columns, 1)
        whole = grid.expand(-1, rows, -1, columns).reshape(*shape[:2], *(1,) * len(shape[2:]))
        return whole.expand(shape).contiguous()

    def largest_of_each(self, scores: Tensor) -> Tensor:
        """Return where the n largest of each m consecutive entries along axis 1 are, bool; of equal ones the first."""
        assert self.size is not None
        kept, of = self.size
        last = scores.movedim(1, -1)
        groups = last.reshape(-1, of)
        order = groups.argsort(dim=1, descending=True, stable=True)[:, :kept]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
        return mask.view(last.shape).movedim(-1, 1).contiguous()

    def _tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns a unit has."""
        if self.size is not None:
            return self.size
        return (1, shape[1]) if self.kind == "row" else (shape[0], 1)


_PLURAL = {"row": "rows", "column": "columns", "block": "blocks", "n_m": "inputs to choose among"}

ELEMENT = Structure()

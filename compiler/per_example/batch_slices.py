"""Slice a few examples out of a model's inputs, and find the inputs with examples on their first axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_MAX_UNSLICED = 2
"""How many inputs are tried unsliced, because they may be as long as the batch by chance, such as masks (T, T)."""


@dataclass(frozen=True, slots=True)
class InputSlicer:
    """Slices the inputs that have `count` examples on their first axis: `sliced`, by index among the leaves."""

    count: int
    sliced: frozenset[int]

    def take(self, inputs: Any, rows: Sequence[int]) -> Any:
        """Return the inputs with only some rows of those that hold examples; the others are unchanged."""
        leaves, shape = pytree.tree_flatten(_plain(inputs))
        taken = [_rows(leaf, rows) if i in self.sliced else leaf for i, leaf in enumerate(leaves)]
        return pytree.tree_unflatten(taken, shape)

    def describe(self, inputs: Any) -> str:
        """Return the names and shapes of the inputs that are sliced."""
        found, _ = pytree.tree_flatten_with_path(_plain(inputs))
        names = [
            f"`inputs{pytree.keystr(path)}` {tuple(leaf.shape)}"
            for i, (path, leaf) in enumerate(found)
            if i in self.sliced
        ]
        return ", ".join(names) or "no input"


def possible_slicers(inputs: Any, counts: Sequence[int]) -> Iterator[InputSlicer]:
    """Yield the slicers that may be right for batches of `counts` examples, the most likely first.

    For each count every input of that length is taken to hold examples; then all but one, then all but two.
    """
    lengths = _lengths(inputs)
    for count in counts:
        candidates = [i for i, length in lengths.items() if length == count]
        for unsliced in range(min(len(candidates), _MAX_UNSLICED + 1) or 1):
            for left_out in combinations(candidates, unsliced):
                yield InputSlicer(count, frozenset(candidates) - frozenset(left_out))


def first_axis_lengths(inputs: Any) -> list[int]:
    """Return the lengths of the inputs' first axes, the most frequent first."""
    return [length for length, _ in Counter(_lengths(inputs).values()).most_common()]


def _lengths(inputs: Any) -> dict[int, int]:
    leaves = pytree.tree_leaves(_plain(inputs))
    return {i: t.shape[0] for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dim()}


def _plain(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor[torch.tensor(rows, device=tensor.device)]

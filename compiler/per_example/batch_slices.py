"""A few examples of a batch: which of its inputs carry them on their first axis, and those inputs cut to some rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_WHOLE = 2
"""Inputs that may be as long as the batch by coincidence and are tried whole, such as masks (T, T)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The inputs that have `count` examples on their first axis, as places among the leaves of the inputs."""

    count: int
    carried: frozenset[int]

    def take(self, inputs: Any, rows: Sequence[int]) -> Any:
        """Return the inputs with some rows of what carries examples, and the rest whole."""
        leaves, shape = pytree.tree_flatten(_plain(inputs))
        cut = [_rows(leaf, rows) if i in self.carried else leaf for i, leaf in enumerate(leaves)]
        return pytree.tree_unflatten(cut, shape)

    def told(self, inputs: Any) -> str:
        """Name what is cut, with its shape."""
        found, _ = pytree.tree_flatten_with_path(_plain(inputs))
        names = [
            f"`inputs{pytree.keystr(path)}` {tuple(leaf.shape)}"
            for i, (path, leaf) in enumerate(found)
            if i in self.carried
        ]
        return ", ".join(names) or "no input"


def cuts(inputs: Any, counts: Sequence[int]) -> Iterator[Cut]:
    """Yield the cuts that may be right for batches of `counts` examples, the likeliest first.

    For each count every input of that length is taken to carry examples; then all but one, then all but two.
    """
    lengths = _lengths(inputs)
    for count in counts:
        carried = [i for i, length in lengths.items() if length == count]
        for left in range(min(len(carried), _WHOLE + 1) or 1):
            for whole in combinations(carried, left):
                yield Cut(count, frozenset(carried) - frozenset(whole))


def lengths(inputs: Any) -> list[int]:
    """Return the lengths of the inputs' first axes, those of the most inputs first."""
    return [length for length, _ in Counter(_lengths(inputs).values()).most_common()]


def _lengths(inputs: Any) -> dict[int, int]:
    leaves = pytree.tree_leaves(_plain(inputs))
    return {i: t.shape[0] for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dim()}


def _plain(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor[torch.tensor(rows, device=tensor.device)]

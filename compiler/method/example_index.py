"""Which rows or tokens of a micro-batch belong to which example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExampleIndex:
    """The number of examples, and where each lies in a micro-batch.

    `index` (rows, tokens) is the example of every token; without it an example is `rows` consecutive rows.
    """

    count: int
    rows: int = 1
    index: Tensor | None = None

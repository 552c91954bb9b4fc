"""How a micro-batch falls into the units that a noise scale counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Division:
    """How a micro-batch falls into units: their number, and how tensors with the rows first tell them apart.

    `index` (rows, tokens) is the unit of every token; else a unit is `rows` consecutive rows.
    """

    count: int
    rows: int = 1
    index: Tensor | None = None

"""Windows of one aspect ratio: what FARMS measures in place of a whole weight, so that its shape has no part in alpha.

Source: Hu et al., ICML 2025, arXiv:2506.06280.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import Convention, matrices, spectra
from trainc.kernels.parameter.tail_fit import Fit, fit_tail, needed_for


def farms_alpha(
    weight: Tensor,
    rows: int = 100,
    aspect: float = 1.0,
    ops: int | None = 9,
    step: int = 10,
    fit: Fit = "median",
    tail: float = 0.5,
    convention: Convention = "code",
) -> float:
    """Return the exponent of the pooled spectra of windows of `weight`, (out, in) or (out, in, kh, kw).

    Windows have `rows` rows and `aspect` times as many columns, less where the weight is smaller: then they have
    the same aspect still (released code takes windows of other shapes there). `ops` are the windows along each
    axis, spread evenly; with None they are `step` entries apart. Of a convolution, blocks of each kernel position
    are taken, as large as the short side allows, which do not overlap, and alpha is the mean over the blocks.
    `fit`, `tail` and `convention` are those of `hill_alpha`. NaN where it means nothing. Raises ValueError for
    another shape, and for a size below 1.
    """
    windows = Windows(rows, aspect, ops, step)
    blocks = weight.dim() == 4
    return windows.alpha(matrices(weight), fit, tail, convention, blocks)


@dataclass(frozen=True, slots=True)
class Windows:
    """Which windows are measured: see `farms_alpha`. Raises ValueError for a size below 1."""

    rows: int = 100
    aspect: float = 1.0
    ops: int | None = 9
    step: int = 10

    def __post_init__(self) -> None:
        rows, aspect, ops, step = self.rows, self.aspect, self.ops, self.step
        whole = all(isinstance(n, int) for n in (rows, step, 1 if ops is None else ops))
        if (
            not whole
            or rows < 1
            or not 0 < aspect < math.inf
            or step < 1
            or (ops is not None and ops < 1)
        ):
            raise ValueError(
                f"rows = {rows}, aspect = {aspect:g}, ops = {ops}, step = {step}: expected numbers above 0,"
                " whole ones but for `aspect`"
            )

    def alpha(
        self,
        stack: Tensor,
        fit: Fit,
        tail: float,
        convention: Convention,
        blocks: bool | None = None,
    ) -> float:
        """Return the exponent of matrices (count, out, in): of `blocks`, as of a convolution, or else of all windows.

        By default several matrices are those of a convolution.
        """
        blocks = len(stack) > 1 if blocks is None else blocks
        hill = needed_for(fit, tail, convention)
        sets = _blocks(stack, self.aspect) if blocks else [self._of(stack)]
        pooled = (torch.cat(spectra(windows, hill)).sort().values for windows in sets)
        fits = (fit_tail(one, fit, tail=tail, convention=convention).alpha for one in pooled)
        found = [alpha for alpha in fits if math.isfinite(alpha)]
        return fmean(found) if found else math.nan

    def _of(self, stack: Tensor) -> list[Tensor]:
        """Return the windows of matrices."""
        high, wide = _window(stack.shape[1], stack.shape[2], self.rows, self.aspect)
        return [
            one[top : top + high, left : left + wide]
            for one in stack
            for top in _starts(stack.shape[1], high, self.ops, self.step)
            for left in _starts(stack.shape[2], wide, self.ops, self.step)
        ]


def _window(rows: int, columns: int, high: int, aspect: float) -> tuple[int, int]:
    """Return the size of a window of `high` rows, or of as many as leave its aspect where the matrix is smaller."""
    high = min(high, rows)
    if int(high * aspect) > columns:
        high = max(1, int(columns / aspect))
    return high, min(columns, max(1, int(high * aspect)))


def _starts(size: int, window: int, ops: int | None, step: int) -> list[int]:
    """Return where the windows along one axis begin."""
    room = size - window
    if ops is None:
        return [i * step for i in range(room // step + 1)]
    step = max(1, room // (ops - 1)) if ops > 1 else room + 1
    return [min(i * step, room) for i in range(min(ops, room // step + 1))]


def _blocks(stack: Tensor, aspect: float) -> Iterator[list[Tensor]]:
    """Yield the blocks along the long side of matrices: of each the same place in all of them."""
    tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
    short = tall.shape[2]
    high, wide = (
        (short, max(1, int(short * aspect)))
        if aspect <= 1
        else (max(1, int(short / aspect)), short)
    )
    for block in range(tall.shape[1] // short):
        yield [one[block * high : (block + 1) * high, :wide] for one in tall]

"""Windows of one aspect ratio: what FARMS measures in place of a whole weight, so that its shape has no part in alpha.

Source: Hu et al., ICML 2025, arXiv:2506.06280.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import CONV_SCALE, Convention, Hill, spectra
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
    if rows < 1 or not aspect > 0 or step < 1 or (ops is not None and ops < 1):
        raise ValueError(
            f"rows = {rows}, aspect = {aspect:g}, ops = {ops}, step = {step}: expected numbers above 0"
        )
    hill = needed_for(fit, tail, convention)
    if weight.dim() == 4:
        pooled = [_pooled(block, hill) * CONV_SCALE for block in _blocks(weight, aspect)]
    elif weight.dim() == 2:
        pooled = [_pooled(list(_windows(weight, rows, aspect, ops, step)), hill)]
    else:
        raise ValueError(f"a spectrum needs a 2-D or 4-D weight, not shape {tuple(weight.shape)}")
    fits = (fit_tail(one, fit, tail=tail, convention=convention).alpha for one in pooled)
    found = [alpha for alpha in fits if math.isfinite(alpha)]
    return fmean(found) if found else math.nan


def _pooled(windows: list[Tensor], hill: Hill) -> Tensor:
    """Return the eigenvalues of all windows together, ascending."""
    return torch.cat(spectra(windows, hill)).sort().values


def _windows(
    weight: Tensor, rows: int, aspect: float, ops: int | None, step: int
) -> Iterator[Tensor]:
    """Yield the windows of a matrix."""
    high, wide = _window(weight.shape[0], weight.shape[1], rows, aspect)
    for top in _starts(weight.shape[0], high, ops, step):
        for left in _starts(weight.shape[1], wide, ops, step):
            yield weight[top : top + high, left : left + wide]


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


def _blocks(weight: Tensor, aspect: float) -> Iterator[list[Tensor]]:
    """Yield the blocks of a convolution's weight: of each the matrices of all kernel positions, (long, short) cut."""
    positions = weight.flatten(2).permute(2, 0, 1)
    tall = positions if positions.shape[1] >= positions.shape[2] else positions.mT
    short = tall.shape[2]
    high, wide = (
        (short, max(1, int(short * aspect)))
        if aspect <= 1
        else (max(1, int(short / aspect)), short)
    )
    for block in range(tall.shape[1] // short):
        yield [one[block * high : (block + 1) * high, :wide] for one in tall]

"""What a frequency of a probe is: a bin of a uniform grid, a wave along a projection, or a side of a filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainc.compiler.errors import FieldError

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-5
"""What is added to an amplitude that is divided by."""
LEAST = 0.01
"""The least amplitude of a frequency that is shown, as a fraction of the largest."""
GRID, PROJECTION = 39, 10
"""The highest frequencies unless a clause says another."""
MOST = 2000
"""The most samples of a probe for a filter, whose cost grows with their square."""
FEWEST = 4
UNEVEN = 1e-3
"""How far a distance of neighbours on a grid may be from the mean distance, as a fraction of it."""

Parts = Callable[["Tensor"], "Tensor"]
"""Maps columns, float64 (n, m), to their parts (frequencies, ...)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Inputs and targets, with the frequencies that are shown: their names, and amplitudes of the target."""

    inputs: Tensor
    targets: Tensor
    of_classes: bool
    names: tuple[str, ...]
    amplitudes: tuple[float, ...]
    shown: tuple[int, ...]
    parts: Parts

    def errors(self, output: Tensor, *, magnitudes: bool, added: float) -> list[float]:
        """Return |F - Y| / (added + |Y|) of each shown frequency for outputs (n, ...), or that of their magnitudes.

        Raises ValueError for outputs of another shape than the targets.
        """
        import torch

        columns, targets = output.detach().cpu().double().reshape(len(output), -1), self.targets
        if self.of_classes:
            columns = columns.softmax(-1)
            more = max(0, columns.shape[1] - targets.shape[1])
            targets = torch.nn.functional.pad(targets, (0, more))
        if columns.shape != targets.shape:
            raise ValueError(
                f"the model gives {list(output.shape)} for the probe, which has {targets.shape[1]} targets for each of"
                f" {len(targets)} samples: let the function of `probe` return a target for each output"
            )
        want, got = (self.parts(one)[[*self.shown]] for one in (targets, columns))
        if magnitudes:
            want, got = want.abs(), got.abs()
        found: list[float] = (sizes(got - want) / (sizes(want) + added)).tolist()
        return found


def sizes(parts: Tensor) -> Tensor:
    """Return the L2 norm of each part over all outputs."""
    return parts.flatten(1).abs().square().sum(1).sqrt()


def visible(amplitudes: Sequence[float], count: int, maxima: bool) -> list[int]:
    """Return which of the first `count` are at least 1% of their largest and, of `maxima`, no less than neighbours.

    The one behind them, where there is one, is a neighbour too.
    """
    least, sides = LEAST * max(amplitudes[:count]), [0.0, *amplitudes, 0.0]
    return [
        k
        for k, size in enumerate(amplitudes[:count])
        if size >= least and (not maxima or (size > sides[k] and size >= sides[k + 2]))
    ]


def check_inputs(x: Tensor, y: Tensor) -> None:
    """Raise ValueError for inputs and targets that have no spectrum."""
    if not x.is_floating_point():
        raise ValueError(
            "the inputs of the probe are integers, such as token ids: neither a grid nor a projection nor a filter"
            " has a meaning there. Give real inputs, or remove the clause"
        )
    if len(x) != len(y) or len(x) < FEWEST:
        raise ValueError(
            f"the probe has {len(x)} inputs and {len(y)} targets: give {FEWEST} of each or more"
        )


def as_columns(y: Tensor) -> Tensor:
    """Return targets as float64 (n, m): class indices as indicators of each class."""
    import torch

    if y.is_floating_point():
        return y.detach().cpu().double().reshape(len(y), -1)
    if y.dim() != 1 or int(y.min()) < 0:
        raise ValueError("integer targets of a probe are class indices, 0 and up, one a sample")
    return torch.nn.functional.one_hot(y.detach().cpu().long()).double()


def as_rows(x: Tensor) -> Tensor:
    """Return inputs as float64 (n, d)."""
    return x.detach().cpu().double().reshape(len(x), -1)


def grid(rows: Tensor, highest: int | None) -> tuple[list[str], Parts]:
    """Return the names of frequencies and the discrete Fourier transform on a uniform grid (n, 1).

    The transform has one frequency more than the names, unless the grid has no higher one.
    """
    import torch

    if rows.shape[1] != 1:
        raise ValueError(
            f"the inputs of the probe have {rows.shape[1]} dimensions, and a grid has one: write `method = projection`"
            " or `method = filter`, or give inputs on a line"
        )
    steps = rows[:, 0].diff()
    mean = float(steps.mean())
    if mean == 0 or not float((steps / mean - 1).abs().max()) <= UNEVEN:
        raise ValueError(
            f"the inputs of the probe are no uniform grid: the distances of neighbours go from {float(steps.min()):.6g}"
            f" to {float(steps.max()):.6g}. Sort them and space them evenly, or write `method = projection`"
        )
    nyquist = len(rows) // 2
    if highest is not None and highest > nyquist:
        raise FieldError(
            "highest", f"a grid of {len(rows)} points has no frequency above {nyquist}"
        )
    count = min(highest or GRID, nyquist) + 1
    return [f"k = {k}" for k in range(count)], lambda columns: torch.fft.rfft(columns, dim=0)[
        : count + 1
    ]


def projection(rows: Tensor, highest: int | None) -> tuple[list[str], Parts]:
    """Return the names of frequencies and the transform along the first principal component of rows (n, d).

    It is scaled to 0..1, and the largest of its weights is positive. The transform has one frequency more than the
    names.
    """
    import torch

    centred = rows - rows.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    place = centred @ direction * direction[direction.abs().argmax()].sign()
    span = float(place.max() - place.min())
    if span == 0:
        raise ValueError("all inputs of the probe are the same")
    place = (place - place.min()) / span
    count = (highest or PROJECTION) + 1
    angles = -2 * math.pi * torch.arange(count + 1, dtype=torch.float64)[:, None] * place
    waves = torch.polar(torch.ones_like(angles), angles) / len(rows)
    return [f"k = {k}" for k in range(count)], lambda columns: waves @ columns.to(waves.dtype)


def gaussian_filter(rows: Tensor, width: float) -> tuple[list[str], Parts]:
    """Return the names of the two sides, and the split of columns by Gaussian means over rows (n, d)."""
    import torch

    if len(rows) > MOST:
        raise ValueError(
            f"`method = filter` compares each pair of samples: give at most {MOST}, not {len(rows)}"
        )
    # By differences: products of matrices would put a sample at some distance from itself.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    weights = (-apart.square() / (2 * width**2)).exp()
    weights /= weights.sum(1, keepdim=True)

    def split(columns: Tensor) -> Tensor:
        low = weights @ columns
        return torch.stack([low, columns - low])

    return ["low", "high"], split


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of ranks, equal values with their mean rank; 0 where all are equal."""
    x, y = _ranks(one), _ranks(other)
    mean = (len(x) + 1) / 2
    xx, yy = sum((a - mean) ** 2 for a in x), sum((b - mean) ** 2 for b in y)
    xy = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(xx * yy) if xx and yy else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(v < one for v in values) + (1 + sum(v == one for v in values)) / 2 for one in values
    ]

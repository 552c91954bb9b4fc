"""Effective data transferred: what pre-training is worth, in data that a model from scratch would need in its place.

Hernandez, Kaplan, Henighan and McCandlish, Scaling Laws for Transfer, 2021, arXiv:2102.01293: D_T = k D_F^alpha N^beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainc.runtime.fits.least_squares import Array, Interval, exponential, fit_with_intervals, r2

SATURATED = 0.99
"""At this fraction of the best performance of a size more data would change little."""
LOW_DATA = 0.1
"""The law holds for at most this fraction of the data that saturates a size."""

ROUNDING = 1e-6
"""Data transferred that is a smaller fraction of a run's own is none: the run has the loss of one from scratch."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run: parameters without embeddings, tokens of its training data, its lowest loss, if it began pre-trained."""

    name: str
    size: float
    data: float
    loss: float
    pretrained: bool


@dataclass(frozen=True, slots=True)
class Transferred:
    """A fine-tuned run, with the data that its size would need from scratch for its loss."""

    run: Trained
    effective: float

    @property
    def amount(self) -> float:
        """Return the data transferred, D_E - D_F."""
        return self.effective - self.run.data


@dataclass(frozen=True, slots=True)
class TransferLaw:
    """D_T = k D_F^alpha N^beta with intervals, and where it was fitted; `left_out` says why points were not."""

    k: Interval
    alpha: Interval
    beta: Interval
    r2: float
    points: tuple[Transferred, ...]
    left_out: tuple[str, ...]

    def amount(self, data: float, size: float) -> float:
        """Return the data transferred by the law."""
        return float(self.k.value * data**self.alpha.value * size**self.beta.value)

    @property
    def sizes(self) -> tuple[float, float]:
        """Return the smallest and the largest size that was fitted."""
        every = [point.run.size for point in self.points]
        return min(every), max(every)

    @property
    def data(self) -> tuple[float, float]:
        """Return the least and the most fine-tuning data that was fitted."""
        every = [point.run.data for point in self.points]
        return min(every), max(every)


def fit_transfer(runs: Sequence[Trained]) -> TransferLaw:
    """Fit the law by least squares of logarithms; raises ValueError where runs are missing.

    The effective data is interpolated between runs from scratch of the same size, in logarithms of data and loss. Left
    out are points where the law does not hold or cannot be read: outside of the runs from scratch, with more than a
    tenth of the data that saturates its size (99% of the best loss of a run from scratch), or without transfer.
    """
    tuned = [run for run in runs if run.pretrained]
    if not tuned:
        raise ValueError(
            "no run began with pre-trained weights (`start` of `run`, or `init` of `model`): add fine-tuned runs"
        )
    points: list[Transferred] = []
    left_out: list[str] = []
    for run in tuned:
        scratch = [one for one in runs if not one.pretrained and one.size == run.size]
        if len({one.data for one in scratch}) < 2:
            raise ValueError(
                f"{run.name} has {run.size:,.0f} parameters without embeddings, and the runs from scratch of this size"
                f" have {len({one.data for one in scratch})} amounts of data: add some, so that there are two or more"
            )
        found = _transferred(run, scratch)
        if isinstance(found, str):
            left_out.append(f"{run.name}: {found}")
        else:
            points.append(found)
    return _fit(points, left_out)


def _transferred(run: Trained, scratch: Sequence[Trained]) -> Transferred | str:
    """Return the effective data of a run, or why the law has nothing to say of it."""
    ordered = sorted(scratch, key=lambda one: one.data)
    losses = np.minimum.accumulate([one.loss for one in ordered])
    data = [one.data for one in ordered]
    if run.loss < losses[-1]:
        return f"no run from scratch has a loss as low as its {run.loss:.4g}: train one on more than {data[-1]:,.0f}"
    if run.loss > losses[0]:
        return f"each run from scratch has a lower loss than its {run.loss:.4g}"
    saturated = next(
        d for d, loss in zip(data, losses, strict=True) if SATURATED * loss <= losses[-1]
    )
    if run.data > LOW_DATA * saturated:
        return (
            f"its {run.data:,.0f} are more than 10% of the {saturated:,.0f} that saturate its size"
        )
    # Losses fall with the data, and `interp` needs rising ones.
    effective = math.exp(np.interp(-math.log(run.loss), -np.log(losses), np.log(data)))
    if effective <= run.data * (1 + ROUNDING):
        return "it is no better than training from scratch"
    return Transferred(run, effective)


def _fit(points: Sequence[Transferred], left_out: Sequence[str]) -> TransferLaw:
    why = "".join(f"\n  {line}" for line in left_out)
    sizes, amounts = (
        len({getattr(point.run, name) for point in points}) for name in ("size", "data")
    )
    if len(points) < 3 or sizes < 2 or amounts < 2:
        raise ValueError(
            "the law has three numbers: it needs three fine-tuned runs, of two sizes and two amounts of fine-tuning"
            f" data, and has {len(points)}, of {sizes} and {amounts}{why}"
        )
    matrix = np.array([[1, math.log(p.run.data), math.log(p.run.size)] for p in points])
    y = np.log([point.amount for point in points])
    if np.linalg.matrix_rank(matrix) < 3:
        raise ValueError(
            "sizes and amounts of fine-tuning data change together: add a run with another amount at the same size"
        )

    def solve(values: Array) -> Array:
        found: Array = np.linalg.lstsq(matrix, values, rcond=None)[0]
        return found

    numbers = [lambda p: exponential(p[0]), lambda p: float(p[1]), lambda p: float(p[2])]
    (k, alpha, beta), fitted = fit_with_intervals(solve, lambda p: matrix @ p, y, numbers)
    return TransferLaw(k, alpha, beta, r2(y, matrix @ fitted), tuple(points), tuple(left_out))

"""What one spectrum tells of a weight, in single numbers: alpha and those that other methods go by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainc.kernels.parameter.spectral_null import null_distance
from trainc.kernels.parameter.spectrum import Convention, Gram, Spectrum, spectra_of, spectrum
from trainc.kernels.parameter.tail_fit import Fit, fit_tail, hill_alpha, needed_for

Metric = Literal["alpha", "null_distance", "log_alpha", "stable_rank", "spectral_norm", "entropy"]


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one unit; its `spectrum` holds the eigenvalues and the sides that count.

    `alpha` is the exponent of the tail, which begins at `xmin`, and `null_distance` how far it is from that of
    independent entries, in standard deviations (for `fit = median`). The others are those of `log_alpha`,
    `stable_rank`, `spectral_norm` and `spectral_entropy`. NaN is what means nothing: all of a weight that is zero, and
    alpha where the rank is low.
    """

    alpha: float
    xmin: float
    null_distance: float
    log_alpha: float
    stable_rank: float
    spectral_norm: float
    entropy: float
    spectrum: Spectrum

    @property
    def eigenvalues(self) -> int:
        return len(self.spectrum.values)


def measure(
    matrices: Mapping[str, Tensor | Gram],
    fit: Fit = "median",
    tail: float = 0.5,
    convention: Convention = "code",
) -> dict[str, Figures]:
    """Return the figures of units by name, each given as matrices (count, out, in) whose eigenvalues are pooled, or as
    the Gram matrix of one.

    Rows and columns of zeros, which masks leave, do not count. `fit`, `tail` and `convention` are those of
    `hill_alpha`. Raises ValueError, which names the unit, where entries are not finite.
    """
    found = spectra_of([*matrices.values()], needed_for(fit, tail, convention))
    refuse_not_finite({name: one.values for name, one in zip(matrices, found, strict=True)})
    return {
        name: figures_of(one, fit, tail, convention)
        for name, one in zip(matrices, found, strict=True)
    }


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, which names the weight, where one of the tensors by its name is not finite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"`{name}` has entries that are not finite, so it has no spectrum: lower the learning rate or clip"
                " gradients, or exclude it"
            )


def figures_of(
    one: Spectrum, fit: Fit = "median", tail: float = 0.5, convention: Convention = "code"
) -> Figures:
    """Return the figures of one spectrum; `fit`, `tail` and `convention` are those of `hill_alpha`."""
    fitted = fit_tail(one.values, fit, tail=tail, convention=convention, spread=one.spread)
    distance = math.nan
    if fit == "median" and len(one.values) > 2 and math.isfinite(fitted.alpha):
        shape = (one.rows, one.columns, one.count, 1)
        distance = null_distance(fitted.alpha, shape, tail, convention)
    return Figures(
        fitted.alpha,
        fitted.xmin,
        distance,
        _log_alpha(fitted.alpha, one.values),
        _stable_rank(one.values),
        _norm(one.values),
        _entropy(one.values),
        one,
    )


def stable_rank(weight: Tensor) -> float:
    """Return the squared Frobenius norm of a weight over the largest of its eigenvalues, from 1 to their number.

    `weight` is that of `spectrum`. NaN for a weight that is zero or not finite. Raises ValueError for another shape.
    """
    return _stable_rank(spectrum(weight))


def spectral_norm(weight: Tensor) -> float:
    """Return the largest singular value of a weight; of a convolution, over the matrices of all kernel positions.

    `weight` is that of `spectrum`, and a convolution is scaled as there. TempBalance's code calls the square of this
    the spectral norm. NaN for a weight that is not finite. Raises ValueError for another shape.
    """
    return _norm(spectrum(weight))


def log_alpha(
    weight: Tensor, fit: Fit = "median", tail: float = 0.5, convention: Convention = "code"
) -> float:
    """Return alpha times log10 of the largest eigenvalue of `weight`, which TempBalance's code calls alphahat.

    `fit`, `tail` and `convention` are those of `hill_alpha`. Below 0 where that eigenvalue is below 1. NaN where alpha
    is. Raises ValueError for another shape.
    """
    return _log_alpha(hill_alpha(weight, fit, tail, convention), spectrum(weight))


def spectral_entropy(weight: Tensor) -> float:
    """Return the entropy of the n eigenvalues of `weight` as parts of their sum, over ln n: 1 where all are equal.

    `weight` is that of `spectrum`. NaN for one eigenvalue, and for a weight that is zero or not finite. Raises
    ValueError for another shape.
    """
    return _entropy(spectrum(weight))


def _largest(values: Tensor) -> float:
    return float(values[-1]) if len(values) else 0.0


def _stable_rank(values: Tensor) -> float:
    largest = _largest(values)
    return float(values.sum()) / largest if largest > 0 else math.nan


def _norm(values: Tensor) -> float:
    return math.sqrt(_largest(values))


def _log_alpha(alpha: float, values: Tensor) -> float:
    largest = _largest(values)
    return alpha * math.log10(largest) if largest > 0 else math.nan


def _entropy(values: Tensor) -> float:
    if len(values) < 2 or not _largest(values) > 0:
        return math.nan
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum()) / math.log(len(values))

"""Power laws fitted to the tail of a spectrum: the exponent, where the tail begins, and how well it fits.

Three rules say where the tail begins. `median` takes a fixed fraction of the eigenvalues. `dks` takes the threshold
whose fit has the least distance of Kolmogorov and Smirnov (Clauset et al. 2009). `peak` does that among the
thresholds near the mode of the spectrum's histogram over log10(lambda), as WeightWatcher's `fix_fingers` does.

The exponent at a threshold is Hill's: alpha = 1 + n / sum(ln(lambda / xmin)) over the n eigenvalues of the tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import (
    NO_SPREAD,
    RANK,
    WHOLE,
    Convention,
    Hill,
    no_spread,
    spectra,
)

Fit = Literal["median", "dks", "peak"]

BINS = 100
NEAR_PEAK = 0.95, 1.5
"""The thresholds that `peak` tries, relative to the left edge of the highest bin."""
# Distances computed at once.
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class TailFit:
    """The exponent `alpha`, the smallest eigenvalue `xmin` of the tail, its `distance`, and its `count` of eigenvalues.

    `distance` is the largest difference between the distribution of the tail and the power law. All are NaN, and
    the count is 0, where a spectrum has no tail: weights that are zero, not finite, of low rank or orthogonal.
    """

    alpha: float
    xmin: float
    distance: float
    count: int


NO_FIT = TailFit(math.nan, math.nan, math.nan, 0)


def fit_tail(
    spectrum: Tensor,
    fit: Fit = "median",
    *,
    tail: float = 0.5,
    convention: Convention = "code",
    published_bound: bool = False,
    spread: float = NO_SPREAD,
) -> TailFit:
    """Fit the tail of an ascending spectrum (n,).

    `tail` is the fraction of the eigenvalues that `median` takes, in (0, 1). `convention` says what xmin is for it:
    the least of the tail (`code`, as released implementations have it), or the eigenvalue below (`paper`).
    `published_bound` is for `peak`: released code compares the logarithm of the lower bound with eigenvalues, so
    that nearly all below the peak are tried. A tail whose mean ln(lambda / xmin) is below `spread` is none. Raises
    ValueError for a `tail` or `fit` that is none of these.
    """
    hill = Hill.of_tail(tail, convention)
    if fit == "median":
        return _at_fraction(spectrum, hill, spread)
    if fit not in ("dks", "peak"):
        raise ValueError(f"fit = {fit!r}: expected 'median', 'dks' or 'peak'")
    values = spectrum.double()
    if len(values) < 2 or not bool(values.isfinite().all()) or not float(values[-1]) > 0:
        return NO_FIT
    values = values[values > RANK * values[-1]]
    if len(values) < 2:
        return NO_FIT
    return _least_distance(values, _candidates(values, fit, published_bound), spread)


def needed_for(fit: Fit, tail: float, convention: Convention) -> Hill:
    """Return what a spectrum has to be exact enough for."""
    return Hill.of_tail(tail, convention) if fit == "median" else WHOLE


def hill_alpha(
    weight: Tensor, fit: Fit = "median", tail: float = 0.5, convention: Convention = "code"
) -> float:
    """Return the exponent of a spectrum, that of `weight`, (out, in) or (out, in, kh, kw); NaN where it means nothing.

    `fit`, `tail` and `convention` are those of `trainc.kernels.parameter.tail_fit.fit_tail`. Source: TempBalance,
    Zhou et al. 2023, with `median` its default; `peak` is with the lower bound that was meant. Raises ValueError
    for another shape.
    """
    (spectrum,) = spectra([weight], needed_for(fit, tail, convention))
    spread = no_spread(weight.dtype)
    return fit_tail(spectrum, fit, tail=tail, convention=convention, spread=spread).alpha


def _at_fraction(spectrum: Tensor, hill: Hill, spread: float) -> TailFit:
    alpha = hill.alpha(spectrum, spread)
    if not math.isfinite(alpha):
        return NO_FIT
    index, k = hill.tail(len(spectrum))
    values = spectrum.double()
    distance = float(_distances(values, torch.tensor([index]), torch.tensor([alpha]))[0])
    return TailFit(alpha, float(values[index]), distance, k)


def _candidates(values: Tensor, fit: Fit, published_bound: bool) -> Tensor:
    """Return the numbers of the eigenvalues that may be the threshold: all but the last, or those near the peak."""
    some = torch.arange(len(values) - 1)
    if fit == "dks":
        return some
    logs = values.log10()
    least, most = float(logs[0]), float(logs[-1])
    if not most > least:
        return some[:0]
    peak = int(torch.histc(logs, BINS, least, most).argmax())
    edge = 10 ** (least + (most - least) * peak / BINS)
    low = NEAR_PEAK[0] * edge
    if published_bound:
        low = math.log10(low)
    tried = values[:-1]
    return some[(tried >= low) & (tried <= NEAR_PEAK[1] * edge)]


def _least_distance(values: Tensor, tried: Tensor, spread: float) -> TailFit:
    """Return the fit at the threshold with the least distance; the first of several."""
    n = len(values)
    counts = (n - tried).double()
    logs = values.log()
    sums = logs.flip(0).cumsum(0).flip(0)[tried] - counts * logs[tried]
    alphas = 1 + counts / sums
    usable = sums > spread * counts
    tried, alphas = tried[usable], alphas[usable]
    if not len(tried):
        return NO_FIT
    distances = _distances(values, tried, alphas)
    best = int(distances.argmin())
    index = int(tried[best])
    return TailFit(float(alphas[best]), float(values[index]), float(distances[best]), n - index)


def _distances(values: Tensor, tried: Tensor, alphas: Tensor) -> Tensor:
    """Return the distance at each threshold i: max over j >= i of |1 - (lambda_j / xmin)^(1 - alpha) - (j - i) / n|."""
    n, logs = len(values), values.log()
    place = torch.arange(n)
    found = []
    step = max(1, CHUNK // n)
    for start in range(0, len(tried), step):
        i, alpha = tried[start : start + step, None], alphas[start : start + step, None].double()
        fitted = 1 - ((1 - alpha) * (logs - logs[i])).clamp(max=0).exp()
        gaps = (fitted - (place - i) / (n - i)).abs()
        found.append(gaps.masked_fill(place < i, 0.0).amax(1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

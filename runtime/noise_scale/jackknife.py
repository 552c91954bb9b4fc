"""Jackknife: the uncertainty of one step's noise scale, by leaving out each contribution in turn.

The estimators of `estimators.py` are taken over the remaining contributions; how much they vary
tells how much they would vary with other examples. It needs only |c_b|^2 and c_b . G of each
contribution, no second pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainc.runtime.noise_scale.contribution_shapes import check_matrix, check_shapes
from trainc.runtime.noise_scale.estimate import ROUNDING, UNKNOWN, Estimate, Uncertainty
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions

# Weights arrive in float32 or less, so their sum is one only to about this.
_SUM_TOLERANCE = 1e-2


class Jackknife(NamedTuple):
    """One step's estimate, the uncertainty of its parts, and the standard error of their ratio.

    Uncertainty and error are NaN where the step has too few contributions for them.
    """

    estimate: Estimate
    uncertainty: Uncertainty
    standard_error: float


def jackknife(
    sq_norms: Tensor,
    dots: Tensor,
    batch_sq_norms: Tensor,
    weights: Tensor,
    sum_sq_example_weights: Tensor | None = None,
) -> list[Jackknife]:
    """Return a jackknife for each column of |c_b|^2 (B, K) and dot products c_b . G (B, K).

    batch_sq_norms (K,) is |G|^2 with G = sum c_b. weights (B,) sum to 1. For contributions of
    groups, sum_sq_example_weights (B,) is each group's sum of w_b^2 over its examples. Raises
    ValueError for other shapes and for weights that do not sum to 1.

    Left out, contribution b takes its weight along and the others' are scaled up to 1:
    S_-b = (S - 2 c_b.G + |c_b|^2) / (1 - w_b)^2, S1_-b = (S1 - |c_b|^2) / (1 - w_b)^2 and
    q_-b = (q - w_b^2) / (1 - w_b)^2. Variances are (n - 1) / n sum (theta_-b - mean theta_-b)^2
    over the n contributions that have weight (Efron & Stein 1981); below three there are none.

    That errs to the safe side. Both estimators are U-statistics of order two, with variances
    4 d1 / n + 2 d2 / (n (n - 1)), and the jackknife's mean is 4 d1 / n + 4 d2 / (n (n - 2)). For
    the signal d1 = G'Sigma G and d2 = tr(Sigma^2), so where noise drowns the signal its standard
    error comes out sqrt(2) times too large; for the noise the excess is of relative order 1 / n.
    """
    b, k = check_matrix("sq_norms", sq_norms)
    check_shapes(
        dots=(dots, (b, k)),
        batch_sq_norms=(batch_sq_norms, (k,)),
        weights=(weights, (b,)),
        sum_sq_example_weights=(sum_sq_example_weights, (b,)),
    )
    sq_norms, dots, batch, w = (
        t.detach().double().cpu() for t in (sq_norms, dots, batch_sq_norms, weights)
    )
    each = (
        w.square()
        if sum_sq_example_weights is None
        else sum_sq_example_weights.detach().double().cpu()
    )
    total = float(w.sum())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(
            f"weights sum to {total:g}, expected 1: give the contributions of the whole step, of all"
            " micro-batches and replicas, each with its fraction of the step's loss"
        )
    q, examples = float(w.square().sum()), float(each.sum())
    estimates = [
        noise_scale_from_contributions(s1, s, q, examples)
        for s1, s in zip(sq_norms.sum(0).tolist(), batch.tolist(), strict=True)
    ]
    variances = _jackknife_variances(sq_norms, dots, batch, w, each).T.tolist()
    dof = float((w > 0).sum()) - 1
    return [
        Jackknife(estimate, *_finite_uncertainty(numbers, dof))
        for estimate, numbers in zip(estimates, variances, strict=True)
    ]


def _jackknife_variances(
    sq_norms: Tensor, dots: Tensor, batch: Tensor, w: Tensor, each: Tensor
) -> Tensor:
    """Return (4, K): variances of signal and noise, their covariance, the variance of the ratio."""
    s1, q, examples = sq_norms.sum(0), w.square().sum(), each.sum()
    kept = w > 0  # an example without targets does not count
    sq_norms, dots, w, each = sq_norms[kept], dots[kept], w[kept, None], each[kept, None]
    rest = (1 - w).square()
    q_left, examples_left = (q - w.square()) / rest, (examples - each) / rest
    s1_left, s_left = (s1 - sq_norms) / rest, (batch - 2 * dots + sq_norms) / rest
    # Where one is left with all the weight there is no estimate, and so no variance.
    others = torch.where(1 - q_left > ROUNDING, 1 - q_left, math.nan)
    signal = (s_left - s1_left) / others
    noise = (s1_left - q_left * s_left) / (others * examples_left)
    deviations = [x - x.mean(0) for x in (signal, noise, noise / signal)]
    pairs = ((0, 0), (1, 1), (0, 1), (2, 2))
    count = len(w)
    sums = torch.stack([(deviations[i] * deviations[j]).sum(0) for i, j in pairs])
    return sums * ((count - 1) / count if count else math.nan)


def _finite_uncertainty(numbers: list[float], dof: float) -> tuple[Uncertainty, float]:
    """Return the uncertainty and the standard error of the ratio, both unknown where not finite."""
    signal, noise, covariance, ratio = numbers
    finite = all(map(math.isfinite, (signal, noise, covariance)))
    uncertainty = Uncertainty(signal, noise, covariance, dof) if finite else UNKNOWN
    return uncertainty, math.sqrt(ratio) if math.isfinite(ratio) else math.nan

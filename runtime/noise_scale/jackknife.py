"""How sure one step's noise scale is: the jackknife over its contributions.

Each contribution in turn is left out and the estimators of `noise_scale.py` are taken over the
rest; how much they move tells how much they would move with other examples. It needs only |c_b|^2
and c_b . G of each contribution, no second pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from trainc.runtime.noise_scale.estimate import ROUNDING, UNKNOWN, Estimate, Spread
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions

if TYPE_CHECKING:
    from torch import Tensor

# Weights arrive in float32 or less, so their sum is one only to about this.
_SUM = 1e-2


class Jackknife(NamedTuple):
    """One step's estimate, the spread of its parts, and the standard error of their ratio.

    Spread and error are NaN where the step has too few contributions for them.
    """

    estimate: Estimate
    spread: Spread
    error: float


def jackknife(
    squares: Tensor,
    dots: Tensor,
    s_big: Tensor | float,
    weights: Tensor,
    example_squares: Tensor | None = None,
) -> Jackknife:
    """Return the jackknife of one step from |c_b|^2 and c_b . G, both (B,); see `jackknives`."""
    import torch

    if squares.dim() != 1:
        raise ValueError(f"squares are {tuple(squares.shape)}, not (B,): one number a contribution")
    whole = torch.as_tensor(s_big, dtype=torch.float64).reshape(1)
    if dots.shape != squares.shape:
        raise ValueError(f"dots are {tuple(dots.shape)}, squares {tuple(squares.shape)}: both (B,)")
    return jackknives(squares[:, None], dots[:, None], whole, weights, example_squares)[0]


def jackknives(
    squares: Tensor,
    dots: Tensor,
    s_big: Tensor,
    weights: Tensor,
    example_squares: Tensor | None = None,
) -> list[Jackknife]:
    """Return a jackknife for each column of squares |c_b|^2 (B, K) and dots c_b . G (B, K).

    s_big (K,) is |G|^2 with G = sum c_b. weights (B,) sum to 1. For contributions of groups,
    example_squares (B,) is each group's sum of w_b^2 over its examples.

    Left out, contribution b takes its weight along and the others' are scaled up to 1:
    S_-b = (S - 2 c_b.G + |c_b|^2) / (1 - w_b)^2, S1_-b = (S1 - |c_b|^2) / (1 - w_b)^2 and
    q_-b = (q - w_b^2) / (1 - w_b)^2. Variances are (n - 1) / n sum (theta_-b - mean theta_-b)^2
    over the n contributions that have weight (Efron & Stein 1981); below three there are none.

    That errs to the safe side. Both estimators are U-statistics of order two, with variances
    4 d1 / n + 2 d2 / (n (n - 1)), and the jackknife's mean is 4 d1 / n + 4 d2 / (n (n - 2)). For
    the signal d1 = G'Sigma G and d2 = tr(Sigma^2), so where noise drowns the signal its standard
    error comes out sqrt(2) times too large; for the noise the excess is of relative order 1 / n.
    """
    _check(squares, dots, s_big, weights, example_squares)
    squares, dots, whole, w = (t.detach().double().cpu() for t in (squares, dots, s_big, weights))
    each = w.square() if example_squares is None else example_squares.detach().double().cpu()
    total = float(w.sum())
    if abs(total - 1) > _SUM:
        raise ValueError(
            f"weights sum to {total:g}, not 1: give the contributions of the whole step, all "
            "micro-batches and replicas, with weights that are shares of its loss"
        )
    q, examples = float(w.square().sum()), float(each.sum())
    estimates = [
        noise_scale_from_contributions(s1, s, q, examples)
        for s1, s in zip(squares.sum(0).tolist(), whole.tolist(), strict=True)
    ]
    variances = _variances(squares, dots, whole, w, each).T.tolist()
    dof = float((w > 0).sum()) - 1
    return [
        Jackknife(estimate, *_finite(numbers, dof))
        for estimate, numbers in zip(estimates, variances, strict=True)
    ]


def _variances(squares: Tensor, dots: Tensor, whole: Tensor, w: Tensor, each: Tensor) -> Tensor:
    """Return (4, K): variances of signal and noise, their covariance, the variance of the ratio."""
    import torch

    s1, q, examples = squares.sum(0), w.square().sum(), each.sum()
    kept = w > 0  # an example without targets is none
    squares, dots, w, each = squares[kept], dots[kept], w[kept, None], each[kept, None]
    rest = (1 - w).square()
    q_left, examples_left = (q - w.square()) / rest, (examples - each) / rest
    s1_left, s_left = (s1 - squares) / rest, (whole - 2 * dots + squares) / rest
    # Where one is left with all the weight there is no estimate, and so no variance.
    others = torch.where(1 - q_left > ROUNDING, 1 - q_left, math.nan)
    signal = (s_left - s1_left) / others
    noise = (s1_left - q_left * s_left) / (others * examples_left)
    moved = [x - x.mean(0) for x in (signal, noise, noise / signal)]
    pairs = ((0, 0), (1, 1), (0, 1), (2, 2))
    count = len(w)
    sums = torch.stack([(moved[i] * moved[j]).sum(0) for i, j in pairs])
    return sums * ((count - 1) / count if count else math.nan)


def _finite(numbers: list[float], dof: float) -> tuple[Spread, float]:
    """Return spread and error of the ratio, both unknown where they are no numbers."""
    signal, noise, covariance, ratio = numbers
    known = all(map(math.isfinite, (signal, noise, covariance)))
    spread = Spread(signal, noise, covariance, dof) if known else UNKNOWN
    return spread, math.sqrt(ratio) if math.isfinite(ratio) else math.nan


def _check(
    squares: Tensor, dots: Tensor, s_big: Tensor, weights: Tensor, example_squares: Tensor | None
) -> None:
    """Refuse shapes that do not belong together."""
    if squares.dim() != 2:
        raise ValueError(f"squares are {tuple(squares.shape)}, not (B, K)")
    b, k = squares.shape
    wanted = {"dots": (dots, (b, k)), "s_big": (s_big, (k,)), "weights": (weights, (b,))}
    if example_squares is not None:
        wanted["example_squares"] = (example_squares, (b,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} are {tuple(tensor.shape)}, not {shape}: one row a contribution, one "
                f"column a squared norm, as in squares {(b, k)}"
            )

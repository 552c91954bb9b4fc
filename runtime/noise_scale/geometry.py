"""Noise scales in the geometry of the optimizer, from per-example gradients.

B_simple measures noise and signal in the Euclidean norm, which is that of plain SGD. What an
adaptive method does with the same gradients is measured in its own norm here.

What is known: for P a multiple of the identity, `matched_squares` gives B_simple; both its parts
are unbiased for any P that does not depend on the step's own gradients, so P must be of the second
moments before the step's update. AdaptDL scales batches by this form, and the L1 form drives the
batch in a 2026 study of non-Euclidean noise scales, there from the gradients of replicas. What is
not known: that either predicts the batch size up to which larger ones pay. McCandlish et al. derive
B_simple for SGD near a quadratic with a multiple of the identity for a Hessian; for Adam nothing
comparable is proved, v_hat holds noise itself (where noise dominates, P whitens it and tr(P Sigma
P) tends to the number of entries), and that 2026 study lost against a constant batch in its largest
AdamW run. Report them; let them act only where you have tried it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trainc.runtime.noise_scale.estimate import ROUNDING, UNDETERMINED, Estimate

if TYPE_CHECKING:
    from torch import Tensor


class Matched(NamedTuple):
    """Of P c_b: squared norms (B,), |P G|^2 (), and products with P G (B,), as `jackknife` takes."""

    squares: Tensor
    s_big: Tensor
    dots: Tensor


def matched_squares(gradients: Tensor, whole: Tensor, scale: Tensor) -> Matched:
    """Precondition contributions c_b (B, n) and the gradient `whole` = sum c_b (n,) by `scale` (n,).

    For Adam `scale` is P = 1 / (sqrt(v_hat) + eps), entry by entry. With q of the weights,
    `noise_scale_from_contributions(squares.sum(), s_big, q)` then estimates signal |P G|^2 and
    noise tr(P Sigma P). The rows need not sum to `whole`: they may be one replica's.
    """
    _check(gradients, whole=whole, scale=scale)
    import torch

    wide = torch.promote_types(gradients.dtype, torch.float32)
    each = gradients.to(wide) * scale.to(wide)
    total = whole.to(wide) * scale.to(wide)
    return Matched(each.square().sum(1), total.square().sum(), each @ total)


def l1_squares(
    gradients: Tensor, whole: Tensor, weights: Tensor, example_squares: Tensor | None = None
) -> Estimate:
    """Return (sum_i |G_i|)^2 as signal and (sum_i sigma_i)^2 as noise, for sign descent and Adam.

    gradients (B, n) are all contributions c_b of the step, whole (n,) their sum, weights (B,) sum
    to 1. sigma_i^2 = sum_b w_b (c_bi / w_b - G_i)^2 / (1 - q) is an entry's variance over examples,
    never negative and unbiased; for groups, example_squares (B,) is each one's e_b = sum of squared
    example weights, and the divisor sum_b e_b / w_b - sum_b e_b.

    The two sums themselves are plugged in, not unbiased: |G_i| never falls below its noise, so the
    ratio saturates at pi B / 2 of the step's B examples. Where entries of G are normally spread,
    1 / ratio = 1 / truth + 2 / (pi B).
    """
    _check(gradients, whole=whole)
    rows = {"weights": weights}
    if example_squares is not None:
        rows["example_squares"] = example_squares
    for name, given in rows.items():
        if given.shape != gradients.shape[:1]:
            raise ValueError(
                f"{name} are {tuple(given.shape)}, not ({len(gradients)},): one a row of gradients"
            )
    kept = weights > 0  # an example without targets is none
    c, w, g = gradients[kept].double(), weights[kept].double(), whole.double()
    each = w.square() if example_squares is None else example_squares[kept].double()
    divisor = float((each / w).sum() - each.sum())
    if len(w) < 2 or not divisor > ROUNDING * float((each / w).sum()):
        return UNDETERMINED
    deviations = c / w[:, None] - g
    variances = (w[:, None] * deviations.square()).sum(0) / divisor
    return Estimate(float(g.abs().sum()) ** 2, float(variances.sqrt().sum()) ** 2)


def _check(gradients: Tensor, **entries: Tensor) -> None:
    """Refuse gradients that are no (B, n), and tensors that are no (n,)."""
    if gradients.dim() != 2:
        raise ValueError(
            f"gradients are {tuple(gradients.shape)}, not (B, n): flatten each example's"
        )
    for name, given in entries.items():
        if given.shape != gradients.shape[1:]:
            raise ValueError(
                f"{name} is {tuple(given.shape)}, not ({gradients.shape[1]},): one number a column "
                "of gradients"
            )

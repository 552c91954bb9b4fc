"""Noise scales in the geometry of the optimizer, from per-example gradients.

B_simple measures noise and signal in the Euclidean norm, which is that of plain SGD. What an
adaptive method does with the same gradients is measured in its own norm here.

What is known: for P a multiple of the identity, the preconditioned form gives B_simple; both its
parts are unbiased for any P that does not depend on the step's own gradients, so P must be of the
second moments before the step's update. AdaptDL scales batches by this form, and the L1 form drives
the batch in a 2026 study of non-Euclidean noise scales, there from the gradients of replicas. What
is not known: that either predicts the batch size up to which larger ones pay. McCandlish et al.
derive B_simple for SGD near a quadratic with a multiple of the identity for a Hessian; for Adam
nothing comparable is proved, v_hat holds noise itself (where noise dominates, P whitens it and
tr(P Sigma P) tends to the number of entries), and that 2026 study lost against a constant batch in
its largest AdamW run. Report them; let them act only where you have tried it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainc.runtime.noise_scale.contribution_shapes import check_matrix, check_shapes
from trainc.runtime.noise_scale.estimate import ROUNDING, UNDETERMINED, Estimate


class PreconditionedNorms(NamedTuple):
    """Of P c_b: squared norms (B,), |P G|^2 (), and dot products with P G (B,), as `jackknife` takes."""

    sq_norms: Tensor
    batch_sq_norm: Tensor
    dots: Tensor


def preconditioned_norms(
    gradients: Tensor, batch_gradient: Tensor, preconditioner: Tensor
) -> PreconditionedNorms:
    """Multiply contributions c_b (B, n) and `batch_gradient` = sum c_b (n,) by a diagonal `preconditioner` (n,).

    For Adam that is P = 1 / (sqrt(v_hat) + eps). With q of the weights,
    `noise_scale_from_contributions(sq_norms.sum(), batch_sq_norm, q)` then estimates signal |P G|^2
    and noise tr(P Sigma P). The rows need not sum to `batch_gradient`: they may be one replica's.
    Raises ValueError for other shapes.
    """
    _, n = check_matrix("gradients", gradients)
    check_shapes(batch_gradient=(batch_gradient, (n,)), preconditioner=(preconditioner, (n,)))

    dtype = torch.promote_types(gradients.dtype, torch.float32)
    each = gradients.to(dtype) * preconditioner.to(dtype)
    total = batch_gradient.to(dtype) * preconditioner.to(dtype)
    return PreconditionedNorms(each.square().sum(1), total.square().sum(), each @ total)


def l1_estimate(
    gradients: Tensor,
    batch_gradient: Tensor,
    weights: Tensor,
    sum_sq_example_weights: Tensor | None = None,
) -> Estimate:
    """Return (sum_i |G_i|)^2 as signal and (sum_i sigma_i)^2 as noise, for sign descent and Adam.

    gradients (B, n) are all contributions c_b of the step, batch_gradient (n,) their sum, weights
    (B,) sum to 1. sigma_i^2 = sum_b w_b (c_bi / w_b - G_i)^2 / (1 - q) is an entry's variance over
    examples, never negative and unbiased; for groups, sum_sq_example_weights (B,) is each one's e_b,
    and the divisor sum_b e_b / w_b - sum_b e_b. Raises ValueError for other shapes.

    The two sums themselves are plugged in, not unbiased: |G_i| never falls below its noise, so the
    ratio saturates at pi B / 2 of the step's B examples. Where entries of G are normally spread,
    1 / ratio = 1 / truth + 2 / (pi B).
    """
    b, n = check_matrix("gradients", gradients)
    check_shapes(
        batch_gradient=(batch_gradient, (n,)),
        weights=(weights, (b,)),
        sum_sq_example_weights=(sum_sq_example_weights, (b,)),
    )
    kept = weights > 0  # an example without targets does not count
    c, w, g = gradients[kept].double(), weights[kept].double(), batch_gradient.double()
    each = w.square() if sum_sq_example_weights is None else sum_sq_example_weights[kept].double()
    divisor = float((each / w).sum() - each.sum())
    if len(w) < 2 or not divisor > ROUNDING * float((each / w).sum()):
        return UNDETERMINED
    deviations = c / w[:, None] - g
    variances = (w[:, None] * deviations.square()).sum(0) / divisor
    return Estimate(float(g.abs().sum()) ** 2, float(variances.sqrt().sum()) ** 2)

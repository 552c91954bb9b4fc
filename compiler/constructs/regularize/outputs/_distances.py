"""How far the logits of two passes are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Measure = Literal["mse", "kl", "js"]
Reduce = Literal["mean", "sum", "none"]
MEASURES, REDUCTIONS = ("mse", "kl", "js"), ("mean", "sum", "none")


def consistency(a: Tensor, b: Tensor, measure: Measure = "mse", reduce: Reduce = "mean") -> Tensor:
    """Return the distance of the logits of two passes, `a` and `b`, (..., classes) each; both have gradients.

    `measure` says what a row's distance is: "mse" is the sum over classes of the squared differences of the logits.
    With p and q the softmaxes, "kl" is (KL(p || q) + KL(q || p)) / 2, and "js" the Jensen-Shannon divergence
    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats. `reduce` says what becomes of the rows: "mean", "sum",
    or "none": one number a row, of shape (...).

    Returns a tensor in the dtype of the logits, float32 at least. Raises ValueError for two shapes, for logits without
    an axis of classes, and for other words.

    Source: PACE, Ni et al. 2024, arXiv:2409.17137, eq. 12 ("mse"); R-Drop, Liang et al. 2021, arXiv:2106.14448 ("kl").
    """
    import torch

    if measure not in MEASURES or reduce not in REDUCTIONS:
        raise ValueError(
            f"`measure` must be one of {MEASURES} and `reduce` one of {REDUCTIONS}, not {measure!r} and {reduce!r}"
        )
    if a.shape != b.shape or not a.dim():
        raise ValueError(
            f"`a` and `b` must be logits (..., classes) of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    each = _rows(a.to(dtype), b.to(dtype), measure)
    if reduce == "none":
        return each
    return each.mean() if reduce == "mean" else each.sum()


def _rows(a: Tensor, b: Tensor, measure: Measure) -> Tensor:
    """Return the distance of each row of logits."""
    from trainc.compiler.constructs.regularize.outputs._divergence import jensen_shannon, kl

    if measure == "mse":
        return (a - b).square().sum(-1)
    logs = a.log_softmax(-1), b.log_softmax(-1)
    return kl(*logs, "symmetric") if measure == "kl" else jensen_shannon(*logs)

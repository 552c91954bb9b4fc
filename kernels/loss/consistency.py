"""The distance of two views' logits, alone or by the operators that compute a cross-entropy with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.loss import cross_entropy_consistency as _plain  # noqa: F401  (registers it)
from trainc.kernels.loss import linear_cross_entropy_consistency as _head  # noqa: F401


@dataclass(frozen=True, slots=True)
class Consistency:
    """The mean over rows of the distance of two views' logits (2B, ..., C).

    "mse" is the sum over classes of squared differences, "kl" (KL(p || q) + KL(q || p)) / 2 of the softmaxes p and q.
    """

    distance: str

    def __call__(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the distance, 0-d, in float32 at least: a mean by the rows' `weights` (B, ...), bool or numbers.

        Without them all rows weigh the same. `cross_entropy_consistency` has the formulas.
        """
        one, two = logits.to(accumulation_dtype(logits.dtype)).chunk(2)
        if weights is not None:
            # Before anything else, so that no gradient meets what rows without a weight hold.
            used = (weights != 0).unsqueeze(-1)
            one, two = (half.where(used, 0.0) for half in (one, two))
        if self.distance == "mse":
            squares = (one - two).square()
            each = squares.sum(-1) if squares.dim() > 1 else squares
        else:
            log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
            each = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
        if weights is None:
            return each.mean()
        if weights.dtype != torch.bool:
            weights = weights.to(each.dtype)
            each = each * weights
        return each.sum() / weights.sum()

    @property
    def target(self) -> Any:
        """The operator on logits."""
        return torch.ops.trainc.cross_entropy_consistency.default

    @property
    def head_target(self) -> Any:
        """The operator on hidden states and a head."""
        return torch.ops.trainc.linear_cross_entropy_consistency.default

    def options(self, ignore_index: int, label_smoothing: float) -> tuple[Any, ...]:
        """Return the operators' arguments behind the weight."""
        return self.distance, ignore_index, label_smoothing

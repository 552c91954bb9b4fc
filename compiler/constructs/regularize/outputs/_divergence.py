"""Divergences between two sets of logits, by target: what consistency, distillation and R-Drop share.

Shapes: (..., C) logits or log probabilities of C classes; one number for each of the other axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["forward", "reverse", "symmetric"]
"""KL(p || q), KL(q || p), or half their sum."""
DIRECTIONS = "`forward`, `reverse` or `symmetric`"


def counted_rows(weights: Tensor, *logits: Tensor) -> Iterator[Tensor]:
    """Yield the logits in float32 at least, with zeros where the weight of a target, (...), bool or a number, is 0.

    Whatever the other rows hold, no gradient meets it.
    """
    import torch

    for one in logits:
        dtype = torch.promote_types(one.dtype, torch.float32)
        yield one.to(dtype).where((weights != 0).unsqueeze(-1), 0.0)


def weighted_mean(each: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of `each` (...) by the targets' weights; without a target it is not a number, as the loss is."""
    import torch

    if weights.dtype == torch.bool:
        return each.where(weights, 0.0).sum() / weights.sum()
    return (each * weights.to(each.dtype)).sum() / weights.sum().to(each.dtype)


def kl(log_p: Tensor, log_q: Tensor, direction: Direction = "forward") -> Tensor:
    """Return KL(p || q), KL(q || p) or half their sum of log probabilities, (...).

    A class that is masked by -inf has no probability and adds nothing.
    """
    p, q = log_p.exp(), log_q.exp()
    factor, absent = {
        "forward": (p, p == 0),
        "reverse": (-q, q == 0),
        "symmetric": ((p - q) / 2, (p == 0) & (q == 0)),
    }[direction]
    return (factor * (log_p - log_q).masked_fill(absent, 0.0)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 of log probabilities, (...): at most ln 2."""
    import math

    import torch

    p, q = log_p.exp(), log_q.exp()
    absent = (p == 0) & (q == 0)
    # Before the sum, whose gradient at two classes of probability 0 is not a number.
    one, two = (log.masked_fill(absent, 0.0) for log in (log_p, log_q))
    middle = torch.logaddexp(one, two) - math.log(2)
    terms = (
        part * (log - middle).masked_fill(part == 0, 0.0) for part, log in ((p, one), (q, two))
    )
    return sum(terms, start=torch.zeros_like(middle)).sum(-1) / 2

"""The temperature by which logits have to be divided for the smallest cross-entropy, from sums over predictions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 20.0
"""Temperatures from 1 / LIMIT to LIMIT are looked at."""
POINTS = 33
"""At how many of them the slopes are summed up, at equal ratios."""
ROWS = 2048
"""How many predictions are taken at a time, in double precision."""


def slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """Return sums over predictions of the slope of -ln p(target), and of the slope's slope, float64 (POINTS, 2).

    They are by x = ln(1 / T) at equally spaced x, for logits (n, classes) divided by T; `targets` are (n,). With a
    target whose logit is -inf no T makes p(target) more than 0, and the sums are not finite.
    """
    import torch

    found = torch.zeros(POINTS, 2, dtype=torch.float64, device=logits.device)
    for z, y in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        z = z.double()
        z = z - z.amax(-1, keepdim=True)
        known = torch.where(z.isfinite(), z, 0.0)  # a class that cannot be has p = 0
        of_target = z.gather(1, y[:, None])[:, 0]
        for i, x in enumerate(_places()):
            beta = math.exp(x)
            p = (beta * z).softmax(-1)
            mean = (p * known).sum(-1)
            variance = (p * (known - mean[:, None]).square()).sum(-1)
            slope = beta * (mean - of_target)
            found[i, 0] += slope.sum()
            found[i, 1] += (slope + beta * beta * variance).sum()
    return found.cpu()


def _places() -> list[float]:
    low, high = -math.log(LIMIT), math.log(LIMIT)
    return [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]


def temperature(sums: Tensor) -> float | None:
    """Return the temperature of the smallest mean of -ln p(target), from sums of `slopes`.

    The cross-entropy is convex in 1 / T, so that its slope has one root; it is that of a cubic between two places. None
    where it is beyond the places, as of predictions that are all right, which get better as T goes to 0.
    """
    places, rows = _places(), sums.tolist()
    for (x, (g, dg)), (next_x, (next_g, next_dg)) in zip(
        zip(places, rows, strict=True), zip(places[1:], rows[1:], strict=True), strict=False
    ):
        if g <= 0 < next_g:
            width = next_x - x
            low, high = 0.0, 1.0
            for _ in range(60):
                t = (low + high) / 2
                value = (
                    (1 + 2 * t) * (1 - t) ** 2 * g
                    + t * (1 - t) ** 2 * width * dg
                    + t * t * (3 - 2 * t) * next_g
                    + t * t * (t - 1) * width * next_dg
                )
                low, high = (t, high) if value <= 0 else (low, t)
            return math.exp(-(x + low * width))
    return None

"""Norm growth: how long the weights are, how they move, and which law their length follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering

# Laws a norm may follow, as functions of t, the number of updates.
LAWS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "log": math.log,
    "root4": lambda t: float(t**0.25),
}


class NormGrowth(Construct):
    """Reports the length of the selected weights, their steps and the length's growth; reads only.

    With w the weights, v those at the observation before and d = w - v, per parameter and over the
    selection: norm |w|, step |d|, alignment cos(d, v), direction cos(w, v); a cosine with a zero
    vector is 0, and the first observation has only norms. The selection's norm is fitted by least
    squares, a + b f(t), with f(t) = sqrt(t), t, ln(t) and t^(1/4), t counting updates; from three
    observations on `fit` is the best r2. Weights that step along themselves grow exponentially;
    steps at right angles to the weights, with rates of 1/sqrt(t), give sqrt(t).
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe norm_growth on ndim(2) every 50 steps { from_start = true }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "norm": "L2 norm of the selected weights, in their unit",
        "step": "L2 norm of their change since the observation before, in their unit",
        "alignment": "cosine of that change and the weights before it, -1 to 1",
        "direction": "cosine of the weights and the weights before, -1 to 1",
        "fit": "largest r2 of the norm's fits, 0 to 1",
        "distance": "with `from_start`, L2 distance from the weights at the start, in their unit",
    }
    effects: ClassVar = (
        Effect("rates", "keep the weights at the start", ("params",)),
        Effect(
            "observe",
            "measure norms and steps",
            ("params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    from_start: bool = Field(
        default=False,
        description="report the distance from the weights as first found, at one more copy",
    )

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it keeps the start only when asked to."""
        return effect.phase != "rates" or self.from_start

    def reference(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
        """Return the four measures of a selection by definition, in float64."""
        import torch

        v = torch.cat([tensor.detach().double().flatten() for tensor in before])
        w = torch.cat([tensor.detach().double().flatten() for tensor in now])
        cosine = torch.nn.functional.cosine_similarity
        return {
            "norm": float(w.norm()),
            "step": float((w - v).norm()),
            "alignment": float(cosine(w - v, v, dim=0, eps=1e-300)),
            "direction": float(cosine(w, v, dim=0, eps=1e-300)),
        }

    def lower(self, to: Lowering) -> None:
        """Observe after updates; with `from_start` also copy the weights before the first one."""
        from trainc.compiler.constructs.observe._norm_growth import Observe, Start

        parameters = to.parameters()
        start = Start(f"{to.label}.start", parameters) if self.from_start else None
        if start is not None:
            to.action(start)
        to.action(Observe(to.label, parameters, start))

"""Norm growth: the norm of the weights, their steps, and the law that the norm follows."""

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
    """Reports the norm of the selected weights, how they move and how the norm grows; changes nothing.

    With w the weights, v those of the previous observation and d = w - v, per parameter and over
    the selection: norm |w|, step |d|, alignment cos(d, v), direction cos(w, v). A cosine with a
    zero vector is 0, and the first observation has norms only. The norm of the selection is fitted
    by least squares to a + b f(t) with f(t) = sqrt(t), t, ln(t) and t^(1/4), where t counts
    updates; from three observations on, `fit` is the best r2. Weights whose steps are along
    themselves grow exponentially; steps at right angles to the weights, with rates of 1/sqrt(t),
    give sqrt(t).
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe norm_growth on ndim(2) every 50 steps { from_start = true }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "norm": "L2 norm of the selected weights",
        "step": "L2 norm of their change since the previous observation",
        "alignment": "cosine of that change and the previous weights, -1 to 1",
        "direction": "cosine of the weights and the previous weights, -1 to 1",
        "fit": "largest r2 of the fits of the norm, 0 to 1",
        "distance": "with `from_start`, L2 distance from the weights at the start",
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
        description="report the distance from the starting weights, which needs one more copy of them",
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
        """Observe after updates; with `from_start`, also copy the weights before the first update."""
        from trainc.compiler.constructs.observe._norm_growth import Observe, Start

        parameters = to.parameters()
        start = Start(f"{to.label}.start", parameters) if self.from_start else None
        if start is not None:
            to.action(start)
        to.action(Observe(to.label, parameters, start))

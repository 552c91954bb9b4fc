"""Gradient-norm penalty: the gradient of loss + alpha radius |gradient|, to first order, from two passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.perturb._base import (
    UNDO,
    KeptAscent,
    Mix,
    TwoPasses,
    sizes_of,
    trained_names,
)
from trainc.dsl.reading.construct import Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class GradientNorm(TwoPasses):
    """Updates the weights w with (1 - alpha) g(w) + alpha g(w + radius g(w) / |g(w)|).

    To first order in `radius` that is the gradient of L + alpha radius |g|: the norm of the gradient
    is penalized with a weight of alpha times `radius`, without second derivatives. |.| is one L2
    norm over the selected parameters, which move; the gradients of all parameters that train are
    mixed. With `alpha` = 1 it is SAM. Clipping sees the mixed gradient; statistics and the loss
    reported are of the second pass. Both passes have the same noise and dropout, and BatchNorm takes
    its running statistics from the second. w comes back bit for bit before the update. A g(w) that
    is not finite moves nothing. A step costs two, and a copy of the gradient.
    """

    cite: ClassVar = (
        "Zhao, Zhang, Hu, Penalizing Gradient Norm for Efficiently Improving Generalization in Deep "
        "Learning, ICML 2022, arXiv:2202.03599"
    )
    usage: ClassVar = "perturb gradient_norm { radius = 0.05, alpha = 0.8 }"
    identity: ClassVar = {"radius": "0", "alpha": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the weights up the gradient of a first pass",
            ("params", "inputs", "clock"),
            ("params",),
        ),
        UNDO,
        Effect("gradients", "mix in the gradient of the first pass", ("gradient",), ("gradient",)),
    )

    radius: Schedule = Field(description="length of the step from the weights, 0 or more")
    alpha: float = Field(
        ge=0, le=1, description="part of the gradient at the moved weights, 0 to 1"
    )

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step, and mix the gradients of both."""
        ascent = KeptAscent(to.label, to.schedule(self.radius), sizes_of(to))
        to.around(ascent)
        mix = Mix(f"{to.label}.mix", self.alpha, ascent, to.trained_entries())
        to.gradient(mix, trained_names(to))

    def reference(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mixed gradient of those at w and at the moved weights, by definition."""
        return (1 - self.alpha) * first + self.alpha * second

"""SAM and ASAM: the gradient from the point nearby where the loss is highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.perturb._base import UNDO, Ascent, TwoPasses, norm_of, sizes_of
from trainc.dsl.reading.construct import Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.schedule.clock import Clock

ETA = 0.01
"""What ASAM adds to |w| unless `eta` says otherwise, as published."""


class Sam(TwoPasses):
    """Updates the weights w with the gradient at w + e, where e is a step of length `rho` up the loss.

    With g the gradient of the step's loss at w, e = rho g / |g|. With `adaptive` (ASAM) the step is
    longer for larger weights: e = rho T^2 g / |T g| with T = |w| + eta. |.| is one L2 norm over all
    selected parameters, also where several optimizers train them. g is of all micro-batches and
    replicas; clipping, masks and what is measured see the gradient at w + e alone, and the loss
    reported is that at w + e. Entries that a mask does not train do not move. Both passes have the
    same noise and dropout, and BatchNorm takes its running statistics from the second. w comes back
    bit for bit before the update. A g that is not finite moves nothing. A step costs two. A second
    clause acts after the first: its g is the gradient where the first has moved the weights to.
    """

    cite: ClassVar = (
        "Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021, "
        "arXiv:2010.01412; adaptive: Kwon et al., ASAM, ICML 2021, arXiv:2102.11600"
    )
    usage: ClassVar = "perturb sam { rho = 0.05 }"
    identity: ClassVar = {"rho": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the weights up the gradient of a first pass",
            ("params", "inputs", "clock"),
            ("params",),
        ),
        UNDO,
    )

    rho: Schedule = Field(description="length of the step from the weights, 0 or more")
    adaptive: bool = Field(
        default=False, description="ASAM: scale the step with the size of each weight"
    )
    eta: float | None = Field(
        default=None,
        ge=0,
        description=f"with `adaptive`, what is added to the size of a weight; {ETA} unless given",
    )

    @field_validator("eta")
    @classmethod
    def _needs_adaptive(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and not info.data.get("adaptive"):
            raise ValueError("`eta` is part of ASAM: add `adaptive = true`, or remove `eta`")
        return value

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step with the change of the selected parameters that train."""
        to.around(Perturbation(to.label, self, to.schedule(self.rho), sizes_of(to)))

    def reference(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rho: float
    ) -> dict[str, Tensor]:
        """Return e by parameter, by definition."""
        factor = rho / (self.norm(weights, gradients) + 1e-12)
        return {name: self._direction(weights[name], g) * factor for name, g in gradients.items()}

    def norm(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
        """Return |g|, or |T g| with `adaptive`, over all gradients."""
        if not self.adaptive:
            return norm_of(gradients.values())
        return norm_of(self._scale(weights[name]) * g for name, g in gradients.items())

    def _direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return g, or T^2 g with `adaptive`."""
        return self._scale(weight).square() * gradient if self.adaptive else gradient

    def _scale(self, weight: Tensor) -> Tensor:
        return weight.abs() + (ETA if self.eta is None else self.eta)


class Perturbation(Ascent):
    """Runs the passes of a step at w + e."""

    def __init__(
        self, name: str, method: Sam, rho: Callable[[Clock], float], sizes: Mapping[str, int]
    ) -> None:
        super().__init__(name, rho, sizes)
        self.method = method

    def norm(self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
        """Return |g|, or |T g| of ASAM."""
        return self.method.norm(weights, found)

    def moves(
        self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], length: float, norm: float
    ) -> dict[str, Tensor]:
        """Return e."""
        return self.method.reference(weights, found, length)

"""SAM and ASAM: the gradient from the point nearby where the loss is highest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.runtime.step.around import Around, Gradients, KeptWeights

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step

ETA = 0.01
"""What ASAM adds to |w| unless `eta` says otherwise, as published."""


class Sam(Construct):
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
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    identity: ClassVar = {"rho": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the weights up the gradient of a first pass",
            ("params", "inputs", "clock"),
            ("params",),
        ),
        Effect("undo", "give the weights their values back", ("params",), ("params",)),
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

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a selection in which all parameters are frozen; warn of weights in 16 bits."""
        trainable = [p for p in bound.parameters if p.trainable]
        if bound.parameters and not trainable:
            message = f"all {len(bound.parameters)} selected parameters are frozen"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        small = [p.name for p in trainable if p.dtype in ("bfloat16", "float16")]
        if small:
            more = f" and {len(small) - 1} more" if small[1:] else ""
            message = f"16 bits, in which `{small[0]}`{more} is stored, round most of so small a step away"
            help_ = "keep the weights in float32 and compute in 16 bits, under torch.autocast"
            yield Problem("no-effect", message, help=help_, severity="warning")

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step with the change of the selected parameters that train."""
        trained = [entry for entry in to.parameters() if entry.trainable]
        sizes = {entry.name: entry.bytes for entry in trained}
        to.around(Perturbation(to.label, self, to.schedule(self.rho), sizes))

    def reference(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rho: float
    ) -> dict[str, Tensor]:
        """Return e by parameter, by definition."""
        factor = rho / (self.norm(weights, gradients) + 1e-12)
        return {
            name: self._direction(weights[name], g) * factor.to(g.device)
            for name, g in gradients.items()
        }

    def norm(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        """Return |g|, or |T g| with `adaptive`, over all gradients: 0-d, float32 at least."""
        import torch

        squares = []
        for name, gradient in gradients.items():
            scaled = self._scale(weights[name]) * gradient if self.adaptive else gradient
            kind = torch.promote_types(scaled.dtype, torch.float32)
            squares.append(torch.linalg.vector_norm(scaled, dtype=kind).square())
        device = squares[0].device
        return torch.stack([square.to(device) for square in squares]).sum().sqrt()

    def _direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return g, or T^2 g with `adaptive`."""
        return self._scale(weight).square() * gradient if self.adaptive else gradient

    def _scale(self, weight: Tensor) -> Tensor:
        return weight.abs() + (ETA if self.eta is None else self.eta)


class Perturbation(Around):
    """Runs the passes of a step at w + e; keeps nothing from step to step but counts for the summary."""

    figures = ("moved", "not_finite", "low", "high")

    def __init__(
        self, name: str, method: Sam, rho: Callable[[Clock], float], sizes: Mapping[str, int]
    ) -> None:
        self.name, self.method, self.rho, self.sizes = name, method, rho, sizes
        self.moved = self.not_finite = 0
        self.low, self.high = math.inf, 0.0

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Hold the weights at w + e."""
        rho = self.rho(step.clock)
        moves = self._moves(step, gradients, rho) if rho else {}
        weights = [step.parameters[name].detach() for name in moves]
        with KeptWeights(weights):
            for weight, move in zip(weights, moves.values(), strict=True):
                weight.add_(move)
            moves.clear()  # the passes need the memory
            yield

    def _moves(self, step: Step, gradients: Gradients, rho: float) -> dict[str, Tensor]:
        """Return e by parameter, with the gradient at the weights of now; none where that is not finite."""
        found = {name: g for name, g in gradients().items() if name in self.sizes}
        if not found:
            step.notes.append(f"{self.name}: no selected parameter has a gradient, so none moved")
            return {}
        weights = {name: step.parameters[name].detach() for name in found}
        norm = float(self.method.norm(weights, found))
        if not math.isfinite(norm):
            self.not_finite += 1
            step.notes.append(f"{self.name}: the gradient is not finite, so no weight moved")
            return {}
        self.low, self.high = min(self.low, norm), max(self.high, norm)
        self.moved += 1
        return self.method.reference(weights, found, rho)

    def memory(self) -> int:
        """Return the bytes of the copies of the weights."""
        return sum(self.sizes.values())

    def summary(self) -> str | None:
        """Say in how many steps weights moved, and the range of the norm of the first gradient."""
        if not self.moved and not self.not_finite:
            return f"{self.name}: no weight moved"
        seen = f", with |g| from {self.low:.3g} to {self.high:.3g}" if self.moved else ""
        left = (
            f"; not in {self.not_finite} whose gradient was not finite" if self.not_finite else ""
        )
        steps = f"{self.moved} step{'s' * (self.moved != 1)}"
        return f"{self.name}: moved the weights for the passes of {steps}{seen}{left}"

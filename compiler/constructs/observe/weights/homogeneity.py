"""Homogeneity: whether the output grows as a power of a number that multiplies all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.observe.weights._scaled import OUTPUT, Scaled
from trainc.dsl.reading.construct import Construct, Effect, ModuleSelector, Signal

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.processes.replica_group import ReplicaGroup


class Homogeneity(Construct):
    """Reports |f(x; c theta) - c^k f(x; theta)| / |f(x; c theta)|, and k, where c multiplies all parameters.

    A network is k-homogeneous where this is 0 for all c: a linear layer adds 1 to k, a normalization
    without weights gives 0, a ReLU and a sum of equals keep k, and a product adds degrees; biases and
    softmaxes spoil it. The norms are over all logits of the counted targets. Without `degree`, k is the
    one with the smallest error: c^k = f(x; c theta) . f(x; theta) / |f(x; theta)|^2; it has no value where
    this product is negative. Each of `layers` has a degree and an error of its own in the records. The
    smaller errors are, the more the directions of gradients are those of the saturated network, which
    `observe saturation` measures.

    Both passes are of the step's examples and of the weights before its update, without gradient, by a copy
    of the model in eval mode that shares its weights: the model, its weights, BatchNorm's statistics and
    random numbers stay as they are, bit for bit. Forward hooks of your own run in both as well. The
    multiplied weights take as much memory as the parameters while the pass runs. BatchNorm normalizes by
    running statistics, which are not multiplied; one that keeps none is an error.
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe homogeneity every 200 steps { c = 2 }"
    default_every: ClassVar = "200 steps"
    signals: ClassVar = {
        "": Signal("relative distance from a homogeneous network, 0 or more", title=""),
        "degree": Signal("the degree k", title="degree"),
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "pass the examples twice more, once with all weights multiplied",
            ("params", "inputs", "forward", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    c: float = Field(default=2.0, gt=1, description="what all parameters are multiplied by")
    degree: float | None = Field(
        default=None,
        ge=0,
        description="the degree k that is compared with; fitted where it is left out",
    )
    layers: ModuleSelector | None = Field(
        default=None, description="modules whose outputs are compared as well, such as blocks"
    )

    def lower(self, to: Lowering) -> None:
        """Read the steps with a copy of the model that has the model's own weights."""
        to.observe(Homogeneous.reading(to, self))

    def reference(self, plain: Tensor, scaled: Tensor) -> tuple[float | None, float]:
        """Return the degree and the relative error of outputs f(x; theta) and f(x; c theta), of any one shape."""
        f, g = plain.double().flatten(), scaled.double().flatten()
        power = float(f @ g / (f @ f)) if self.degree is None else self.c**self.degree
        degree = math.log(power) / math.log(self.c) if power > 0 else None
        return degree, float((g - power * f).norm() / g.norm())


class Homogeneous(Scaled[Homogeneity]):
    """Adds up the products of two outputs by layer."""

    measured = "distance from a homogeneous network"

    def compare(self, plain: Tensor, scaled: Tensor) -> Tensor:
        import torch

        finite = scaled.isfinite().all(-1)
        f, g = plain[finite].flatten(), scaled[finite].flatten()
        ff, gg, fg = f @ f, g @ g, f @ g
        rest = (g - self._power(ff, fg) * f).square().sum()
        return torch.stack([ff, gg, fg, rest, (~finite).sum().double()]).cpu()

    def _power(self, ff: Tensor, fg: Tensor) -> Tensor:
        """Return c^k, 0 where it is fitted to nothing."""
        import torch

        if self.construct.degree is not None:
            return ff.new_tensor(self.factor**self.construct.degree)
        return torch.where(ff > 0, fg / ff, 0.0)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the sums of both; the distance from the common power, without differences of large numbers."""
        both = one + other
        for part in (one, other) if self.construct.degree is None else ():
            ff, _, fg, _, _ = part
            apart = self._power(ff, fg) - self._power(both[0], both[2])
            both[3] += ff * apart.square()
        return both

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        """Return degree and error of the output, of all replicas."""
        import torch

        sums = self.gathered(replicas)
        self.overflowed = any(odd > 0 for *_, odd in sums.values())
        errors, degrees = {}, {}
        for name, (ff, gg, fg, rest, _) in sums.items():
            if not (ff and gg):
                continue
            power = float(self._power(*torch.tensor((ff, fg), dtype=torch.float64)))
            errors[name] = math.sqrt(rest / gg)
            if power > 0:
                degrees[name] = math.log(power) / math.log(self.factor)
        found = {"": errors.pop(OUTPUT)} if OUTPUT in errors else {}
        if OUTPUT in degrees:
            found["degree"] = degrees.pop(OUTPUT)
        self.by_part = {"": errors, "degree": degrees}
        self.remember(found.get(""))
        return found

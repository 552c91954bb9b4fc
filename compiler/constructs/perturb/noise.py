"""Weight noise: in every step layers compute with weights that have normal noise added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.method.weight_hook import WeightHook
from trainc.dsl.reading.construct import Construct, Effect, Schedule
from trainc.dsl.values.value_json import Name

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_hook import LayerContext
    from trainc.compiler.method.lowered_method import Scheduled
    from trainc.runtime.schedule.clock import Clock

Scale = Literal["absolute", "rms", "row_norm"]


class Noise(Construct):
    """Lets layers compute with W + s * Normal(0, 1) in place of W, drawn once for each step and entry.

    s is `sigma` itself, `sigma` times the root mean square of W (`scale = rms`), or for each row `sigma` times
    |W_row| / sqrt(n), where n is the length of the row (`row_norm`). A row is what makes one output; a vector is one
    row. W is the weight of the step with the updates of adapters that change it, so that the frozen weights of adapted
    layers can be selected. With `ramp = cosine` sigma is multiplied by (1 - cos(pi t)) / 2, where t goes from 0
    to 1 over the run: the form of Flat-LoRA. No gradient flows through s; the stored weight is never written to, so
    that weights in 16 bits come to no harm. Entries that a mask does not train have no noise. Evaluation has none.
    """

    cite: ClassVar = (
        "Graves, Practical Variational Inference for Neural Networks, NeurIPS 2011; by rows, with the ramp: Li et al.,"
        " Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape, ICML 2025, arXiv:2409.14396"
    )
    usage: ClassVar = (
        'perturb noise on "blocks.**" & ndim(2) { sigma = 0.05, scale = row_norm, ramp = cosine }'
    )
    targets: ClassVar = "parameters"
    identity: ClassVar = {"sigma": "0"}
    effects: ClassVar = (
        Effect("forward", "add noise to weights", ("params", "clock"), ("forward",)),
    )

    sigma: Schedule = Field(description="standard deviation of the noise, in units of `scale`")
    scale: Scale = Field(
        default="absolute",
        description="what `sigma` is multiplied by: 1, the root mean square of the tensor, or that of each row",
    )
    ramp: Literal["none", "cosine"] = Field(
        default="none", description="how sigma rises over the run: not, or from 0 as a cosine"
    )

    def lower(self, to: Lowering) -> None:
        """Change the selected parameters where layers compute with them."""
        sigma = to.schedule(self.sigma)
        if self.ramp == "cosine":
            sigma = _risen(sigma, to.schedule(Name("progress")))
        to.show("sigma", to.while_open(sigma))
        for entry in to.parameters():
            transposed = bool({"Conv1D", "_ConvTransposeNd"} & {*entry.types})
            hook = Noisy(self.scale, transposed and entry.ndim > 1)
            to.weight(entry.name, hook, {"sigma": sigma})

    def reference(self, weight: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Return what a layer computes with, by definition, from standard normal `noise`; rows on the first axis."""
        import torch

        rows = weight.reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
        normal = noise.reshape(rows.shape)
        found = []
        for row, drawn in zip(rows, normal, strict=True):
            scale: Tensor | float = 1.0
            if self.scale == "row_norm":
                scale = row.detach().norm() / len(row) ** 0.5
            elif self.scale == "rms":
                scale = weight.detach().square().mean().sqrt()
            found.append(row + sigma * scale * drawn)
        return torch.stack(found).reshape(weight.shape)


@dataclass(frozen=True)
class Noisy(WeightHook):
    """Adds normal noise to a weight; its number is `sigma`."""

    operator: ClassVar = "random_entries"
    zero_is_identity: ClassVar = True
    of_untrained: ClassVar = False

    scale: Scale
    transposed: bool
    """Whether the rows are on the second axis."""

    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return the weight with noise."""
        noise = self.random(weight, at, "normal")
        spread = at.scalars["sigma"].to(noise.dtype)
        if self.scale != "absolute":
            spread = spread * self.size(at.merged(weight).detach().to(noise.dtype))
        return weight + at.unmerged(spread * noise)

    def size(self, weight: Tensor) -> Tensor:
        """Return the root mean square of a weight, or of each of its rows, of a shape that broadcasts with it."""
        square = weight.square()
        if self.scale == "rms" or weight.dim() < 2:
            return square.mean().sqrt()
        row = 1 if self.transposed else 0
        return square.mean([axis for axis in range(weight.dim()) if axis != row], True).sqrt()


def _risen(sigma: Scheduled, progress: Scheduled) -> Scheduled:
    """Return sigma times (1 - cos(pi t)) / 2."""

    def at(clock: Clock) -> float:
        return sigma(clock) * (1 - math.cos(math.pi * min(progress(clock), 1.0))) / 2

    return at

"""Outputs of layers that are drawn towards a root mean square of 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.dsl.reading.construct import Construct, Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class Rescaled(Construct):
    """Gives (1 - s) y + s y / rms(y) in place of the output y of a layer, where s is the `strength`."""

    cite: ClassVar = "Zhang and Sennrich, NeurIPS 2019, arXiv:1910.07467"
    usage: ClassVar = "normalize rescaled on type(Linear) from 1 steps { strength = 0.5 }"
    targets: ClassVar = "modules"
    identity: ClassVar = {"strength": "0"}
    effects: ClassVar = (Effect("forward", "rescale outputs", ("inputs", "clock"), ("forward",)),)

    strength: Schedule = Field(description="part of the output that is rescaled")

    def lower(self, to: Lowering) -> None:
        """Change the output of each layer."""
        for module in to.modules():
            to.layer(module.name, Rescale(), {"strength": to.schedule(self.strength)})


class Rescale(LayerHook):
    """Draws an output towards a root mean square of 1."""

    draws: ClassVar = False
    zero_is_identity: ClassVar = True

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return the rescaled output."""
        strength = at.scalars["strength"]
        size = (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (1 - strength) * y + strength * (y / size)

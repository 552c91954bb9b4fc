"""A trained factor on the outputs of a layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.lower.adapting import Adapting


class Gain(Construct, AdapterRule):
    """Multiplies each output by `1 + strength * g` with a trained g, which starts at zero; nothing else trains."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "adapt gain on type(Linear) { strength = 2 }"
    targets: ClassVar = "modules"
    identity: ClassVar = {"strength": "0"}
    effects: ClassVar = (Effect("forward", "multiply outputs", ("params", "inputs"), ("forward",)),)

    strength: float = Field(description="what g is multiplied by")

    def adapt(self, to: Adapting) -> None:
        """Add g to the selected layers."""
        for entry in to.modules():
            outputs = len(to.module(entry.name).weight)  # type: ignore[arg-type]
            to.add(entry.name, partial(self.parts, outputs))
        to.train_only([])

    def parts(self, outputs: int) -> dict[str, nn.Parameter]:
        """Return g, without values."""
        import torch
        from torch import nn

        return {"g": nn.Parameter(torch.empty(outputs))}

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Set g to zero."""
        tensor.zero_()

    def run_adapter(self, adapter: Any, *inputs: Tensor) -> Tensor:
        """Return the factor."""
        factor: Tensor = 1 + self.strength * adapter.g
        return factor

    def change_output(self, layer: Any, adapter: Any, inputs: Any, output: Tensor) -> Tensor:
        """Multiply by the factor."""
        changed: Tensor = output * adapter(*inputs)
        return changed

    def merge(self, layer: Any, adapter: Any) -> None:
        """Multiply the rows of the weight."""
        factor = self.run_adapter(adapter)
        layer.weight.mul_(factor[:, None])
        layer.bias.mul_(factor)

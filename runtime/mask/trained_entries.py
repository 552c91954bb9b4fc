"""The entries of parameters that train, as optimizers have them, and the whole parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainc.runtime.mask.update_mask import UpdateMask


@dataclass(frozen=True)
class TrainedEntries:
    """Turns tensors of a parameter's shape into what an optimizer has of them, and back, by the masks of now.

    Without a mask both are the same. Where a mask selects entries, an optimizer has a vector of them (k,); where one
    keeps entries at zero, it has tensors of the parameter's shape.
    """

    masks: Mapping[str, UpdateMask]

    def picked(self, name: str, tensor: Tensor) -> Tensor:
        """Return of a tensor in the shape of parameter `name` what the optimizer has of it."""
        return self.masks[name].picked(tensor) if name in self.masks else tensor

    def trained(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the shape of parameter `name` with zeros at entries that do not train."""
        return self.masks[name].trained(tensor) if name in self.masks else tensor

    def whole(self, name: str, values: Tensor) -> Tensor:
        """Return what the optimizer has of parameter `name` in its shape, with zeros at entries that do not train."""
        return self.masks[name].whole(values) if name in self.masks else values

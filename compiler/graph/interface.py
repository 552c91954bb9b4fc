"""What goes in and out of a step graph: the batch it was captured for, its scalars and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainc.compiler.graph.listing import dtype_name

InputStructure = Literal["tensor", "tuple", "dict"]


class BatchMismatch(ValueError):
    """The batch is not of the shape, dtype or device the graph was captured for."""


@dataclass(frozen=True, slots=True)
class Port:
    """A batch input: its placeholder, its key in the inputs, and what it must look like."""

    name: str
    key: str | int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, name: str, key: str | int | None, tensor: Tensor) -> Port:
        """Describe a tensor as a port."""
        return cls(name, key, tuple(tensor.shape), tensor.dtype, str(tensor.device))

    def takes(self, tensor: Tensor) -> bool:
        """Say whether a tensor fits."""
        return (
            tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and str(tensor.device) == self.device
        )

    def __str__(self) -> str:
        label = self.name if self.key is None else f"inputs[{self.key!r}]"
        return f"{label} {dtype_name(self.dtype)}{list(self.shape)} on {self.device}"


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out of a step graph; `scalars` pairs a scalar's name with its placeholder.

    Outputs are `total`, `loss`, `data_loss`, `consistency`, `grad:<parameter>` and `probe:<module>`.
    """

    structure: InputStructure
    inputs: tuple[Port, ...]
    targets: Port
    scalars: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    views: int = 1

    @property
    def ports(self) -> tuple[Port, ...]:
        """Return the batch ports in placeholder order."""
        return (*self.inputs, self.targets)


@dataclass(slots=True)
class Outputs:
    """The results of one step.

    `loss` is the micro-batch's mean: `data_loss` plus the weighted consistency. `total` is what was
    differentiated: the loss and the penalties, times the weight of the micro-batch in the step.
    `grads` holds None for a trainable parameter that the loss does not depend on.
    """

    loss: Tensor
    total: Tensor
    data_loss: Tensor
    consistency: Tensor | None
    grads: dict[str, Tensor | None]
    probes: dict[str, Tensor]


def flatten_inputs(inputs: Any) -> tuple[InputStructure, list[tuple[str | int | None, Tensor]]]:
    """Return how the model's inputs are packed, and the tensors with their keys.

    Raises TypeError for anything but a tensor, a tuple or a dict.
    """
    if isinstance(inputs, Tensor):
        return "tensor", [(None, inputs)]
    if isinstance(inputs, Mapping):
        return "dict", list(inputs.items())
    if isinstance(inputs, Sequence):
        return "tuple", list(enumerate(inputs))
    raise TypeError(
        f"the inputs of a batch must be a tensor, a tuple or a dict of tensors, and are {type(inputs).__name__}"
    )

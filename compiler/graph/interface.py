"""What goes in and out of a step graph: the batch it was captured for, its scalars and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainc.compiler.graph.listing import dtype_name
from trainc.compiler.graph.named_tensors import identifier
from trainc.runtime.data.batch import Batch

InputStructure = Literal["tensor", "tuple", "dict"]


class BatchMismatch(ValueError):
    """The batch has another shape, dtype or device than the graph was captured for."""


@dataclass(frozen=True, slots=True)
class Port:
    """A batch input: its placeholder, its key in the inputs, and what it must look like."""

    name: str
    key: str | int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        label = self.name if self.key is None else f"inputs[{self.key!r}]"
        return f"{label} {dtype_name(self.dtype)}{list(self.shape)} on {self.device}"


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out of a step graph.

    `ports` are the inputs and, last, the targets; `scalars` pairs a scalar's name with its placeholder.
    Outputs are `total`, `loss`, `data_loss`, `consistency`, `term:<label>` of each penalty, `grad:<parameter>` and
    `probe:<module>`.
    """

    structure: InputStructure
    ports: tuple[Port, ...]
    scalars: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    views: int = 1

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the labels of the penalties in the loss, in order."""
        return tuple(name[5:] for name in self.outputs if name.startswith("term:"))


@dataclass(slots=True)
class Outputs:
    """The results of one step.

    `loss` is the micro-batch's mean: `data_loss` plus the weighted consistency. `total` is what was
    differentiated: the loss and the penalties, times the weight of the micro-batch in the step.
    `terms` holds each penalty by its label, before that weight.
    `grads` holds None for a trainable parameter that the loss does not depend on.
    """

    loss: Tensor
    total: Tensor
    data_loss: Tensor
    consistency: Tensor | None
    terms: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    probes: dict[str, Tensor]


def describe_batch(batch: Batch) -> tuple[InputStructure, tuple[Port, ...], list[Tensor]]:
    """Return how the inputs are packed, and the port and the tensor of each input and, last, of the targets.

    Raises TypeError for inputs that are not a tensor, or a tuple or a dict of tensors.
    """
    inputs, targets = batch
    structure, entries = _flatten(inputs)
    named: dict[str, tuple[str | int | None, Tensor]] = {}
    for key, tensor in entries:
        name = "inputs" if key is None else identifier(f"inputs_{key}")
        while name in named:
            name += "_"
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"a graph takes a tensor, or a tuple or a dict of tensors, and the input `{key}` is"
                f" {type(tensor).__name__}"
            )
        named[name] = key, tensor
    named["targets"] = None, targets
    ports = (
        Port(name, key, tuple(tensor.shape), tensor.dtype, str(tensor.device))
        for name, (key, tensor) in named.items()
    )
    return structure, tuple(ports), [tensor for _, tensor in named.values()]


def _flatten(inputs: Any) -> tuple[InputStructure, list[tuple[str | int | None, Tensor]]]:
    if isinstance(inputs, Tensor):
        return "tensor", [(None, inputs)]
    if isinstance(inputs, Mapping):
        return "dict", list(inputs.items())
    if isinstance(inputs, Sequence):
        return "tuple", list(enumerate(inputs))
    raise TypeError(
        f"a graph takes a tensor, or a tuple or a dict of tensors, and the inputs are {type(inputs).__name__}"
    )

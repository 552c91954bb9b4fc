"""What goes in and out of a step graph: the batch it was captured for, its scalars and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trainc.compiler.graph.listing import dtype_name
from trainc.compiler.graph.named_tensors import identifier
from trainc.compiler.graph.sizes import Shapes, Size, condition
from trainc.compiler.method.term import TERM
from trainc.runtime.data.batch import Batch

InputStructure = Literal["tensor", "tuple", "dict"]
TARGETS = "targets"
"""The placeholder of targets that are one tensor, and how those of several begin."""


class BatchMismatch(ValueError):
    """The batch has another shape, dtype or device than the graph was captured for."""


@dataclass(frozen=True, slots=True)
class Port:
    """A batch input: its placeholder, its key in the inputs, and what it must look like.

    A size by name may be any from 2 on.
    """

    name: str
    key: str | int | None
    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        whose = TARGETS if self.is_target else "inputs"
        label = self.name if self.key is None else f"{whose}[{self.key!r}]"
        shape = ", ".join(map(str, self.shape))
        return f"{label} {dtype_name(self.dtype)}[{shape}] on {self.device}"

    def takes(self, given: Port, sizes: dict[str, int]) -> bool:
        """Say whether a batch may have this input; `sizes` are those by name so far, to which its own are added."""
        if len(self.shape) != len(given.shape) or (given.shape != self.shape and not self.is_open):
            return False
        for want, size in zip(self.shape, given.shape, strict=True):
            assert isinstance(size, int)
            wanted = sizes.setdefault(want, size) if isinstance(want, str) else want
            if size != wanted or (isinstance(want, str) and size < 2):
                return False
        own = self.name, self.key, self.dtype, self.device
        return own == (given.name, given.key, given.dtype, given.device)

    def open(self, axes: Mapping[int, str]) -> Port:
        """Return the port with names for the sizes of some axes."""
        shape = tuple(axes.get(axis, size) for axis, size in enumerate(self.shape))
        return replace(self, shape=shape)

    @property
    def is_target(self) -> bool:
        """Whether it is of the targets; other placeholders of a batch are called `inputs` or `inputs_<key>`."""
        return self.name.startswith(TARGETS)

    @property
    def is_open(self) -> bool:
        """Whether one of the sizes is a name."""
        return any(isinstance(size, str) for size in self.shape)


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out of a step graph.

    `ports` are the inputs and, last, the targets, one or several; `scalars` pairs a scalar's name with its placeholder.
    Sizes that stand in the ports by name must fulfil the `conditions`.
    Outputs are `total`, `loss`, `data_loss`, `loss:<name>` of each loss of a sum, `term:<label>` of each loss term,
    `logits` and `captured:<module>:<call>` where they are read, `grad:<parameter>` and `probe:<module>`.
    """

    structure: InputStructure
    ports: tuple[Port, ...]
    scalars: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    views: int = 1
    hooks: tuple[int, ...] = ()
    """The indices of the layer hooks that are in the graph."""
    conditions: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the graph takes batches of several sizes."""
        return any(port.is_open for port in self.ports)

    def misfits(self, batch: Batch) -> list[str]:
        """Say what keeps a batch from being run by the graph; nothing where it can be."""
        structure, ports, _ = describe_batch(batch)
        keys = [port.key for port in self.ports]
        if structure != self.structure or [port.key for port in ports] != keys:
            own = [port.key for port in self.ports if not port.is_target]
            targets = [port.key for port in self.ports if port.key is not None and port.is_target]
            return [
                f"expected a {self.structure} of {len(own)} inputs {own}"
                + (f", and targets {targets}" if targets else "")
            ]
        sizes: dict[str, int] = {}
        pairs = zip(self.ports, ports, strict=True)
        found = [
            f"expected {port}, got {given}" for port, given in pairs if not port.takes(given, sizes)
        ]
        if found:
            return found
        broken = (text for text in self.conditions if not condition(text)(sizes))
        return [f"expected {text}, got {sizes}" for text in broken]

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the labels of the loss terms, in order."""
        return tuple(name.removeprefix(TERM) for name in self.outputs if name.startswith(TERM))

    @property
    def probes(self) -> tuple[str, ...]:
        """Return the modules whose layers are measured."""
        found = (name.partition("probe:") for name in self.outputs)
        return tuple(module for before, sign, module in found if sign and not before)


@dataclass(slots=True)
class Outputs:
    """The results of one step.

    `loss` is the micro-batch's mean: `data_loss` plus the weighted terms over targets and examples. `total` is what was
    differentiated: the loss and the terms over parameters, times the weight of the micro-batch in the step.
    `terms` holds the value of each term by its label, before any weight, `losses` that of each loss of a sum.
    `logits` are those of all views and
    `captured` what modules gave, where observers read them.
    `grads` holds None for a trainable parameter that the loss does not depend on.
    """

    loss: Tensor
    total: Tensor
    data_loss: Tensor
    terms: dict[str, Tensor]
    losses: dict[str, Tensor]
    logits: Tensor | None
    captured: dict[str, list[Tensor]]
    grads: dict[str, Tensor | None]
    probes: dict[str, Tensor]


def describe_batch(batch: Batch) -> tuple[InputStructure, tuple[Port, ...], list[Tensor]]:
    """Return how the inputs are packed, and port and tensor of each input, and of the targets or, last, each of them.

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
    for key, tensor in _flatten(targets)[1]:
        name = TARGETS if key is None else identifier(f"{TARGETS}_{key}")
        while name in named:
            name += "_"
        named[name] = key, tensor
    ports = (
        Port(name, key, tuple(tensor.shape), tensor.dtype, str(tensor.device))
        for name, (key, tensor) in named.items()
    )
    return structure, tuple(ports), [tensor for _, tensor in named.values()]


def shapes_of(ports: Sequence[Port]) -> Shapes:
    """Return the shapes of a batch that `describe_batch` described, by placeholder."""
    return {port.name: tuple(int(size) for size in port.shape) for port in ports}


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


def pack_inputs(structure: InputStructure, ports: Sequence[Port], values: Mapping[str, Any]) -> Any:
    """Pack the values of the inputs' placeholders as `describe_batch` found the inputs, without the targets."""
    return _pack(structure, [port for port in ports if not port.is_target], values)


def pack_targets(ports: Sequence[Port], values: Mapping[str, Any]) -> Any:
    """Pack the values of the targets' placeholders as `describe_batch` found the targets."""
    own = [port for port in ports if port.is_target]
    keys = {type(port.key) for port in own}
    structure: InputStructure = "dict" if keys == {str} else "tuple" if keys == {int} else "tensor"
    return _pack(structure, own, values)


def _pack(structure: InputStructure, ports: Sequence[Port], values: Mapping[str, Any]) -> Any:
    if structure == "tensor":
        return values[ports[0].name]
    if structure == "tuple":
        return tuple(values[port.name] for port in ports)
    return {port.key: values[port.name] for port in ports}

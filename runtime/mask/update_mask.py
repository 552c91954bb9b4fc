"""Update masks: which entries of a parameter train. The others stay as they are, or they are zero.

The optimizer updates `values`: of entries that stay, a vector of the selected ones; of entries that are zero, the
parameter itself. Gradient, moments, weight decay, values and clipping obey the mask, whatever the optimizer is.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.soundness.gradient_norm import FreedGradient
from trainc.runtime.step.gradients import as_dense
from trainc.runtime.torch_optimizer.nested import leaves

Begin = Callable[[Tensor], Mapping[str, Any]]
"""Given values of entries, the state with which the optimizer begins them, as `Step.first_optimizer_state` has it."""


def no_state(values: Tensor) -> Mapping[str, Any]:
    """Return the state of an optimizer that begins with zeros."""
    return {}


def leaves_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state of any nesting, by their places."""
    found = (pair for key, value in state.items() for pair in leaves(value, key))
    return {place: leaf for place, leaf in found if isinstance(leaf, Tensor)}


def own_tensors(state: Mapping[str, Any], shapes: Collection[tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a state that have a number for each entry, which are those of these shapes."""
    return {
        place: leaf
        for place, leaf in leaves_of(state).items()
        # A counter of steps is a 0-d tensor, also where the parameter is.
        if leaf.dim() and tuple(leaf.shape) in {*map(tuple, shapes)} and not leaf.is_sparse
    }


_MASKS = WeakIdKeyDictionary()
"""The mask of each parameter that has one, as a weak reference."""


def mask_of(parameter: Parameter) -> UpdateMask | None:
    """Return the mask that a program has put on a parameter; None where there is none, or its program is gone."""
    held = _MASKS.get(parameter)
    if held is not None and held() is not None:
        gc.collect()  # a program that is gone refers to itself
    return None if held is None else held()


def masked_shard(name: str) -> str:
    """Return why a parameter that FSDP2 shards has no mask."""
    return (
        f"`{name}` is sharded over processes (FSDP2), and a mask needs whole tensors: train with"
        " DistributedDataParallel, or remove the mask"
    )


class UpdateMask(ABC):
    """The mask of one parameter; `values` is what the optimizer updates in its place.

    Raises ValueError for a parameter that is sharded over processes.
    """

    def __init__(self, name: str, parameter: Parameter, values: Parameter) -> None:
        if is_sharded(parameter):
            raise ValueError(masked_shard(name))
        self.name = name
        self.parameter = parameter
        self.values = values
        self.freed: FreedGradient | None = None
        """What was measured of the open step's gradient where it is freed although nothing is chosen of it yet."""
        self.averages_first = False
        """Whether gradients are averaged over replicas after the backward pass: until then all of them are kept."""
        self.is_shown = False
        """Whether code of the user's own had the gradient of the entries that train, and may have changed it."""
        self.averages_last = False
        """Whether the gradients of the entries that train are averaged over replicas, at the update."""

    def claim(self) -> None:
        """Say that this mask decides which entries of its parameter train."""
        _MASKS[self.parameter] = ref(self)

    def release(self) -> None:
        """Leave the parameter to others."""
        self.remove()
        _MASKS.pop(self.parameter, None)

    @property
    def separate(self) -> bool:
        """Say whether the optimizer's gradients are kept outside of the parameter."""
        return self.values is not self.parameter

    @property
    def waits(self) -> bool:
        """Say whether nothing of the parameter trains until its entries are chosen."""
        return False

    @property
    def frees_gradient(self) -> bool:
        """Whether `take` keeps a part of a dense gradient, so that the rest can be freed at once."""
        return False

    @abstractmethod
    def take(self, grad: Tensor) -> None:
        """Add a dense gradient that a graph computed."""

    def gather(self) -> None:  # noqa: B027 nothing to do where the optimizer reads the parameter's own gradient
        """Move the selected entries of the gradient to where the optimizer reads them."""

    @abstractmethod
    def picked(self, tensor: Tensor) -> Tensor:
        """Return of a tensor in the parameter's shape what the optimizer has of the parameter."""

    def entries_of(self, grad: Tensor) -> Tensor:
        """Return of a gradient of the parameter, dense or sparse, what the optimizer reads of it, in its dtype."""
        return self.picked(as_dense(grad)).to(self.values.dtype)

    @abstractmethod
    def whole(self, values: Tensor) -> Tensor:
        """Return what the optimizer has of the parameter in its shape, with zeros at entries that do not train."""

    def trained(self, grad: Tensor) -> Tensor:
        """Return a dense gradient with zeros at the entries that do not train; all of it before the choice."""
        return self.whole(self.picked(grad))

    def trained_entries(self) -> Tensor:
        """Return which entries train, bool in the parameter's shape; all of them before the choice."""
        return self.trained(torch.ones_like(self.parameter, requires_grad=False)) != 0

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """Return the gradient of the entries that train; all of it before the choice, None where there is none."""

    @abstractmethod
    def describe(self) -> str:
        """Return what the plan says of the entries that train."""

    @abstractmethod
    def memory(self) -> int:
        """Return the bytes held besides weights and optimizer state."""

    def zero_gradient(self) -> None:  # noqa: B027 nothing to do where the optimizer has a vector of its own
        """Zero the gradient of the entries that do not train, where the optimizer would read it."""

    def discard(self) -> None:
        """Free the gradients of the open step."""
        self.parameter.grad = None
        self.values.grad = None
        self.freed = None

    @abstractmethod
    def read(self) -> None:
        """Follow weights that were set from outside."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the parameter's gradients to others."""


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

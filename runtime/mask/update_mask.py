"""Update masks: which entries of a parameter train. The others stay as they are, or they are zero.

The optimizer updates `values`: of entries that stay, a vector of the selected ones; of entries that are zero, the
parameter itself. Gradient, moments, weight decay, values and clipping obey the mask, whatever the optimizer is.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.torch_optimizer.nested import leaves

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
        self.averages_first = False
        """Whether gradients are averaged over replicas after the backward pass: until then all of them are kept."""

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

    @abstractmethod
    def take(self, grad: Tensor) -> None:
        """Add a dense gradient that a graph computed."""

    def gather(self) -> None:  # noqa: B027 nothing to do where the optimizer reads the parameter's own gradient
        """Move the selected entries of the gradient to where the optimizer reads them."""

    @abstractmethod
    def picked(self, tensor: Tensor) -> Tensor:
        """Return of a tensor in the parameter's shape what the optimizer has of the parameter."""

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

    @abstractmethod
    def read(self) -> None:
        """Follow weights that were set from outside."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the parameter's gradients to others."""


class SelectedEntries(UpdateMask):
    """Selected entries train, as a vector of their own; the others stay as they are.

    A dense gradient is freed once its entries are gathered. `index` (k,) holds sorted flat positions, int32 where they
    fit, or is None until they are chosen; until then the dense gradient stays in `parameter.grad` and nothing trains.
    `values` (k,) is what the optimizer updates, in float32 at least: a master copy of 16-bit weights.
    """

    def __init__(self, name: str, parameter: Parameter, count: int) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        values = Parameter(torch.zeros(count, dtype=dtype, device=parameter.device))
        super().__init__(name, parameter, values)
        self.index: Tensor | None = None
        self.keeps_dense = False
        """Whether the dense gradient of a step stays in `parameter.grad`, since the next choice depends on it."""
        self._handle: RemovableHandle | None = None

    @property
    def density(self) -> float:
        """Return the fraction of the entries that trains; 1 for a tensor without entries."""
        numel = self.parameter.numel()
        return self.values.numel() / numel if numel else 1.0

    # gradients

    def take(self, grad: Tensor) -> None:
        """Add a dense gradient: its selected entries, or all of it where a choice depends on it."""
        if grad.is_sparse:
            grad = grad.to_dense()
        grad = grad.detach()
        if self.index is None or self.keeps_dense:
            held = self.parameter.grad
            self.parameter.grad = grad if held is None else held + grad
        elif self.index.numel():
            picked = self.picked(grad).to(self.values.dtype)
            self.values.grad = picked if self.values.grad is None else self.values.grad.add_(picked)

    def picked(self, tensor: Tensor) -> Tensor:
        return tensor if self.index is None else tensor.reshape(-1)[self.index]

    def whole(self, values: Tensor) -> Tensor:
        if self.index is None:
            return values
        spread = values.new_zeros(self.parameter.numel())
        spread[self.index] = values
        return spread.view(self.parameter.shape)

    def gradient(self) -> Tensor | None:
        return self.parameter.grad if self.index is None else self.values.grad

    def gather(self) -> None:
        """Move the selected entries of `parameter.grad` to `values.grad` and free the rest."""
        grad = self.parameter.grad
        if grad is None or self.index is None:
            return
        if self.keeps_dense:  # it holds all that the step has added
            dense = grad.to_dense() if grad.is_sparse else grad
            self.values.grad = self.picked(dense).to(self.values.dtype)
            return
        self.parameter.grad = None
        self.take(grad)

    def _gather_now(self, _: Tensor) -> None:
        """Gather as soon as the backward pass has the gradient, unless all of it is needed first."""
        if not (self.averages_first or self.keeps_dense):
            self.gather()

    # entries

    def choose(self, index: Tensor, state: Iterable[Any] = ()) -> int | None:
        """Set the selection, sorted flat positions of shape (k,), and copy the weights there.

        `state` is what the optimizer holds for the selection of now, of any nesting: its vectors (k,) keep the numbers
        of entries that stay selected, and have 0 for the others. Return how many stay; None for the first selection.
        """
        small = self.parameter.numel() <= torch.iinfo(torch.int32).max
        old = self.index
        self.index = index.to(self.parameter.device, torch.int32 if small else torch.int64)
        found = (leaf for value in state for _, leaf in leaves(value, ""))
        own = [t for t in found if isinstance(t, Tensor) and t.shape == self.values.shape]
        stayed = None if old is None else self._carry(old, [self.values, *own])
        if self.values.numel() != index.numel():
            # An optimizer may have made its state before it was known how many are chosen.
            for tensor in (self.values, *own):
                tensor.data = tensor.detach().new_zeros(index.numel())
        if self._handle is None:
            register: Any = self.parameter.register_post_accumulate_grad_hook
            self._handle = register(self._gather_now)
        self.read()
        return stayed

    def _carry(self, old: Tensor, tensors: Sequence[Tensor]) -> int:
        """Make vectors of the entries `old` ones of the entries of now, with 0 for new ones; return how many stay."""
        assert self.index is not None
        place = torch.searchsorted(old, self.index).clamp_(max=max(0, len(old) - 1))
        stays = old[place] == self.index if len(old) else torch.zeros_like(place, dtype=torch.bool)
        for tensor in tensors:
            before = tensor.detach()
            now = before.new_zeros(len(self.index))
            now[stays] = before[place[stays]]
            tensor.data = now
        self.values.grad = None
        return int(stays.sum())

    def forget(self) -> None:
        """Drop the selection, so that another can be chosen."""
        self.index = None
        self.values.data.zero_()
        self.remove()

    def read(self) -> None:
        """Copy the weights to `values`; a value that still rounds to its weight is kept."""
        if self.index is None:
            return
        with torch.no_grad():
            now = self.parameter.detach().reshape(-1).index_select(0, self.index)
            stale = self.values.detach().to(now.dtype) != now
            self.values.copy_(torch.where(stale, now.to(self.values.dtype), self.values))

    def write(self) -> Tensor:
        """Write `values` into the parameter; return how many weights changed, 0-d."""
        if self.index is None:
            return torch.zeros((), dtype=torch.int64, device=self.values.device)
        with torch.no_grad():
            weights = self.parameter.detach()
            new = self.values.detach().to(weights.dtype)
            changed = (weights.reshape(-1).index_select(0, self.index) != new).sum()
            if weights.is_contiguous():
                weights.view(-1)[self.index] = new
            else:
                weights[torch.unravel_index(self.index.long(), weights.shape)] = new
        return changed

    def describe(self) -> str:
        return f"{self.values.numel()} of {self.parameter.numel()}"

    def memory(self) -> int:
        held = [self.values] if self.index is None else [self.values, self.index]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def remove(self) -> None:
        """Leave the parameter's gradients to others."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

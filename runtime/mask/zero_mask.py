"""A mask of zeros: some entries of a parameter train, and the others are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.kernels.parameter.masked_update import masked_update_, pack, unpack
from trainc.runtime.mask.update_mask import Begin, UpdateMask, leaves_of, no_state, own_tensors


class ZeroMask(UpdateMask):
    """Some entries train as ever; the others are zero, in the weights, their gradient and the optimizer's state.

    `kept` holds one bit per entry, uint8 (ceil(numel / 8),), set where entries train; None where all do. `count` is how
    many train, `text` what the plan says of them before they are chosen.
    """

    def __init__(self, name: str, parameter: Parameter, text: str) -> None:
        super().__init__(name, parameter, parameter)
        self.text = text
        self.kept: Tensor | None = None
        self.count = parameter.numel()
        self.averages: Callable[[], Iterable[Tensor]] = tuple
        """Gives averages of the weights, in the parameter's shape, which are zeroed where it is."""

    def take(self, grad: Tensor) -> None:
        """Add a dense gradient; one that is masked in place is copied, as a graph may use its memory elsewhere."""
        held = self.parameter.grad
        own = grad if self.kept is None else grad.clone()
        self.parameter.grad = own if held is None else held.add_(grad)

    @property
    def density(self) -> float:
        """Return the fraction of the entries that trains; 1 for a tensor without entries."""
        return self.count / self.parameter.numel() if self.parameter.numel() else 1.0

    def picked(self, tensor: Tensor) -> Tensor:
        return tensor if self.kept is None else tensor.masked_fill(~self.kept_entries(), 0)

    def whole(self, values: Tensor) -> Tensor:
        return values

    def gradient(self) -> Tensor | None:
        grad = self.parameter.grad
        if grad is not None and grad.is_sparse:
            self.zero_gradient()
            return self.parameter.grad
        return None if grad is None else self.trained(grad)

    def choose(
        self, kept: Tensor, state: Mapping[str, Any] | None = None, begin: Begin = no_state
    ) -> None:
        """Keep the entries where `kept`, bool in the parameter's shape, and zero the others.

        `state` is what the optimizer holds for the parameter, of any nesting; tensors in its shape, or in its shape
        made flat, are zeroed alike, and have the numbers of `begin` where entries are new. Others, such as sums over
        rows, are no entries' own.
        """
        shapes = (self.parameter.shape, (self.parameter.numel(),))
        own = {n: t for n, t in own_tensors(state or {}, shapes).items() if t.is_floating_point()}
        if own and self.kept is not None:
            self._begin(own, kept & ~self.kept_entries(), begin)
        self.count = int(kept.sum())
        self.kept = None if self.count == kept.numel() else pack(kept)
        self._zero(self.parameter.detach(), *own.values())
        self._zero_averages()

    def _begin(self, own: Mapping[str, Tensor], new: Tensor, begin: Begin) -> None:
        """Give the optimizer's tensors the numbers with which it begins, where entries are new."""
        if not new.any():
            return
        fresh = leaves_of(begin(self.parameter))
        for place, tensor in own.items():
            first = fresh.get(place)
            if first is not None and first.shape == tensor.shape:
                where = new.view(tensor.shape)
                tensor.detach().copy_(torch.where(where, first.detach().to(tensor.dtype), tensor))

    def _zero_averages(self) -> None:
        """Zero averages, too: from now on they follow zeros, and else would go on with what was there before."""
        if self.kept is None:
            return
        left_out = ~self.kept_entries()
        for average in self.averages():
            average.masked_fill_(left_out.to(average.device), 0)

    def zero_gradient(self) -> None:
        """Zero the gradient of the entries that are zero."""
        grad = self.parameter.grad
        if grad is None or self.kept is None:
            return
        if not grad.is_sparse:
            self._zero(grad)
            return
        self.parameter.grad = grad = grad.coalesce()
        kept = self.kept_entries()[tuple(grad.indices())]
        grad.values().masked_fill_(~kept, 0)

    def write(self) -> None:
        """Zero the weights that are to be zero, whatever an optimizer made of them."""
        if self.kept is not None:
            self._zero(self.parameter.detach())

    def kept_entries(self) -> Tensor:
        """Return where entries train, bool in the parameter's shape."""
        if self.kept is None:
            return torch.ones_like(self.parameter, dtype=torch.bool)
        return unpack(self.kept, self.parameter.numel()).view(self.parameter.shape)

    def restore(self, kept: Tensor | None, count: int) -> None:
        """Set the mask to what a checkpoint holds; None: all entries train."""
        entries = self.parameter.numel()
        found = entries if kept is None else int(unpack(kept, entries).sum())
        if found != count:
            raise ValueError(
                f"the mask of `{self.name}` keeps {found} entries, but its count is {count}"
            )
        self.kept = None if kept is None else kept.to(self.parameter.device, copy=True)
        self.count = count

    def read(self) -> None:
        """Do nothing: the weights are what the optimizer updates."""

    def remove(self) -> None:
        """Do nothing: gradients pass through no hook."""

    def describe(self) -> str:
        return self.text

    def memory(self) -> int:
        return (self.parameter.numel() + 7) // 8

    def _zero(self, *tensors: Tensor) -> None:
        if self.kept is not None:
            masked_update_(tensors, self.kept)

"""Update masks: the entries of a parameter that train, as a vector that the optimizer updates.

The optimizer sees `values`, the selected entries. Its moments, its weight decay and clipping
therefore act on those entries only, and a dense gradient is freed once its entries are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


class SelectedEntries:
    """The selected entries of one parameter.

    `index` (k,) holds sorted flat positions, int32 where they fit, or is None until they are
    chosen; until then the dense gradient stays in `parameter.grad` and nothing trains. `values`
    (k,) is what the optimizer updates, in float32 at least: a master copy of 16-bit weights.
    """

    def __init__(self, name: str, parameter: Parameter, count: int) -> None:
        self.name = name
        self.parameter = parameter
        self.index: Tensor | None = None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.values = torch.nn.Parameter(torch.zeros(count, dtype=dtype, device=parameter.device))
        self._handle: RemovableHandle | None = None

    # gradients

    def take(self, grad: Tensor) -> None:
        """Add a dense gradient: all of it before a selection is chosen, else its selected entries."""
        if grad.is_sparse:
            grad = grad.to_dense()
        grad = grad.detach()
        if self.index is None:
            held = self.parameter.grad
            self.parameter.grad = grad if held is None else held + grad
        elif self.index.numel():
            picked = grad.reshape(-1).index_select(0, self.index).to(self.values.dtype)
            self.values.grad = picked if self.values.grad is None else self.values.grad.add_(picked)

    def trained(self, grad: Tensor) -> Tensor:
        """Return a dense gradient with zeros at the entries that do not train; all of it before the choice."""
        if self.index is None:
            return grad
        kept = torch.zeros_like(grad).reshape(-1)
        kept[self.index] = grad.reshape(-1)[self.index]
        return kept.view(grad.shape)

    def gather(self) -> None:
        """Move the selected entries of `parameter.grad` to `values.grad` and free the rest."""
        grad = self.parameter.grad
        if grad is not None and self.index is not None:
            self.parameter.grad = None
            self.take(grad)

    def discard(self) -> None:
        """Free the gradients of the open step."""
        self.parameter.grad = None
        self.values.grad = None

    # entries

    def choose(self, index: Tensor) -> None:
        """Set the selection, sorted flat positions of shape (k,), and copy the weights there."""
        small = self.parameter.numel() <= torch.iinfo(torch.int32).max
        self.index = index.to(self.parameter.device, torch.int32 if small else torch.int64)
        if self.values.numel() != index.numel():
            self.values.data = self.values.data.new_zeros(index.numel())
        if self._handle is None:
            register: Any = self.parameter.register_post_accumulate_grad_hook
            self._handle = register(lambda _: self.gather())
        self.read()

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

    def memory(self) -> int:
        """Return the bytes held besides weights and optimizer state."""
        held = [self.values] if self.index is None else [self.values, self.index]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def remove(self) -> None:
        """Remove the hook from the parameter."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the positions of the `count` largest scores of all, for each flat tensor, sorted, int64.

    Of equal scores the earlier tensor goes first, inside a tensor the lower position, so the choice
    is a function of the numbers alone. No score is NaN, and `count` is at most their number.
    """
    # Only a tensor's own `count` largest can be among those of all.
    tops = [score.topk(min(count, score.numel()), sorted=False).values for score in scores]
    together = torch.cat([top.to(tops[0].device) for top in tops])
    threshold = together.topk(count).values[-1] if count else together.new_full((), torch.inf)
    above = [(score > threshold.to(score.device)).nonzero()[:, 0] for score in scores]
    left = count - sum(len(found) for found in above)
    chosen = []
    for score, found in zip(scores, above, strict=True):
        equal = (score == threshold.to(score.device)).nonzero()[:left, 0]
        left -= len(equal)
        chosen.append(torch.cat([found, equal]).sort().values)
    return chosen

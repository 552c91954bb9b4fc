"""Update masks: the entries of a parameter that train, kept compactly so that everything binds to them at once.

The optimizer sees `values`, a vector of the selected entries. Its moments, its weight decay and clipping therefore
act on those entries only, and the dense gradient is dropped as soon as the entries are gathered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class Compact:
    """The selected entries of one parameter.

    `index` (k,) int64 holds sorted flat positions, or is None until they are chosen; `values` (k,) is what the
    optimizer updates, in float32 at least, so that it doubles as the master copy of low-precision weights.
    """

    def __init__(self, name: str, parameter: Parameter, count: int) -> None:
        import torch

        self.name = name
        self.parameter = parameter
        self.index: Tensor | None = None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.values = torch.nn.Parameter(torch.zeros(count, dtype=dtype, device=parameter.device))
        self._handle = parameter.register_post_accumulate_grad_hook(self._gather_hook)

    def _gather_hook(self, parameter: Tensor) -> None:
        if self.index is not None:
            self.gather()

    def gather(self) -> None:
        """Move the selected entries of the dense gradient to `values.grad` and free the rest."""
        if self.parameter.grad is None or self.index is None:
            return
        picked = self.parameter.grad.detach().reshape(-1)[self.index].to(self.values.dtype)
        self.values.grad = picked if self.values.grad is None else self.values.grad + picked
        self.parameter.grad = None

    def choose(self, index: Tensor) -> None:
        """Fix the selection: sorted flat positions, shape (k,)."""
        self.index = index.to(self.parameter.device)
        self.read()

    def read(self) -> None:
        """Take the weights' present values. Low-precision weights keep a master copy that still rounds to them."""
        import torch

        if self.index is None:
            return
        with torch.no_grad():
            now = self.parameter.detach().reshape(-1)[self.index]
            stale = self.values.detach().to(now.dtype) != now
            self.values.copy_(torch.where(stale, now.to(self.values.dtype), self.values))

    def write(self) -> None:
        """Put the updated entries back into the parameter."""
        import torch

        if self.index is None:
            return
        with torch.no_grad():
            flat = self.parameter.detach().view(-1)
            flat[self.index] = self.values.detach().to(flat.dtype)

    def remove(self) -> None:
        """Detach from the parameter."""
        self._handle.remove()

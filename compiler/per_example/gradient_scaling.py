"""Witness: notices that a gradient was scaled between the backward pass and the update, which falsifies comparisons.

What per-example statistics are compared with is `p.grad` at the update. A GradScaler that has not been told to unscale,
or a gradient clipped by hand, leaves another length there than the backward passes gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.per_example.micro_batch import Micro

_OFF = {torch.float16: 0.2, torch.bfloat16: 0.2}
"""Relative error of a sum over micro-batches that rounding explains, where it is not `_EXACT`."""
_EXACT = 1e-3


class Witness:
    """The smallest measured parameter: keeps the sum of what backward passes add to its gradient in a step.

    A hook sees every gradient before it is accumulated; what the loss was multiplied by is divided out.
    """

    def __init__(self, names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
        known = [name for name in names if parameters[name].requires_grad]
        self.name = min(known, key=lambda name: parameters[name].numel(), default=None)
        self.micro: Micro | None = None
        self._sum: Tensor | None = None
        self._scale: Tensor | None = None
        if self.name is not None:
            self._parameter = parameters[self.name]
            self._parameter.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        if self.micro is not None:
            self.add(gradient, self.micro.scale)

    def add(self, gradient: Tensor, scale: Tensor | None = None) -> None:
        """Add a micro-batch's gradient, `scale` times as large as that of its loss."""
        own = gradient.detach().double()
        if scale is not None:
            own, self._scale = own / scale, scale
        self._sum = own if self._sum is None else self._sum + own

    def close(self) -> None:
        """Forget the step."""
        self._sum = self._scale = None

    def check(self) -> None:
        """Raise ValueError where the gradient is a multiple of what the backward passes left."""
        left = self._sum
        if self.name is None or left is None or (found := self._parameter.grad) is None:
            return
        if type(found) is not type(left):  # a shard
            return
        now = found.detach().double()
        times = (now * left).sum() / left.square().sum()
        off = (now - times * left).norm() / now.norm().clamp(min=torch.finfo(now.dtype).tiny)
        scale = left.new_ones(()) if self._scale is None else self._scale.double()
        ratio, apart, scaled = torch.stack([times, off, scale.reshape(())]).tolist()
        near = _OFF.get(found.dtype, _EXACT)
        # Gradients that also point elsewhere have had something added to them, which may be meant.
        if abs(ratio - 1) > near and apart <= near:
            raise ValueError(_told(self.name, ratio, scaled, near))


def _told(name: str, ratio: float, scale: float, near: float) -> str:
    what = (
        f"the gradient of `{name}` is {ratio:.4g} times what the backward passes of this step left there, so nothing"
        " measured in them can be compared with it: "
    )
    if scale != 1 and abs(ratio / scale - 1) <= near:
        return what + (
            f"the loss was multiplied by {scale:.6g}, and the gradients were not divided by it again. With a GradScaler"
            " call `program.update(scaler)`"
        )
    return what + (
        "leave gradients as they are before `program.update()`, and clip by `clip` of the spec's optimizer"
    )

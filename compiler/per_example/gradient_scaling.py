"""Detect gradients rescaled between backward() and update(), by a GradScaler or by clipping.

Per-example statistics are compared with `p.grad` at the update. A GradScaler that has not unscaled, or clipping by
hand, leaves a gradient there that is not what the backward passes gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trainc.compiler.per_example.micro_batch import MicroBatchResult

_OFF = {torch.float16: 0.2, torch.bfloat16: 0.2}
"""Relative error that rounding explains in a sum over micro-batches, by dtype; of other dtypes `_EXACT`."""
_EXACT = 1e-3


class ScalingDetector:
    """Compares the gradient of the smallest measured parameter with the sum of what backward passes added to it.

    A hook sees every gradient before it is accumulated, and divides it by what the loss was multiplied by.
    """

    def __init__(self, names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
        known = [name for name in names if parameters[name].requires_grad]
        self.name = min(known, key=lambda name: parameters[name].numel(), default=None)
        self.micro_batch: MicroBatchResult | None = None
        self._sum: Tensor | None = None
        self._scale: Tensor | None = None
        if self.name is not None:
            self._parameter = parameters[self.name]
            self._parameter.register_hook(self._record)

    def _record(self, gradient: Tensor) -> None:
        if (own := self.micro_batch) is not None:
            self.add(gradient, None if own.by_framework else own.loss_scale)

    def add(self, gradient: Tensor, scale: Tensor | None = None) -> None:
        """Add the gradient of a micro-batch whose loss was multiplied by `scale`."""
        own = gradient.detach().to(torch.float64, copy=True)  # `p.grad` may be this very tensor
        if scale is not None:
            own, self._scale = own / scale, scale
        self._sum = own if self._sum is None else self._sum + own

    def divide(self, scale: float) -> None:
        """Divide the sum by what losses were multiplied by, where that was not known in their backward passes."""
        if self._sum is not None and scale != 1.0:
            self._sum, self._scale = self._sum / scale, self._sum.new_tensor(scale)

    def close(self) -> None:
        """End the step: forget its sum."""
        self._sum = self._scale = None

    def check(self) -> None:
        """Raise ValueError if the gradient is a multiple of the sum that the backward passes gave."""
        left = self._sum
        if self.name is None or left is None or (found := self._parameter.grad) is None:
            return
        if type(found) is not type(left):  # a shard
            return
        now = found.detach().double()
        times = (now * left).sum() / left.square().sum()
        off = (now - times * left).norm() / now.norm().clamp(min=torch.finfo(now.dtype).tiny)
        scale = left.new_ones(()) if self._scale is None else self._scale.double()
        ratio, residual, scaled = torch.stack([times, off, scale.reshape(())]).tolist()
        near = _OFF.get(found.dtype, _EXACT)
        # A gradient of another direction had something added to it, which may be intended.
        if abs(ratio - 1) > near and residual <= near:
            raise ValueError(_message(self.name, ratio, scaled, near))


def _message(name: str, ratio: float, scale: float, near: float) -> str:
    what = (
        f"the gradient of `{name}` was changed after the backward passes: it is {ratio:.4g} times what they gave, so"
        " it does not fit the statistics measured in them. "
    )
    if scale != 1 and abs(ratio / scale - 1) <= near:
        return what + (
            f"The loss was multiplied by {scale:.6g}, but the gradients were not divided by it. With a GradScaler call"
            " `program.update(scaler)`"
        )
    return what + (
        "Do not change gradients before `program.update()`; to clip them, set `clip` of the spec's optimizer"
    )

"""Models on the meta device: build one without initialising weights, copy one without its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class SkipInitialization(TorchFunctionMode):
    """Leaves tensors on the meta device as they are when a function fills them.

    Filling a meta tensor does nothing, but torch does it through decompositions whose first use loads its compiler.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


_FILLING = {
    "normal_", "uniform_", "trunc_normal_", "constant_", "ones_", "zeros_", "zero_", "fill_", "eye_", "orthogonal_",
    "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "exponential_", "bernoulli_",
}  # fmt: skip


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy without weights, so that planning leaves the user's model alone."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)

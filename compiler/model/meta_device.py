"""Weightless: build a model on the meta device without the arithmetic of initialising what is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Weightless(TorchFunctionMode):
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

"""Linear layers with 2:4 weights, which keep 2 of each 4 entries, on sparse tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCED = (torch.float16, torch.bfloat16)
MULTIPLES = (32, 64)
"""What rows and columns of a 16-bit weight must be multiples of, for each of torch's two implementations."""
CAPABILITY = (8, 0)
"""The first CUDA devices with sparse tensor cores."""


def cuda_capability() -> tuple[int, int] | None:
    """Return the compute capability of this machine's CUDA device; None without one, or where it is of ROCm."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability()


def dense_because(layer: nn.Module, capability: tuple[int, int] | None) -> str | None:
    """Return why a layer with a 2:4 weight computes with all of it, zeros too; None where sparse tensor cores can."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is no Linear"
    if capability is None:
        return "no CUDA device"
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if layer.weight.dtype not in (torch.float32, *REDUCED):
        return f"not in {str(layer.weight.dtype).removeprefix('torch.')}"
    for length, multiple, what in zip(
        layer.weight.shape, MULTIPLES, ("outputs", "inputs"), strict=True
    ):
        if length % multiple:
            return f"{length} {what} are no multiple of {multiple}"
    return None


def reduced_dtype(weight: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype in which a layer computes now; None where it computes in another one."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return dtype if dtype in REDUCED else None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, compress: Callable[[Tensor], Any]
) -> Tensor:
    """Return what `linear` gives with the weight as `compress` gives it; gradients are those of the dense weight.

    All are of one dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _Linear.apply(x, weight, bias, compress(weight.detach()))  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """`linear` with a compressed weight, differentiated as with the dense one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, compressed: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, compressed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


def compress(weight: Tensor) -> Any:
    """Return a 2:4 weight as torch's semi-structured tensor."""
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight.contiguous())

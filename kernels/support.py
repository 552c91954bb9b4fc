"""Shape, dtype and per-example arithmetic shared by the norm operators."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

REDUCED = (torch.bfloat16, torch.float16)

# Rows x width of one example above which one fused ATen call per example beats four elementwise
# passes over the whole batch; docs/kernels.md has the measurement.
FUSED_EXAMPLE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Folded:
    """A normalised input seen as (examples, rows, width)."""

    examples: int
    rows: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The three extents as a shape."""
        return self.examples, self.rows, self.width


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise with the message unless the condition holds; usable with symbolic shapes."""
    torch._check(condition, message)


def on_demand(module: str, function: str) -> Callable[..., Any]:
    """A kernel whose module is imported by its first call: without CUDA, triton may be missing."""

    def kernel(*arguments: Any) -> Any:
        return getattr(import_module(f"trainc.kernels.{module}"), function)(*arguments)

    return kernel


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are carried in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    columns: int,
) -> None:
    """Reject inputs outside the contract of the norm operators, naming the shapes."""
    count = len(normalized_shape)
    lead = x.dim() - count
    require(
        lead >= 0 and tuple(x.shape[lead:]) == tuple(normalized_shape),
        lambda: (
            f"input {tuple(x.shape)} does not end in normalized_shape {tuple(normalized_shape)}"
        ),
    )
    require(
        all(p is None or tuple(p.shape) == tuple(normalized_shape) for p in (weight, bias)),
        lambda: f"weight and bias must have the shape {tuple(normalized_shape)}",
    )
    if probe is None:
        return
    require(lead >= 1, lambda: "a probe needs an example dimension before normalized_shape")
    expected = accumulation_dtype(x.dtype)
    require(
        probe.dim() == 2
        and probe.shape[0] == x.shape[0]
        and probe.shape[1] == columns
        and probe.dtype == expected,
        lambda: (
            f"probe must be ({x.shape[0]}, {columns}) {expected}, "
            f"not {tuple(probe.shape)} {probe.dtype}"
        ),
    )


def fold(x: Tensor, normalized_shape: Sequence[int]) -> Folded:
    """Read x as (examples, rows, width): dim 0, the dims between, normalized_shape."""
    lead = x.shape[: x.dim() - len(normalized_shape)]
    return Folded(lead[0], math.prod(lead[1:]), math.prod(normalized_shape))


def statistic_shape(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    """The shape ATen gives row statistics: the leading dims, then ones."""
    lead = x.dim() - len(normalized_shape)
    return [*x.shape[:lead], *([1] * len(normalized_shape))]


def absent(like: Tensor) -> Tensor:
    """The empty tensor that stands for a result not asked for: operators cannot return None."""
    return like.new_empty((0,))


def per_example_sums(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, folded: Folded, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Each example's weight and bias contribution, (examples, width) in the dtype of rstd.

    Weight: sum over rows of dy * (x - mean) * rstd, `mean` None meaning zero; bias: of dy.
    """
    dtype = rstd.dtype
    grad, value = dy.reshape(folded.shape), x.reshape(folded.shape)
    scale = rstd.reshape(folded.examples, folded.rows, 1)
    centre = None if mean is None else mean.reshape(folded.examples, folded.rows, 1)
    if folded.rows * folded.width >= FUSED_EXAMPLE_ELEMENTS:
        return _fused_sums(grad, value, centre, scale, folded, want_bias)
    work = value.to(dtype) if centre is None else torch.sub(value, centre)
    work = work.mul(scale) if centre is None else work.mul_(scale)
    work.mul_(grad)
    bias = grad.sum(1, dtype=dtype) if want_bias else None
    return work.sum(1), bias


def _fused_sums(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, folded: Folded, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The same sums by ATen's one-pass norm backward, one call per example."""
    dtype, width = rstd.dtype, folded.width
    ones = rstd.new_ones(width)  # ATen wants an affine tensor and does not read it for these sums
    centre = rstd.new_zeros(rstd.shape) if mean is None else mean
    weight = x.new_empty((folded.examples, width), dtype=dtype)
    bias = torch.empty_like(weight) if want_bias else None
    for example in range(folded.examples):
        # ATen sums 16-bit rows in 16 bits: half a percent off over 300 rows, so they are widened.
        _, gain, shift = torch.ops.aten.native_layer_norm_backward(
            dy[example].to(dtype),
            x[example].to(dtype),
            [width],
            centre[example],
            rstd[example],
            ones,
            ones,
            [False, True, want_bias],
        )
        weight[example] = gain
        if bias is not None:
            bias[example] = shift
    return weight, bias


def squared_norms(contributions: Sequence[Tensor | None], examples: int, like: Tensor) -> Tensor:
    """Squared norms per example, one column per contribution, zero where there is none."""
    columns = [
        like.new_zeros((examples,)) if part is None else torch.linalg.vecdot(part, part)
        for part in contributions
    ]
    return torch.stack(columns, 1)

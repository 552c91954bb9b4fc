"""Shape, dtype and per-example arithmetic shared by the norm operators."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

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


def lazy(module: str, function: str) -> Callable[..., Any]:
    """A kernel whose module is imported by its first call: without CUDA, triton may be missing."""

    def kernel(*arguments: Any) -> Any:
        return getattr(import_module(f"trainc.kernels.{module}"), function)(*arguments)

    return kernel


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast hands to an operation of its 16-bit list; float64 and others stay as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    cast = (torch.float32, *REDUCED)
    return [t.to(dtype) if t is not None and t.dtype in cast else t for t in tensors]


def as_composed(limit: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether torch's own calls cost less than an operator: for up to `limit` elements of x on a CPU.

    Compiled code keeps the operator, and so do tensors in several dtypes, which torch warns of or refuses.
    """
    alike = all(t is None or t.dtype == x.dtype for t in others)
    return alike and x.device.type == "cpu" and not is_compiling() and x.numel() <= limit


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
    # Conditions first and words only for what fails: this runs at every call.
    if not x.is_floating_point():
        raise RuntimeError(f"x is a floating tensor, not {x.dtype}")
    shape, extents = tuple(normalized_shape), tuple(x.shape)
    if not shape:
        raise RuntimeError("normalized_shape has one dim at least")
    lead = len(extents) - len(shape)
    if lead < 0 or extents[lead:] != shape:
        raise RuntimeError(f"input {extents} does not end in normalized_shape {shape}")
    for parameter in (weight, bias):
        if parameter is not None and tuple(parameter.shape) != shape:
            raise RuntimeError(
                f"weight and bias must have the shape {shape}, not {tuple(parameter.shape)}"
            )
    if probe is None:
        return
    if lead < 1:
        raise RuntimeError("a probe needs an example dimension before normalized_shape")
    expected = accumulation_dtype(x.dtype)
    if probe.dtype != expected or tuple(probe.shape) != (extents[0], columns):
        raise RuntimeError(
            f"probe must be ({extents[0]}, {columns}) {expected}, "
            f"not {tuple(probe.shape)} {probe.dtype}"
        )


def fold(x: Tensor, normalized_shape: Sequence[int]) -> Folded:
    """Read x as (examples, rows, width): dim 0, the dims between, normalized_shape."""
    examples, *between = x.shape[: x.dim() - len(normalized_shape)] or (1,)
    return Folded(examples, math.prod(between), math.prod(normalized_shape))


def statistic_shape(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    """The shape ATen gives row statistics: the leading dims, then ones."""
    lead = x.dim() - len(normalized_shape)
    return [*x.shape[:lead], *([1] * len(normalized_shape))]


def absent(like: Tensor) -> Tensor:
    """The empty tensor that stands for a result not asked for: operators cannot return None."""
    return like.new_empty((0,))


def per_example_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    folded: Folded,
    wanted: tuple[bool, ...],
) -> Tensor:
    """Each example's part of the weight's gradient and of the bias's, (examples, kinds, width).

    Weight: sum over rows of dy * (x - mean) * rstd, `mean` None meaning zero; bias: of dy. `wanted`
    has an entry per kind; a kind that is not wanted is zero. dy and x are contiguous, and sums have
    the dtype of rstd.
    """
    shape, dtype = folded.shape, rstd.dtype
    make = rstd.new_empty if all(wanted) else rstd.new_zeros
    each = make((folded.examples, len(wanted), folded.width))
    statistics = (folded.examples, folded.rows, 1)
    if x.shape != shape:
        dy, x = dy.view(shape), x.view(shape)
    if rstd.shape != statistics:
        rstd, mean = rstd.view(statistics), None if mean is None else mean.view(statistics)
    if wanted[0] and folded.rows * folded.width >= FUSED_EXAMPLE_ELEMENTS:
        _fused_sums(dy, x, mean, rstd, each, wanted[1:] == (True,))
        return each
    if wanted[0]:
        work = torch.mul(x, rstd) if mean is None else torch.sub(x, mean).mul_(rstd)
        torch.sum(work.mul_(dy), 1, out=each.select(1, 0))
    if wanted[1:] == (True,):
        torch.sum(dy, 1, dtype=dtype, out=each.select(1, 1))
    return each


def _fused_sums(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, each: Tensor, biased: bool
) -> None:
    """The same sums by ATen's one-pass norm backward, one call per example."""
    dtype, width = rstd.dtype, each.shape[2]
    ones = rstd.new_ones(width)  # ATen wants an affine tensor and does not read it for these sums
    centre = rstd.new_zeros(rstd.shape) if mean is None else mean
    for example in range(each.shape[0]):
        # ATen sums 16-bit rows in 16 bits: half a percent off over 300 rows, so they are widened.
        _, gain, shift = torch.ops.aten.native_layer_norm_backward(
            dy[example].to(dtype),
            x[example].to(dtype),
            [width],
            centre[example],
            rstd[example],
            ones,
            ones,
            [False, True, biased],
        )
        each[example, 0] = gain
        if biased:
            each[example, 1] = shift


def batch_sum(each: Tensor, kind: int, parameter: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """The batch's gradient of a kind: its examples' parts added up, cast and shaped."""
    if parameter is None or not wanted:
        return absent(x)
    found = each.select(1, kind).sum(0)
    if found.dtype != parameter.dtype:
        found = found.to(parameter.dtype)
    return found if parameter.dim() == 1 else found.view(parameter.shape)


def squared_norms(contributions: Sequence[Tensor | None], examples: int, like: Tensor) -> Tensor:
    """Squared norms per example, one column per contribution, zero where there is none."""
    columns = [
        like.new_zeros((examples,)) if part is None else torch.linalg.vecdot(part, part)
        for part in contributions
    ]
    return torch.stack(columns, 1)

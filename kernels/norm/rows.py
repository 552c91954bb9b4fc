"""The rows a norm operator works on: their contract, and each example's part of a parameter's gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainc.kernels.library.contracts import absent, check_affine, check_probe

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


def check_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    parameters: Sequence[Tensor | None],
    probe: Tensor | None,
) -> None:
    """Reject inputs outside the contract of the norm operators; a probe has a column for each parameter."""
    # Conditions first and words only for what fails: this runs at every call.
    if not x.is_floating_point():
        raise RuntimeError(f"x must be a floating-point tensor, not {x.dtype}")
    shape, extents = tuple(normalized_shape), x.shape
    if not shape:
        raise RuntimeError("normalized_shape must have at least one dim")
    lead = len(extents) - len(shape)
    if lead < 0 or extents[lead:] != shape:
        raise RuntimeError(
            f"the shape of x, {tuple(extents)}, must end in normalized_shape {shape}"
        )
    check_affine(shape, *parameters)
    if probe is not None:
        if lead < 1:
            raise RuntimeError(
                f"a probe needs an example dim in x before normalized_shape {shape}: x is {tuple(extents)}"
            )
        check_probe(probe, extents[0], len(parameters), x)


def fold(x: Tensor, normalized_shape: Sequence[int]) -> Folded:
    """Read x as (examples, rows, width): dim 0, the dims between, normalized_shape."""
    examples, *between = x.shape[: x.dim() - len(normalized_shape)] or (1,)
    return Folded(examples, math.prod(between), math.prod(normalized_shape))


def statistic_shape(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    """The shape ATen gives row statistics: the leading dims, then ones."""
    lead = x.dim() - len(normalized_shape)
    return [*x.shape[:lead], *([1] * len(normalized_shape))]


def per_example_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    folded: Folded,
    wanted: tuple[bool, ...],
) -> Tensor:
    """Each example's part of the weight's gradient and of the bias's, (examples, parameters, width).

    Weight: sum over rows of dy * (x - mean) * rstd, `mean` None meaning zero; bias: of dy. `wanted` has an entry for
    each parameter; where it is False the part is zero. dy and x are contiguous, and sums have the dtype of rstd.
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


def batch_sum(
    each: Tensor, column: int, parameter: Tensor | None, wanted: bool, x: Tensor
) -> Tensor:
    """The batch's gradient of a parameter: its examples' parts added up, cast and shaped."""
    if parameter is None or not wanted:
        return absent(x)
    found = each.select(1, column).sum(0)
    if found.dtype != parameter.dtype:
        found = found.to(parameter.dtype)
    return found if parameter.dim() == 1 else found.view(parameter.shape)

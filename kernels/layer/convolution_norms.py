"""A convolution's weight gradient together with every example's squared norm, by one of three algorithms.

With P output positions, and in each of g groups K = C / g * kernel inputs of a position and L' =
L / g outputs, these give the same numbers:

  patches  every example's (L', K) gradients as products of dy and the unfolded input; squared, and
           added up to the batch's gradient, which is then not computed again
  grouped  the same by ATen's weight gradient of one convolution with a group for every example and
           group, so that nothing is unfolded
  gram     <U' U, dY' dY>, two (P, P) matrices a group and example, beside ATen's weight gradient

Chunks of examples bound what is unfolded or held at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import linear_norms
from trainc.kernels.library.contracts import REDUCED, accumulation_dtype

ALGORITHMS = ("auto", "patches", "grouped", "gram")

# Numbers of a group's gradient up to which one convolution with a group for every example beats
# matrix products of unfolded inputs.
FEW_ENTRIES = 1 << 14

# Unfolded inputs and gradients held at once: within a cache, or what keeps a device busy.
HELD_CPU = 1 << 19
HELD_DEVICE = 1 << 26


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the input: one number for each spatial dim, and the groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def output(self, spatial: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The spatial extents of the output."""
        sizes = zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


def choose(positions: int, inputs: int, outputs: int) -> str:
    """The cheapest algorithm for this many output positions, and inputs and outputs of each group."""
    if positions == 1 or linear_norms.choose(positions, inputs, outputs) == "gram":
        return "gram"
    return "grouped" if inputs * outputs <= FEW_ENTRIES else "patches"


def aten_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """ATen's dx and dweight; a result that is not requested is undefined."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False,
        [0] * len(geometry.stride), geometry.groups, [*mask, False],
    )  # fmt: skip
    return dx, dweight


def norms_and_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, algorithm: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """The (B,) squared norms, and dweight in the accumulation dtype where the algorithm makes it."""
    if algorithm == "auto":
        outputs, inputs = weight.shape[0] // geometry.groups, math.prod(weight.shape[1:])
        algorithm = choose(math.prod(dy.shape[2:]), inputs, outputs)
    if algorithm == "gram" and x.shape[0]:
        return _gram(dy, x, weight, geometry), None
    each = _grouped if algorithm == "grouped" else _from_patches
    dtype = accumulation_dtype(x.dtype)
    total, norms = weight.new_zeros(weight.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)
    held = weight.numel() + (0 if algorithm == "grouped" else _unfolded(dy, weight, geometry))
    for here in _chunks(x, held):
        found = each(dy[here], x[here], weight, geometry)
        # Row by row: one long float32 sum would lose digits.
        norms[here] = torch.linalg.vector_norm(found.flatten(2), dim=2).square_().sum(1)
        total += found[0] if found.shape[0] == 1 else found.sum(0)
    return norms, total


def _chunks(x: Tensor, each: int) -> Iterator[slice]:
    """Slices of examples that hold about as many numbers as the device should."""
    held = HELD_CPU if x.device.type == "cpu" else HELD_DEVICE
    step = max(1, held // max(each, 1))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def _unfolded(dy: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """How many numbers one example's unfolded input holds."""
    return math.prod(dy.shape[2:]) * math.prod(weight.shape[1:]) * geometry.groups


def _patches(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """The input unfolded, (B g, C / g * kernel, P): a column holds what a position sees."""
    if any(geometry.padding):
        x = functional.pad(x, [p for pad in reversed(geometry.padding) for p in (pad, pad)])
    spatial = len(kernel)
    windows = x
    for dim in range(spatial):
        step = geometry.dilation[dim]
        windows = windows.unfold(2 + dim, step * (kernel[dim] - 1) + 1, geometry.stride[dim])
        windows = windows[..., ::step]
    positions = math.prod(windows.shape[2 : 2 + spatial])
    order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    groups = x.shape[0] * geometry.groups
    return windows.permute(order).reshape(
        groups, x.shape[1] // geometry.groups * math.prod(kernel), positions
    )


def _by_group(dy: Tensor, geometry: Geometry) -> Tensor:
    """dy as (B g, L', P)."""
    return dy.reshape(dy.shape[0] * geometry.groups, dy.shape[1] // geometry.groups, -1)


def _from_patches(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, *weight.shape) gradients by products with the unfolded input."""
    shape = (x.shape[0], *weight.shape)
    wide = x.dtype in REDUCED
    if wide and not x.is_cuda:
        dy, x, wide = dy.float(), x.float(), False
    left, right = _by_group(dy, geometry), _patches(x, weight.shape[2:], geometry).mT
    if wide:
        return torch.bmm(left, right, out_dtype=torch.float32).view(shape)
    return torch.bmm(left, right).view(shape)


def _grouped(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B, *weight.shape) gradients by ATen, every example a group of one convolution."""
    examples, dtype = x.shape[0], accumulation_dtype(x.dtype)
    one, grad = (t.to(dtype).reshape(1, -1, *t.shape[2:]) for t in (x, dy))
    # ATen reads no more of this weight than its shape.
    stacked = weight.new_zeros(1, dtype=dtype).expand(examples * weight.shape[0], *weight.shape[1:])
    many = Geometry(
        geometry.stride, geometry.padding, geometry.dilation, examples * geometry.groups
    )
    return aten_gradients(grad, one, stacked, many, [False, True])[1].reshape(
        examples, *weight.shape
    )


def _gram(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(B,) norms from products of positions with positions."""
    found = []
    for here in _chunks(x, _unfolded(dy, weight, geometry)):
        unfolded = _patches(x[here], weight.shape[2:], geometry)
        each = linear_norms.gram(unfolded.mT, _by_group(dy[here], geometry).mT)
        found.append(each.view(-1, geometry.groups).sum(1))
    return torch.cat(found)

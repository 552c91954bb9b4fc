"""Convolution whose backward also returns per-example squared gradient norms.

How the norms are made depends on the shapes alone: see `convolution_norms`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer.convolution_norms import Geometry, aten_gradients, norms_and_gradient
from trainc.kernels.library.contracts import (
    absent,
    accumulation_dtype,
    autocast,
    check_bias,
    check_probe,
    require,
)
from trainc.kernels.library.memory_format import layout
from trainc.kernels.library.register import register

__all__ = ["convolution"]

PLAIN: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve `x` with `weight` over one, two or three spatial dims and add `bias`.

    `x` is (B, C, *spatial), `weight` (L, C / groups, *kernel) and `bias` (L,) or None, of one floating dtype; an
    example is dim 0. `stride`, `padding` (zeros, as many on both sides) and `dilation` are one number for all spatial
    dims or one for each; `groups` divides C and L. Other paddings (reflected, "same" by an odd number) are F.pad before
    a convolution that pads nothing.

    `probe` is None, or zeros (B, 2), (B, 1) without bias, in float32 (float64 for float64 x) that require grad. It is
    not read: its gradient is, per example, the squared norm of its contribution to weight.grad (column 0) and bias.grad
    (column 1), in the units of those gradients. Like any gradient it accumulates: take a new probe for each backward
    pass. Without one this is torch's own convolution.

    Returns (B, L, *output) in x's dtype, under autocast in its 16-bit one (float64 stays). Raises RuntimeError for
    other shapes, dtypes and numbers, and TypeError for a padding in words. With a probe, second derivatives raise
    RuntimeError and forward-mode ones NotImplementedError.

    Source of the norms: Gray et al. 2024, arXiv:2411.00999, as in `linear` with an output position for a row.
    """
    spatial = weight.dim() - 2
    if not 1 <= spatial <= len(PLAIN):
        raise RuntimeError(
            "weight must be (L, C / groups, *kernel) with 1 to 3 dims of kernel, "
            f"not {tuple(weight.shape)}"
        )
    numbers = tuple(_numbers(value, spatial) for value in (stride, padding, dilation))
    if probe is None:
        return PLAIN[spatial - 1](x, weight, bias, *numbers, groups)
    cast = autocast(x, weight, bias)
    y: Tensor = torch.ops.trainc.convolution(*cast, probe, *numbers, groups)
    return y


def _numbers(value: int | Sequence[int], spatial: int) -> list[int]:
    """One number for each spatial dim."""
    if isinstance(value, str):
        raise TypeError(
            f"padding must be numbers, not {value!r}: pad x by F.pad and give padding = 0"
        )
    return [value] * spatial if isinstance(value, int) else list(value)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, geometry: Geometry
) -> dict[str, Tensor]:
    """dx, dweight, dbias and the norms by definition, one example at a time, in the dtype of x."""
    shift = x.new_zeros(weight.shape[0]) if bias is None else bias
    moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    found = []
    for one, grad in zip(x.split(1), dy.split(1), strict=True):
        leaves = [t.detach().requires_grad_() for t in (one, weight, shift)]
        found.append(torch.autograd.grad(PLAIN[x.dim() - 3](*leaves, *moves), leaves, grad))
    dx, dweight, dbias = (torch.stack(parts) for parts in zip(*found, strict=True))
    norms = torch.stack([part.square().flatten(1).sum(1) for part in (dweight, dbias)], 1)
    return {
        "dx": dx.squeeze(1),
        "dweight": dweight.sum(0),
        "dbias": dbias.sum(0),
        "norms": norms[:, : 1 if bias is None else 2],
    }


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None,
    geometry: Geometry,
) -> None:  # fmt: skip
    kernel, groups = tuple(weight.shape[2:]), geometry.groups
    require(
        groups >= 1
        and 1 <= len(kernel) <= len(PLAIN)
        and x.dim() == weight.dim()
        and x.shape[1] == weight.shape[1] * groups
        and weight.shape[0] % groups == 0,
        lambda: (
            f"x must be (B, C, *spatial) for a weight (L, C / groups, *kernel), not {tuple(x.shape)} "
            f"for {tuple(weight.shape)} and {groups} groups"
        ),
    )
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        _check_numbers(name, getattr(geometry, name), len(kernel), least)
    require(
        all(n >= 1 for n in geometry.output(x.shape[2:], kernel)),
        lambda: (
            f"a kernel of {kernel} does not fit x {tuple(x.shape)} with padding {list(geometry.padding)} "
            f"and dilation {list(geometry.dilation)}"
        ),
    )
    check_bias(bias, weight)
    check_probe(probe, x.shape[0], 1 if bias is None else 2, x)


def _check_numbers(name: str, numbers: Sequence[int], spatial: int, least: int) -> None:
    require(
        len(numbers) == spatial and min(numbers) >= least,
        lambda: (
            f"{name} must be {spatial} numbers, one for each spatial dim of x, of at least {least}, "
            f"not {list(numbers)}"
        ),
    )


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, probe, Geometry(stride, padding, dilation, groups))
    y: Tensor = PLAIN[x.dim() - 3](x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=layout(x))


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    geometry = Geometry(stride, padding, dilation, groups)
    _check(x, weight, bias, probe, geometry)
    shape = (x.shape[0], weight.shape[0], *geometry.output(x.shape[2:], weight.shape[2:]))
    return x.new_empty(shape).contiguous(memory_format=layout(x))


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and the norms; results not requested have no elements."""
    geometry = Geometry(stride, padding, dilation, groups)
    columns: list[Tensor] = []
    dweight: Tensor | None = None
    if with_norms:
        squares, dweight = norms_and_gradient(dy, x, weight, geometry)
        columns.append(squares)
    missing = [mask[0], mask[1] and dweight is None]
    dx, whole = aten_gradients(dy, x, weight, geometry, missing) if any(missing) else (x, weight)
    dweight = whole if dweight is None else dweight
    dbias = absent(x)
    if has_bias and (with_norms or mask[2]):
        each = dy.flatten(2).sum(2, dtype=accumulation_dtype(x.dtype))
        columns.append(torch.linalg.vecdot(each, each))
        dbias = each.sum(0).to(weight.dtype) if mask[2] else dbias
    return (
        dx.contiguous(memory_format=layout(x)) if mask[0] else absent(x),
        dweight.to(weight.dtype).contiguous(memory_format=layout(weight)) if mask[1] else absent(x),
        dbias,
        torch.stack(columns, 1) if with_norms else absent(x),
    )


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight = (
        t.new_empty(t.shape).contiguous(memory_format=layout(t)) if wanted else absent(x)
        for t, wanted in zip((x, weight), mask, strict=False)
    )
    dbias = weight.new_empty(weight.shape[:1]) if has_bias and mask[2] else absent(x)
    shape = (x.shape[0], 2 if has_bias else 1)
    norms = x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) if with_norms else absent(x)
    return dx, dweight, dbias, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, *numbers = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.numbers = bias is not None, numbers


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    found = torch.ops.trainc.convolution_backward(
        dy, x, weight, ctx.has_bias, *ctx.numbers, list(wants[:3]), wants[3]
    )
    kept = (g if wanted else None for g, wanted in zip(found, wants, strict=False))
    return *kept, None, None, None, None


register(
    "convolution",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register("convolution_backward", cpu=eager_backward, cuda=eager_backward, fake=fake_backward)

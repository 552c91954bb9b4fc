"""GroupNorm whose backward can also return per-example squared gradient norms.

Groups never mix examples, so B examples of C channels are one example of B * C channels in
B * groups groups. ATen's backward of that returns each channel's sums, which are what each example
adds to the gradients, together with dx: statistics cost no pass over x or dy. 16-bit x is widened,
because ATen would round those sums to 16 bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import (
    absent,
    accumulation_dtype,
    check_affine,
    check_probe,
    require,
)
from trainc.kernels.library.memory_format import layout
from trainc.kernels.library.register import register

__all__ = ["group_norm"]

COLUMNS = 2


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each example of `x` over groups of channels and all positions, then scale and shift channels.

    `x` is (B, C, *spatial), floating; an example is dim 0. `groups` divides C: C of them are InstanceNorm, one a
    LayerNorm over all of an example. `weight` and `bias` are (C,), or None for a factor of one and nothing added; they
    have x's dtype, or both float32 beside 16-bit x. `eps` keeps the root of the biased variance from zero.

    `probe` is None, or zeros (B, 2) in float32 (float64 for float64 x) that require grad. It is not read: its gradient
    is, per example, the squared norm of its contribution to weight.grad (column 0) and bias.grad (column 1), in the
    units of those gradients, and zero for a parameter that is None. Like any gradient it accumulates: take a new probe
    for each backward pass. Without one this is F.group_norm.

    Returns a tensor of x's shape and dtype (float32 under CUDA's autocast). Raises RuntimeError for other shapes and
    dtypes; without a probe the errors are F.group_norm's, among them ValueError for one example of one value a group.
    With a probe, second derivatives raise RuntimeError and forward-mode ones NotImplementedError.

    Source: Wu and He 2018, arXiv:1803.08494.
    """
    if probe is None:
        return functional.group_norm(x, groups, weight, bias, eps)
    y: Tensor = torch.ops.trainc.group_norm(x, groups, weight, bias, probe, eps)[0]
    return y


def reference(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, dy: Tensor, eps: float
) -> dict[str, Tensor]:
    """y, dx, dweight, dbias and the (B, 2) norms by definition, in the dtype of x."""
    examples, channels = x.shape[:2]
    parts = x.reshape(examples, groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    unit = (centred * rstd).view(examples, channels, -1)
    grad = dy.reshape(unit.shape)
    y, g = unit, grad
    if weight is not None:
        y, g = unit * weight.unsqueeze(1), grad * weight.unsqueeze(1)
    y = y if bias is None else y + bias.unsqueeze(1)
    g, u = g.view(parts.shape), unit.view(parts.shape)
    dx = rstd * (g - g.mean(2, keepdim=True) - u * (g * u).mean(2, keepdim=True))
    each = [(grad * unit).sum(2), grad.sum(2)]
    given = (weight is not None, bias is not None)
    norms = [part.square().sum(1) * there for part, there in zip(each, given, strict=True)]
    return {
        "y": y.view(x.shape),
        "dx": dx.view(x.shape),
        "dweight": each[0].sum(0),
        "dbias": each[1].sum(0),
        "norms": torch.stack(norms, 1),
    }


def _check(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, probe: Tensor | None
) -> None:
    require(x.is_floating_point(), lambda: f"x must be a floating-point tensor, not {x.dtype}")
    require(
        x.dim() >= 2 and groups >= 1 and x.shape[1] % groups == 0,
        lambda: (
            f"x must be (B, C, *spatial) with C a multiple of {groups} groups, not {tuple(x.shape)}"
        ),
    )
    check_affine((x.shape[1],), weight, bias)
    check_probe(probe, x.shape[0], COLUMNS, x)


def _dense(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter in `dtype`, contiguous: ATen's kernel does not look at its strides."""
    return None if parameter is None else parameter.to(dtype).contiguous()


def eager_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, groups, weight, bias, probe)
    dtype, (examples, channels) = accumulation_dtype(x.dtype), x.shape[:2]
    affine = (_dense(weight, dtype), _dense(bias, dtype))
    # On CUDA ATen takes images channel by channel only.
    taken = torch.contiguous_format if x.is_cuda else layout(x)
    y, mean, rstd = torch.native_group_norm(
        x.to(dtype).contiguous(memory_format=taken),
        *affine, examples, channels, math.prod(x.shape[2:]), groups, eps,
    )  # fmt: skip
    return y.to(x.dtype).contiguous(memory_format=layout(x)), mean, rstd


def fake_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, groups, weight, bias, probe)
    mean = x.new_empty((x.shape[0], groups), dtype=accumulation_dtype(x.dtype))
    return (
        x.new_empty(x.shape).contiguous(memory_format=layout(x)),
        mean,
        torch.empty_like(mean),
    )


def _sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, and the (B, C) contributions of every example to dweight and dbias."""
    examples, channels = x.shape[:2]
    gain = None if weight is None else weight.to(mean.dtype).repeat(examples)
    one, grad = (
        t.to(mean.dtype).contiguous().view(1, examples * channels, *t.shape[2:]) for t in (x, dy)
    )
    dx, scale, shift = torch.ops.aten.native_group_norm_backward(
        grad, one, mean.view(1, -1), rstd.view(1, -1), gain,
        1, examples * channels, math.prod(x.shape[2:]), examples * groups, mask,
    )  # fmt: skip
    return (
        dx.view(x.shape) if mask[0] else None,
        scale.view(examples, channels) if mask[1] else None,
        shift.view(examples, channels) if mask[2] else None,
    )


def eager_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, groups: int, mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and the (B, 2) norms; masked-out or undefined results have no elements."""
    wanted = [mask[0], weight is not None, weight is not None and bias is not None]
    dx, scale, shift = (
        _sums(dy, x, mean, rstd, weight, groups, wanted) if x.numel() else _nothing(x, mean)
    )
    if weight is None:
        scale = None
        shift = (
            None
            if bias is None
            else dy.reshape(*x.shape[:2], math.prod(x.shape[2:])).sum(2, dtype=mean.dtype)
        )
    each = [scale, None if bias is None else shift]
    squares = [
        mean.new_zeros(x.shape[0]) if part is None else torch.linalg.vecdot(part, part)
        for part in each
    ]
    dweight, dbias = (
        absent(x) if p is None or part is None or not kept else part.sum(0).to(p.dtype)
        for p, part, kept in zip((weight, bias), each, mask[1:], strict=True)
    )
    dx = absent(x) if dx is None else dx.to(x.dtype).contiguous(memory_format=layout(x))
    return dx if mask[0] else absent(x), dweight, dbias, torch.stack(squares, 1)


def _nothing(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `_sums` for an x without elements, where ATen would divide by zero."""
    return torch.empty_like(x), mean.new_zeros(x.shape[:2]), mean.new_zeros(x.shape[:2])


def fake_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, groups: int, mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape).contiguous(memory_format=layout(x)) if mask[0] else absent(x)
    dweight, dbias = (
        absent(x) if p is None or not kept else p.new_empty(p.shape)
        for p, kept in zip((weight, bias), mask[1:], strict=True)
    )
    return dx, dweight, dbias, mean.new_empty((x.shape[0], COLUMNS))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, groups, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.groups = groups


def _backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 6
    wants = ctx.needs_input_grad
    mask = [wants[0], wants[2], wants[3]]
    *found, norms = torch.ops.trainc.group_norm_backward(dy, *ctx.saved_tensors, ctx.groups, mask)
    dx, dweight, dbias = (g if kept else None for g, kept in zip(found, mask, strict=True))
    return dx, None, dweight, dbias, norms if wants[4] else None, None


register(
    "group_norm",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register("group_norm_backward", cpu=eager_backward, cuda=eager_backward, fake=fake_backward)
# torch.autocast's own rules: float32 on CUDA, left alone on CPU where ATen takes mixed precision.
torch.library.register_autocast("trainc::group_norm", "cuda", torch.float32)

"""RMSNorm whose backward can also return per-example squared gradient norms.

Contract. `x` is (B, ..., *normalized_shape), floating; `weight` is normalized_shape or None;
`probe` is None or (B, 1) zeros in float32 (float64 for float64 x) whose gradient is, per example
(dim 0 of x), the squared norm of its contribution to weight.grad, in the units of that gradient.
`eps` None is what nn.RMSNorm uses. `casting` says where a 16-bit input is rounded:

  none    x * rstd * weight in float32, rounded once to x's dtype (nn.RMSNorm, on CPU bit-equal)
  llama   (x * rstd) rounded to x's dtype, then times weight in the promoted dtype (LlamaRMSNorm in
          transformers: a float32 weight gives a float32 result)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.kernels.support import (
    REDUCED,
    absent,
    accumulation_dtype,
    check_norm,
    fold,
    on_demand,
    per_example_sums,
    require,
    squared_norms,
    statistic_shape,
)

COLUMNS = 1
CASTINGS = ("none", "llama")


def default_eps(dtype: torch.dtype) -> float:
    """The eps nn.RMSNorm uses for None: that of the dtype it computes in, float32 for 16-bit x."""
    return torch.finfo(accumulation_dtype(dtype)).eps


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float | None = None,
    casting: str = "none",
) -> Tensor:
    """RMSNorm of x over its last dims, same shape; see the module for `probe` and `casting`."""
    eps = default_eps(x.dtype) if eps is None else eps
    y: Tensor = torch.ops.trainc.rms_norm(x, list(normalized_shape), weight, probe, eps, casting)[0]
    return y


def reference(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, dy: Tensor, eps: float
) -> dict[str, Tensor]:
    """y, dx, dweight and the (B, 1) norms by definition, in the dtype of x."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    unit = x * rstd
    g = dy if weight is None else dy * weight
    rows = tuple(range(1, dims[0]))
    each = (dy * unit).sum(rows) if rows else dy * unit
    return {
        "y": unit if weight is None else unit * weight,
        "dx": rstd * (g - unit * (g * unit).mean(dims, keepdim=True)),
        "dweight": each.sum(0),
        "norms": each.square().flatten(1).sum(1, keepdim=True) * (weight is not None),
    }


def check(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    casting: str,
) -> None:
    """Reject arguments outside the contract."""
    check_norm(x, normalized_shape, weight, None, probe, COLUMNS)
    require(casting in CASTINGS, lambda: f"casting is one of {CASTINGS}, not {casting!r}")


def result_dtype(x: Tensor, weight: Tensor | None, casting: str) -> torch.dtype:
    """The dtype of y."""
    """The dtype of y."""
    if casting == "llama" and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def eager_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    check(x, normalized_shape, weight, probe, casting)
    value = x.to(accumulation_dtype(x.dtype)).contiguous()
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    # Same operations in the same order as ATen's composite, so float32 results are bit-equal to it.
    work = value.square()
    rstd = work.mean(dims, keepdim=True).add_(eps).rsqrt_()
    torch.mul(value, rstd, out=work)
    if casting == "llama":
        unit = work.to(x.dtype)
        if weight is None:
            return unit, rstd
        return (unit.mul_(weight) if unit.dtype == weight.dtype else unit * weight), rstd
    if weight is not None:
        work.mul_(weight)
    return work.to(x.dtype), rstd


_forward = torch.library.custom_op(
    "trainc::rms_norm", eager_forward, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    check(x, normalized_shape, weight, probe, casting)
    y = x.new_empty(x.shape, dtype=result_dtype(x, weight, casting))
    return y, x.new_empty(statistic_shape(x, normalized_shape), dtype=accumulation_dtype(x.dtype))


def eager_backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    casting: str,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and the (B, 1) norms; results not asked for have no elements."""
    dtype = rstd.dtype
    grad, value = dy.to(dtype).contiguous(), x.to(dtype).contiguous()
    dx, dweight, norms = absent(x), absent(x), absent(rstd)
    if output_mask[0]:
        wide = None if weight is None else weight.to(dtype)
        dx = _input_gradient(grad, value, normalized_shape, rstd, wide).to(x.dtype)
    if output_mask[1] or with_norms:
        each = None
        folded = fold(x if x.dim() > len(normalized_shape) else x.unsqueeze(0), normalized_shape)
        if weight is not None and casting == "llama" and x.dtype in REDUCED:
            unit = torch.mul(value, rstd).to(x.dtype)
            each = torch.mul(grad, unit).view(folded.shape).sum(1)
        elif weight is not None:
            each, _ = per_example_sums(grad, value, None, rstd, folded, want_bias=False)
        if with_norms:
            norms = squared_norms((each,), folded.examples, rstd)
        if output_mask[1] and each is not None and weight is not None:
            dweight = each.sum(0).to(weight.dtype).view(weight.shape)
    return dx, dweight, norms


def _input_gradient(
    dy: Tensor, x: Tensor, normalized_shape: Sequence[int], rstd: Tensor, weight: Tensor | None
) -> Tensor:
    """ATen's LayerNorm backward at mean zero, with the row mean of dy * weight put back."""
    zeros = torch.zeros_like(rstd)
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, x, normalized_shape, zeros, rstd, weight, None, [True, False, False]
    )[0]
    width = math.prod(normalized_shape)
    if weight is None:
        total = dy.reshape(rstd.numel(), width).sum(1)
    else:
        total = torch.mv(dy.reshape(rstd.numel(), width), weight.reshape(width))
    return dx.add_(total.view(rstd.shape).mul_(rstd).div_(max(width, 1)))


_backward = torch.library.custom_op(
    "trainc::rms_norm_backward", eager_backward, mutates_args=(), device_types="cpu"
)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    casting: str,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = (
        t.new_empty(t.shape) if t is not None and wanted else absent(x)
        for t, wanted in zip((x, weight), output_mask, strict=True)
    )
    norms = rstd.new_empty((x.shape[0], COLUMNS)) if with_norms else absent(rstd)
    return dx, dweight, norms


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, normalized_shape, weight, probe, _, casting = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rstd, weight)
    ctx.normalized_shape, ctx.casting = list(normalized_shape), casting
    ctx.probed = probe is not None


def _differentiate(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 6
    x, rstd, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    mask = [wants[0], weight is not None and wants[2]]
    with_norms = ctx.probed and wants[3]
    dx, dweight, norms = torch.ops.trainc.rms_norm_backward(
        dy, x, ctx.normalized_shape, rstd, weight, ctx.casting, mask, with_norms
    )
    return (
        dx if mask[0] else None, None, dweight if mask[1] else None,
        norms if with_norms else None, None, None,
    )  # fmt: skip


# No autocast rule: mixed precision is in the contract, and torch leaves rms_norm alone as well.
_forward.register_autograd(_differentiate, setup_context=_save)
_forward.register_kernel("cuda")(on_demand("triton_norm_launch", "rms_norm_forward"))
_backward.register_kernel("cuda")(on_demand("triton_norm_launch", "rms_norm_backward"))

"""Residual add and norm in one operator each: the sum, and the sum normalised.

Contract. `x` and `residual` are floating tensors of one shape (B, ..., *normalized_shape); their
sum has the promoted dtype and is rounded to it before it is normalised, so results are those of
`layer_norm(x + residual, ..)` and `rms_norm(x + residual, ..)`, on CPU bit for bit, with the same
`probe` (see those modules). Both results are differentiable and x and residual receive the same
gradient: what reached the sum plus what came through the norm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.kernels import layer_norm, rms_norm
from trainc.kernels.support import absent, accumulation_dtype, on_demand, require, statistic_shape


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(x + residual, LayerNorm of that), each in the shape of x."""
    total, y, _, _ = torch.ops.trainc.add_layer_norm(
        x, residual, list(normalized_shape), weight, bias, probe, eps
    )
    return total, y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float | None = None,
    casting: str = "none",
) -> tuple[Tensor, Tensor]:
    """(x + residual, RMSNorm of that), each in the shape of x; eps and casting as rms_norm."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    eps = rms_norm.default_eps(dtype) if eps is None else eps
    total, y, _ = torch.ops.trainc.add_rms_norm(
        x, residual, list(normalized_shape), weight, probe, eps, casting
    )
    return total, y


def reference(x: Tensor, residual: Tensor, norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(total, y) by definition, `norm` being a differentiable norm of one tensor."""
    total = x + residual
    return total, norm(total)


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Reject summands of different shapes: nothing is broadcast."""
    require(
        x.shape == residual.shape,
        lambda: f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape",
    )


def imagined_total(x: Tensor, residual: Tensor) -> Tensor:
    """An unwritten tensor like the sum."""
    check_pair(x, residual)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def eager_layer_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_pair(x, residual)
    total = torch.add(x, residual).contiguous()
    return total, *layer_norm.eager_forward(total, normalized_shape, weight, bias, probe, eps)


_layer = torch.library.custom_op(
    "trainc::add_layer_norm", eager_layer_forward, mutates_args=(), device_types="cpu"
)


@_layer.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = imagined_total(x, residual)
    layer_norm.check_norm(total, normalized_shape, weight, bias, probe, layer_norm.COLUMNS)
    dtype = layer_norm.statistic_dtype(total, weight, bias, probe)
    mean = x.new_empty(statistic_shape(x, normalized_shape), dtype=dtype)
    return total, torch.empty_like(total), mean, torch.empty_like(mean)


def eager_layer_backward(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum's gradient, dweight, dbias and norms; results not asked for have no elements."""
    arguments = (dy, total, normalized_shape, mean, rstd, weight, bias, output_mask)
    norms = absent(rstd)
    if with_norms:
        dx, dweight, dbias, norms = layer_norm.eager_backward(*arguments)
    else:
        found = torch.ops.aten.native_layer_norm_backward(*arguments)
        dx, dweight, dbias = (absent(total) if part is None else part for part in found)
    if output_mask[0] and dtotal is not None:
        dx = dx.add_(dtotal)
    return dx, dweight, dbias, norms


_layer_backward = torch.library.custom_op(
    "trainc::add_layer_norm_backward", eager_layer_backward, mutates_args=(), device_types="cpu"
)


def imagined_gradients(
    likes: Sequence[Tensor | None], output_mask: Sequence[bool], total: Tensor
) -> list[Tensor]:
    """Unwritten gradients, without elements where not wanted."""
    return [
        like.new_empty(like.shape) if like is not None and wanted else absent(total)
        for like, wanted in zip(likes, output_mask, strict=True)
    ]


@_layer_backward.register_fake
def _(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias = imagined_gradients((total, weight, bias), output_mask, total)
    columns = layer_norm.COLUMNS
    norms = rstd.new_empty((total.shape[0], columns)) if with_norms else absent(rstd)
    return dx, dweight, dbias, norms


def eager_rms_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(x, residual)
    total = torch.add(x, residual).contiguous()
    return total, *rms_norm.eager_forward(total, normalized_shape, weight, probe, eps, casting)


_rms = torch.library.custom_op(
    "trainc::add_rms_norm", eager_rms_forward, mutates_args=(), device_types="cpu"
)


@_rms.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    total = imagined_total(x, residual)
    rms_norm.check(total, normalized_shape, weight, probe, casting)
    y = total.new_empty(total.shape, dtype=rms_norm.result_dtype(total, weight, casting))
    dtype = accumulation_dtype(total.dtype)
    return total, y, x.new_empty(statistic_shape(x, normalized_shape), dtype=dtype)


def eager_rms_backward(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    casting: str,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's gradient, dweight and norms; results not asked for have no elements."""
    dx, dweight, norms = rms_norm.eager_backward(
        dy, total, normalized_shape, rstd, weight, casting, output_mask, with_norms
    )
    if output_mask[0] and dtotal is not None:
        dx = dx.add_(dtotal)
    return dx, dweight, norms


_rms_backward = torch.library.custom_op(
    "trainc::add_rms_norm_backward", eager_rms_backward, mutates_args=(), device_types="cpu"
)


@_rms_backward.register_fake
def _(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    casting: str,
    output_mask: Sequence[bool],
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = imagined_gradients((total, weight), output_mask, total)
    columns = rms_norm.COLUMNS
    norms = rstd.new_empty((total.shape[0], columns)) if with_norms else absent(rstd)
    return dx, dweight, norms


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, normalized_shape, *affine, probe, _ = inputs[:7]
    total, _, *statistics = output
    del x, residual, normalized_shape, affine, probe, total, statistics

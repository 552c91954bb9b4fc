"""Residual add and LayerNorm in one operator: the sum, and the sum normalised.

Results are those of `layer_norm(x + residual, ..)`, on CPU bit for bit. Under CUDA's autocast the sum keeps
its dtype and the norm of it is float32, as torch's composition has it; on a CPU autocast leaves both
alone, as it leaves torch's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED, absent, check_norm, lazy, statistic_shape
from trainc.kernels.library.register import in_float32, register, register_autocast
from trainc.kernels.norm import layer_norm

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum over its last dims, as `layer_norm` does.

    `x` and `residual` are floating tensors of one shape (B, ..., *normalized_shape), in one or two dtypes; nothing is
    broadcast. The sum is rounded to their promoted dtype and normalized then. `normalized_shape` has one dim at least;
    `weight` and `bias` have that shape, or are None, in the sum's dtype, or both float32 beside a 16-bit sum; `eps` is
    added to the biased variance.

    `probe` is None, or zeros (B, 2) in float32 (float64 for a float64 sum) that require grad. It is not read: its
    gradient is, per example (dim 0), the squared norm of its contribution to weight.grad (column 0) and bias.grad
    (column 1), in the units of those gradients, and zero for a parameter that is None. Take a new one for each backward
    pass.

    Returns (x + residual, its LayerNorm), both of x's shape and the promoted dtype (the norm float32 under CUDA's
    autocast). Both are differentiable; x and residual receive the same gradient, that of the sum and that through the
    norm. Raises RuntimeError for other shapes and dtypes. Second derivatives raise RuntimeError and forward-mode ones
    NotImplementedError, except on a CPU without a probe.

    Source: Ba et al. 2016, arXiv:1607.06450; the norms: Gray et al. 2024, arXiv:2411.00999.
    """
    if probe is None and x.device.type == "cpu":  # nothing to gain from an operator there
        check_pair(x, residual)
        summed = x + residual
        return summed, layer_norm.layer_norm(summed, normalized_shape, weight, bias, None, eps)
    total, y, _, _ = _forward_op(x, residual, list(normalized_shape), weight, bias, probe, eps)
    return total, y


def reference(x: Tensor, residual: Tensor, norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(total, y) by definition, `norm` being a differentiable norm of one tensor."""
    total = x + residual
    return total, norm(total)


def check_pair(x: Tensor, residual: Tensor) -> None:
    """Reject summands of different shapes: nothing is broadcast."""
    if x.shape != residual.shape:  # traced by dynamo, which takes no message that is made on demand
        raise RuntimeError(
            f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape"
        )


def fake_total(x: Tensor, residual: Tensor) -> Tensor:
    """An unwritten tensor like the sum."""
    check_pair(x, residual)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def eager_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_pair(x, residual)
    total = (x + residual).contiguous()
    return total, *layer_norm.eager_forward(total, normalized_shape, weight, bias, probe, eps)


def fake_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = fake_total(x, residual)
    check_norm(total, normalized_shape, weight, bias, probe, layer_norm.COLUMNS)
    dtype = layer_norm.statistic_dtype(total, weight, bias, probe)
    mean = x.new_empty(statistic_shape(x, normalized_shape), dtype=dtype)
    return total, torch.empty_like(total), mean, torch.empty_like(mean)


def eager_backward(
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


def fake_gradients(
    likes: Sequence[Tensor | None], output_mask: Sequence[bool], total: Tensor
) -> list[Tensor]:
    """Unwritten gradients, without elements where not wanted."""
    return [
        like.new_empty(like.shape) if like is not None and wanted else absent(total)
        for like, wanted in zip(likes, output_mask, strict=True)
    ]


def fake_backward(
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
    dx, dweight, dbias = fake_gradients((total, weight, bias), output_mask, total)
    columns = layer_norm.COLUMNS
    norms = rstd.new_empty((total.shape[0], columns)) if with_norms else absent(rstd)
    return dx, dweight, dbias, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, normalized_shape, weight, bias, probe, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, mean, rstd, weight, bias)
    ctx.normalized_shape, ctx.probed = list(normalized_shape), probe is not None
    ctx.dtypes = (x.dtype, residual.dtype)


def to_summands(
    gradient: Tensor | None, wanted: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """The sum's gradient for x and for residual, where wanted."""
    return [
        gradient.to(dtype) if wants and gradient is not None else None
        for wants, dtype in zip(wanted[:2], dtypes, strict=True)
    ]


def _backward(ctx, dtotal, dy, *_):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    if dy is None:
        return *to_summands(dtotal, wants, ctx.dtypes), *(None,) * 5
    total, mean, rstd, weight, bias = ctx.saved_tensors
    mask = [any(wants[:2]), weight is not None and wants[3], bias is not None and wants[4]]
    dx, dweight, dbias, norms = _backward_op(
        dtotal, dy, total, ctx.normalized_shape, mean, rstd, weight, bias, mask, ctx.probed
    )
    return (
        *to_summands(dx, wants, ctx.dtypes), None, dweight if mask[1] else None,
        dbias if mask[2] else None, norms if wants[5] else None, None,
    )  # fmt: skip


_forward_op = register(
    "add_layer_norm",
    cpu=eager_forward,
    cuda=lazy("norm.triton_add_norm_launch", "layer_forward"),
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "add_layer_norm_backward",
    cpu=eager_backward,
    cuda=lazy("norm.triton_add_norm_launch", "layer_backward"),
    fake=fake_backward,
)


def autocast(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What autocast makes of the composition: a sum in the promoted dtype, a norm in float32.

    Where the sum has 16 bits that is two operators, for the fused one gives both one dtype. A
    residual stream in float32, the usual one, stays fused.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    if torch.promote_types(x.dtype, residual.dtype) not in REDUCED:
        found = _forward_op(x, residual, normalized_shape, weight, bias, probe, eps)
        return found
    total = x + residual
    affine = (None if part is None else in_float32(part) for part in (weight, bias))
    wide = torch.ops.trainc.layer_norm.default(
        in_float32(total), normalized_shape, *affine, probe, eps
    )
    return total, *wide


register_autocast(_forward_op, autocast)

"""Residual add and RMSNorm in one operator: `add_norm` with `rms_norm` for the norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import (
    REDUCED,
    absent,
    accumulation_dtype,
    lazy,
    statistic_shape,
)
from trainc.kernels.library.register import register, register_autocast
from trainc.kernels.norm import rms_norm
from trainc.kernels.norm.add_layer_norm import (
    check_pair,
    fake_gradients,
    fake_total,
    to_summands,
)

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float | None = None,
    casting: str = "none",
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum over its last dims, as `rms_norm` does.

    `x` and `residual` are floating tensors of one shape (B, ..., *normalized_shape), in one or two dtypes; nothing is
    broadcast. The sum is rounded to their promoted dtype and normalized then. `normalized_shape` has one dim at least;
    `weight` has that shape and any floating dtype, or is None. `eps` None is the machine epsilon of the sum's dtype, of
    float32 for a 16-bit sum. `casting` is "none" (rounded once), "llama" (rounded before the weight) or "gemma"
    (the factor is 1 + weight), as `rms_norm` says.

    `probe` is None, or zeros (B, 1) in float32 (float64 for a float64 sum) that require grad. It is not read: its
    gradient is, per example (dim 0), the squared norm of its contribution to weight.grad in the units of that gradient,
    zero without a weight. Take a new one for each backward pass.

    Returns (x + residual, its RMSNorm), both of x's shape; the norm has the promoted dtype, with "llama" promoted with
    weight's, with "none" float32 under CUDA's autocast. Both are differentiable; x and residual receive the same
    gradient, that of the sum and that through the norm. Raises RuntimeError for other shapes, dtypes and castings.
    Second derivatives raise RuntimeError and forward-mode ones NotImplementedError, except for up to 65536 elements of
    one dtype on a CPU, uncompiled, with no probe or casting.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the norms: Gray et al. 2024, arXiv:2411.00999.
    """
    if probe is None and x.device.type == "cpu":  # nothing to gain from an operator there
        check_pair(x, residual)
        summed = x + residual
        return summed, rms_norm.rms_norm(summed, normalized_shape, weight, None, eps, casting)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    eps = rms_norm.default_eps(dtype) if eps is None else eps
    total, y, _ = _forward_op(x, residual, list(normalized_shape), weight, probe, eps, casting)
    return total, y


def eager_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(x, residual)
    total = (x + residual).contiguous()
    return total, *rms_norm.eager_forward(total, normalized_shape, weight, probe, eps, casting)


def fake_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    total = fake_total(x, residual)
    rms_norm.check(total, normalized_shape, weight, probe, casting)
    y = total.new_empty(total.shape, dtype=rms_norm.result_dtype(total, weight, casting))
    dtype = accumulation_dtype(total.dtype)
    return total, y, x.new_empty(statistic_shape(x, normalized_shape), dtype=dtype)


def eager_backward(
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


def fake_backward(
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
    dx, dweight = fake_gradients((total, weight), output_mask, total)
    columns = rms_norm.COLUMNS
    norms = rstd.new_empty((total.shape[0], columns)) if with_norms else absent(rstd)
    return dx, dweight, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, normalized_shape, weight, _, _, casting = inputs
    total, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, rstd, weight)
    ctx.normalized_shape, ctx.casting = list(normalized_shape), casting
    ctx.dtypes = (x.dtype, residual.dtype)


def _backward(ctx, dtotal, dy, *_):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    if dy is None:
        return *to_summands(dtotal, wants, ctx.dtypes), *(None,) * 5
    total, rstd, weight = ctx.saved_tensors
    mask = [any(wants[:2]), weight is not None and wants[3]]
    dx, dweight, norms = _backward_op(
        dtotal, dy, total, ctx.normalized_shape, rstd, weight, ctx.casting, mask, wants[4]
    )
    return (
        *to_summands(dx, wants, ctx.dtypes), None, dweight if mask[1] else None,
        norms if wants[4] else None, None, None,
    )  # fmt: skip


_forward_op = register(
    "add_rms_norm",
    cpu=eager_forward,
    cuda=lazy("norm.triton_add_norm_launch", "rms_forward"),
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register(
    "add_rms_norm_backward",
    cpu=eager_backward,
    cuda=lazy("norm.triton_add_norm_launch", "rms_backward"),
    fake=fake_backward,
)


def autocast(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As add_norm's rule, with the norm's own where it has one."""
    reduced = torch.promote_types(x.dtype, residual.dtype) in REDUCED
    found: tuple[Tensor, Tensor, Tensor]
    if casting != "none" or not reduced:
        found = _forward_op(x, residual, normalized_shape, weight, probe, eps, casting)
        return found
    total = x + residual
    return total, *rms_norm.autocast(total, normalized_shape, weight, probe, eps, casting)


register_autocast(_forward_op, autocast)

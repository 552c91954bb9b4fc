"""RMSNorm whose backward can also return per-example squared gradient norms."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import (
    REDUCED,
    absent,
    accumulation_dtype,
    compiler_fuses,
    composition_is_cheaper,
)
from trainc.kernels.norm.norm_operator import Norm, NormOperator
from trainc.kernels.norm.rows import Folded, batch_sum, check_norm, fold, per_example_sums

__all__ = ["rms_norm"]

CASTINGS = ("none", "llama")
OFFSET = "gemma"  # not a way of rounding: the factor is 1 + weight
# Elements up to which dx is made by definition; docs/kernels.md has the measurement.
SMALL = 1 << 16


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
    """Normalize `x` over its last dims: x / sqrt(mean(x^2) + eps) * weight.

    `x` is (B, ..., *normalized_shape), floating; an example is dim 0. `normalized_shape` has one dim at least; `weight`
    has that shape and any floating dtype, or is None for a factor of one. `eps` None is what nn.RMSNorm uses, the
    machine epsilon of x's dtype, of float32 for 16-bit x. `casting` says where 16-bit x is rounded (rstd is 1 / root):

      "none"   x * rstd * weight in float32, rounded once to x's dtype (nn.RMSNorm, on CPU bit-equal)
      "llama"  (x * rstd) rounded to x's dtype, then times weight in the promoted dtype (transformers' LlamaRMSNorm)
      "gemma"  x * rstd * (1 + weight) in float32, rounded once (transformers' GemmaRMSNorm)

    `probe` is None, or zeros (B, 1) in float32 (float64 for float64 x) that require grad. It is not read: its gradient
    is, per example, the squared norm of its contribution to weight.grad in the units of that gradient, zero without a
    weight. Like any gradient it accumulates: take a new probe for each backward pass.

    Returns a tensor of x's shape, in x's dtype but for "llama" ("none" under CUDA's autocast: float32). Raises
    RuntimeError for other shapes, dtypes and castings. Second derivatives raise RuntimeError and forward-mode ones
    NotImplementedError, except without a probe: for up to 65536 elements of one dtype on a CPU, uncompiled and with no
    casting, and in code compiled for CUDA, where this is torch's own operations.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the norms: Gray et al. 2024, arXiv:2411.00999.
    """
    fuses = probe is None and compiler_fuses(x)
    if casting == "none":
        alike = weight is None or weight.dtype == x.dtype
        if (fuses and alike) or (probe is None and composition_is_cheaper(SMALL, x, weight)):
            try:
                return functional.rms_norm(x, list(normalized_shape), weight, eps)
            except RuntimeError:
                check_norm(x, normalized_shape, (weight,), None)  # names what is wrong
                raise
        fuses = False  # torch has no rule for mixed dtypes here, and under autocast another one
    eps = default_eps(x.dtype) if eps is None else eps
    if fuses:
        return composition(x, normalized_shape, weight, eps, casting)
    y: Tensor = OPERATOR.forward_op(x, list(normalized_shape), weight, probe, eps, casting)[0]
    return y


def composition(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, casting: str
) -> Tensor:
    """The norm in torch's own operations, as modules of the castings "llama" and "gemma" spell it."""
    check(x, normalized_shape, weight, None, eps, casting)
    value = x.to(accumulation_dtype(x.dtype))
    dims = list(range(-len(normalized_shape), 0))
    unit = value * torch.rsqrt(value.square().mean(dims, keepdim=True) + eps)
    if casting == "llama":
        return unit.to(x.dtype) if weight is None else unit.to(x.dtype) * weight
    if weight is not None:
        unit = unit * factor(weight, unit.dtype, casting)
    return unit.to(x.dtype)


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
    eps: float,
    casting: str,
) -> None:
    """Reject arguments outside the contract."""
    check_norm(x, normalized_shape, (weight,), probe)
    if casting != OFFSET and casting not in CASTINGS:
        raise RuntimeError(f"casting must be one of {(*CASTINGS, OFFSET)}, not {casting!r}")


def dtypes(
    x: Tensor, weight: Tensor | None, probe: Tensor | None, eps: float, casting: str
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of y and of the statistic."""
    statistic = accumulation_dtype(x.dtype)
    if casting == "llama" and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype), statistic
    return x.dtype, statistic


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype of arithmetic, contiguous; no copy where it is so already."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def factor(weight: Tensor, dtype: torch.dtype, casting: str) -> Tensor:
    """What the normalised value is multiplied by, in the dtype of arithmetic."""
    wide = weight if weight.dtype == dtype else weight.to(dtype)
    return 1 + wide if casting == OFFSET else wide


def eager_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    check(x, normalized_shape, weight, probe, eps, casting)
    value = widened(x, accumulation_dtype(x.dtype))
    dims = list(range(-len(normalized_shape), 0))
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
        work.mul_(factor(weight, work.dtype, casting))
    return (work if work.dtype == x.dtype else work.to(x.dtype)), rstd


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
    """dx, dweight and the (B, 1) norms; results not requested have no elements."""
    dtype, folded = rstd.dtype, fold(x, normalized_shape)
    grad, value = widened(dy, dtype), widened(x, dtype)
    gain = None if weight is None else factor(weight, dtype, casting)
    dx = absent(x)
    if output_mask[0]:
        method = _small_gradient if value.numel() <= SMALL else _large_gradient
        dx = method(grad, value, rstd, gain, folded)
        dx = dx if dx.dtype == x.dtype else dx.to(x.dtype)
        dx = dx if dx.dim() == x.dim() else dx.view(x.shape)
    if not output_mask[1] and not with_norms:
        return dx, absent(x), absent(rstd)
    if casting == "llama" and x.dtype in REDUCED:
        # The weight met the rounded value.
        value, rstd = torch.mul(value, rstd).to(x.dtype), torch.ones_like(rstd)
    each = per_example_sums(grad, value, None, rstd, folded, (weight is not None,))
    norms = torch.linalg.vecdot(each, each) if with_norms else absent(rstd)
    return dx, batch_sum(each, 0, weight, output_mask[1], x), norms


def _small_gradient(
    dy: Tensor, x: Tensor, rstd: Tensor, gain: Tensor | None, folded: Folded
) -> Tensor:
    """dx by definition: few calls, each a pass over the tensor."""
    rows = (folded.examples * folded.rows, folded.width)
    dy, x, rstd = dy.view(rows), x.view(rows), rstd.view(rows[0], 1)
    g = dy if gain is None else torch.mul(dy, gain.reshape(rows[1]))
    unit = torch.mul(x, rstd)
    along = torch.linalg.vecdot(g, unit).unsqueeze(1)
    return torch.addcmul(g, unit, along, value=-1 / max(rows[1], 1)).mul_(rstd)


def _large_gradient(
    dy: Tensor, x: Tensor, rstd: Tensor, gain: Tensor | None, folded: Folded
) -> Tensor:
    """dx by ATen's LayerNorm backward at mean zero, with the row mean of dy * gain put back."""
    rows = (folded.examples * folded.rows, folded.width)
    dy, x, rstd = dy.view(rows), x.view(rows), rstd.view(rows[0], 1)
    gain = None if gain is None else gain.reshape(rows[1])
    zeros = torch.zeros_like(rstd)
    dx: Tensor = torch.ops.aten.native_layer_norm_backward.default(
        dy, x, rows[1:], zeros, rstd, gain, None, [True, False, False]
    )[0]
    level = dy.sum(1) if gain is None else torch.mv(dy, gain)
    return dx.add_(level.view(rstd.shape).mul_(rstd).div_(rows[1]))


NORM = Norm(
    "rms_norm",
    parameters=("weight",),
    statistics=("rstd",),
    options=("str casting",),
    check=check,
    dtypes=dtypes,
    # torch's rule for rms_norm on CUDA, float32; the other castings are of spelled-out modules, whose operations
    # autocast leaves alone. On a CPU it has no rule.
    autocasts=lambda casting: casting == "none",
    forward=eager_forward,
    backward=eager_backward,
)
OPERATOR = NormOperator(NORM)

"""LayerNorm whose backward can also return per-example squared gradient norms.

The statistic leaves backward as a gradient, so it composes with whatever autograd composes with (Gray
et al. 2024, arXiv 2411.00999, compute the same numbers with a mutated buffer). Without a probe the
operator's arithmetic is ATen's, forward and backward, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import REDUCED, absent, accumulation_dtype
from trainc.kernels.norm.norm_operator import Norm, NormOperator
from trainc.kernels.norm.rows import batch_sum, check_norm, fold, per_example_sums

__all__ = ["layer_norm"]

_native_backward = torch.ops.aten.native_layer_norm_backward.default


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize `x` over its last dims: (x - mean) / sqrt(variance + eps) * weight + bias.

    `x` is (B, ..., *normalized_shape), floating; an example is dim 0. `normalized_shape` has one dim at least. `weight`
    and `bias` have that shape, or are None for a factor of one and nothing added; they have x's dtype, or both float32
    beside 16-bit x. `eps` keeps the root of the biased variance from zero.

    `probe` is None, or zeros (B, 2) in float32 (float64 for float64 x) that require grad. It is not read: its gradient
    is, per example, the squared norm of its contribution to weight.grad (column 0) and bias.grad (column 1), in the
    units of those gradients, nothing being multiplied by B, and zero for a parameter that is None. Like any gradient it
    accumulates: take a new probe for each backward pass. Without one this is F.layer_norm.

    Returns a tensor of x's shape and dtype (float32 under CUDA's autocast). Raises RuntimeError for other shapes and
    dtypes. With a probe, second derivatives raise RuntimeError and forward-mode ones NotImplementedError.

    Source: Ba et al. 2016, arXiv:1607.06450; the norms: Gray et al. 2024, arXiv:2411.00999.
    """
    if probe is None:  # ATen's arithmetic, without an operator's dispatch
        try:
            return functional.layer_norm(x, list(normalized_shape), weight, bias, eps)
        except RuntimeError:
            check(x, normalized_shape, weight, bias, None, eps)  # names what is wrong
            raise
    y: Tensor = OPERATOR.forward_op(x, list(normalized_shape), weight, bias, probe, eps)[0]
    return y


def reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    eps: float,
) -> dict[str, Tensor]:
    """y, dx, dweight, dbias and the (B, 2) norms by definition, in the dtype of x."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    centred = x - x.mean(dims, keepdim=True)
    rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    unit = centred * rstd
    y = unit if weight is None else unit * weight
    y = y if bias is None else y + bias
    g = dy if weight is None else dy * weight
    dx = rstd * (g - g.mean(dims, keepdim=True) - unit * (g * unit).mean(dims, keepdim=True))
    rows = tuple(range(1, dims[0]))
    each = [part.sum(rows) if rows else part for part in (dy * unit, dy)]
    given = (weight is not None, bias is not None)
    norms = [
        part.square().flatten(1).sum(1) * present for part, present in zip(each, given, strict=True)
    ]
    return {
        "y": y,
        "dx": dx,
        "dweight": each[0].sum(0),
        "dbias": each[1].sum(0),
        "norms": torch.stack(norms, 1),
    }


def check(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> None:
    """Reject arguments outside the contract."""
    check_norm(x, normalized_shape, (weight, bias), probe)


def dtypes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, probe: Tensor | None, eps: float
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of y and of ATen's statistics: on a CPU x's own unless a parameter is wider; a probe widens."""
    wide = any(p is not None and p.dtype != x.dtype for p in (weight, bias))
    if x.device.type == "cpu" and x.dtype in REDUCED and probe is None and not wide:
        return x.dtype, x.dtype
    return x.dtype, accumulation_dtype(x.dtype)


def _widened(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Affine tensors in float32 beside 16-bit x: ATen then keeps float32 statistics, same y."""
    if x.dtype not in REDUCED:
        return weight, bias
    wide = (
        torch.ones(list(normalized_shape), dtype=torch.float32, device=x.device)
        if weight is None
        else weight.float()
    )
    return wide, None if bias is None else bias.float()


def eager_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / root of every row."""
    check_norm(x, normalized_shape, (weight, bias), probe)
    if probe is not None:
        weight, bias = _widened(x, normalized_shape, weight, bias)
    return torch.native_layer_norm(x, normalized_shape, weight, bias, eps)


def eager_backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
    with_norms: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the (B, 2) norms; results not requested have no elements."""
    if not with_norms:
        found = _native_backward(dy, x, normalized_shape, mean, rstd, weight, bias, output_mask)
        dx, dweight, dbias = (absent(x) if part is None else part for part in found)
        return dx, dweight, dbias, absent(rstd)
    dy, x = dy.contiguous(), x.contiguous()
    wide_weight, wide_bias = _widened(x, normalized_shape, weight, bias)
    dx = absent(x)
    if output_mask[0]:
        dx = _native_backward(
            dy, x, normalized_shape, mean, rstd, wide_weight, wide_bias, [True, False, False]
        )[0]
    given = (weight is not None, bias is not None)
    each = per_example_sums(dy, x, mean, rstd, fold(x, normalized_shape), given)
    norms = torch.linalg.vecdot(each, each)
    return (
        dx,
        batch_sum(each, 0, weight, output_mask[1], x),
        batch_sum(each, 1, bias, output_mask[2], x),
        norms,
    )


NORM = Norm(
    "layer_norm",
    parameters=("weight", "bias"),
    statistics=("mean", "rstd"),
    options=(),
    check=check,
    dtypes=dtypes,
    # torch.autocast's own rule: float32 on CUDA; on a CPU none, where ATen takes mixed precision.
    autocasts=lambda: True,
    forward=eager_forward,
    backward=eager_backward,
    native_backward=torch.ops.aten.native_layer_norm_backward,
)
OPERATOR = NormOperator(NORM)

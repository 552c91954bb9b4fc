"""Residual add and RMSNorm in one operator: the sum, and the sum normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import compiler_fuses
from trainc.kernels.norm import rms_norm
from trainc.kernels.norm.norm_operator import NormOperator, check_pair

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
    # Nothing to gain from an operator on a CPU, nor where a compiler fuses the sum with the norm.
    if probe is None and (x.device.type == "cpu" or compiler_fuses(x)):
        check_pair(x, residual)
        summed = x + residual
        return summed, rms_norm.rms_norm(summed, normalized_shape, weight, None, eps, casting)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    eps = rms_norm.default_eps(dtype) if eps is None else eps
    total, y, *_ = OPERATOR.forward_op(
        x, residual, list(normalized_shape), weight, probe, eps, casting
    )
    return total, y


OPERATOR = NormOperator(rms_norm.NORM, residual=True)

"""Residual add and LayerNorm in one operator: the sum, and the sum normalised.

Results are those of `layer_norm(x + residual, ..)`, on CPU bit for bit. Under CUDA's autocast the sum keeps
its dtype and the norm of it is float32, as torch's composition has it; on a CPU autocast leaves both
alone, as it leaves torch's.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from trainc.kernels.library.contracts import compiler_fuses
from trainc.kernels.norm import layer_norm
from trainc.kernels.norm.norm_operator import NormOperator, check_pair

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
    # Nothing to gain from an operator on a CPU, nor where a compiler fuses the sum with the norm.
    if probe is None and (x.device.type == "cpu" or compiler_fuses(x)):
        check_pair(x, residual)
        summed = x + residual
        return summed, layer_norm.layer_norm(summed, normalized_shape, weight, bias, None, eps)
    total, y, *_ = OPERATOR.forward_op(
        x, residual, list(normalized_shape), weight, bias, probe, eps
    )
    return total, y


def reference(x: Tensor, residual: Tensor, norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(total, y) by definition, `norm` being a differentiable norm of one tensor."""
    total = x + residual
    return total, norm(total)


OPERATOR = NormOperator(layer_norm.NORM, residual=True)

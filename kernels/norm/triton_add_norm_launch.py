"""Launch the Triton norm kernels on a residual sum; imported by the first CUDA call."""

from collections.abc import Sequence

from torch import Tensor

from trainc.kernels.library.contracts import absent, check_norm
from trainc.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from trainc.kernels.norm.triton_norm_launch import backward, finished, forward, roundings, supported


def layer_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::add_layer_norm."""
    total = add_layer_norm.fake_total(x, residual)
    check_norm(total, normalized_shape, weight, bias, probe, layer_norm.COLUMNS)
    if not supported(total):
        return add_layer_norm.eager_forward(x, residual, normalized_shape, weight, bias, probe, eps)
    y, mean, rstd = forward(
        x, normalized_shape, weight, bias, eps, total.dtype, rms=False,
        residual=residual, total=total,
    )  # fmt: skip
    return total, y, mean, rstd


def layer_backward(
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
    """The CUDA kernel of trainc::add_layer_norm_backward."""
    if not supported(total):
        return add_layer_norm.eager_backward(
            dtotal, dy, total, normalized_shape, mean, rstd, weight, bias, output_mask, with_norms
        )
    dx, dweight, dbias, norms = backward(
        dy, total, normalized_shape, mean, rstd, weight, bias is not None, output_mask[0],
        rms=False, dtotal=dtotal,
    )  # fmt: skip
    return (
        dx,
        finished(dweight, weight, output_mask[1], total),
        finished(dbias, bias, output_mask[2], total),
        norms if with_norms else absent(rstd),
    )


def rms_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    probe: Tensor | None,
    eps: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::add_rms_norm."""
    total = add_layer_norm.fake_total(x, residual)
    rms_norm.check(total, normalized_shape, weight, probe, casting)
    if not supported(total):
        return add_rms_norm.eager_forward(
            x, residual, normalized_shape, weight, probe, eps, casting
        )
    dtype = rms_norm.result_dtype(total, weight, casting)
    y, _, rstd = forward(
        x, normalized_shape, weight, None, eps, dtype, rms=True, **roundings(casting),
        residual=residual, total=total,
    )  # fmt: skip
    return total, y, rstd


def rms_backward(
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
    """The CUDA kernel of trainc::add_rms_norm_backward."""
    if not supported(total):
        return add_rms_norm.eager_backward(
            dtotal, dy, total, normalized_shape, rstd, weight, casting, output_mask, with_norms
        )
    dx, dweight, _, norms = backward(
        dy, total, normalized_shape, rstd, rstd, weight, False, output_mask[0],
        rms=True, **roundings(casting), dtotal=dtotal,
    )  # fmt: skip
    kept = norms if with_norms else absent(rstd)
    return dx, finished(dweight, weight, output_mask[1], total), kept

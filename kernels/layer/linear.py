"""Linear layer whose backward also returns per-example squared gradient norms; `linear_norms` says how."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer.linear_norms import ALGORITHMS, norms_and_gradient
from trainc.kernels.library.contracts import (
    absent,
    accumulation_dtype,
    autocast,
    check_bias,
    check_probe,
    lazy,
    require,
)
from trainc.kernels.library.register import register

__all__ = ["linear"]

# From x (B, T, K), dy (B, T, L), an algorithm and the weight's dtype: its gradient or None, and norms.
Norms = Callable[[Tensor, Tensor, str, torch.dtype], tuple[Tensor | None, Tensor]]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """Compute x @ weight.T + bias.

    `x` is (B, ..., K), `weight` (L, K) and `bias` (L,) or None, of one floating dtype; an example is dim 0 of x.
    `probe` is None, or zeros (B, 2), (B, 1) without bias, in float32 (float64 for float64 x) that require grad. It is
    not read: its gradient is, per example, the squared norm of its contribution to weight.grad (column 0) and bias.grad
    (column 1), in the units of those gradients. Like any gradient it accumulates: take a new probe for each backward
    pass. `algorithm` says how the norms of the weight are made: from every example's gradient ("simultaneous"), from
    products of rows with rows ("gram"), or by what is cheaper for the shapes ("auto"); the numbers are the same.

    Returns (B, ..., L) in x's dtype, under autocast in its 16-bit one (float64 stays). Without a probe this is
    F.linear. Raises RuntimeError for other shapes, dtypes and algorithms. With a probe, second derivatives raise
    RuntimeError and forward-mode ones NotImplementedError.

    Source of the norms: Goodfellow 2015, arXiv:1510.01799 (one row an example); Gray et al. 2024, arXiv:2411.00999.
    """
    check_algorithm(algorithm)
    if probe is None:
        return functional.linear(x, weight, bias)
    cast = autocast(x, weight, bias)
    y: Tensor = torch.ops.trainc.linear(*cast, probe, algorithm)
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """dweight, dbias and the norms by definition, one example at a time, in the dtype of x."""
    norms, gain, shift = [], torch.zeros_like(weight), dy.new_zeros(dy.shape[-1])
    for example in range(x.shape[0]):
        one, grad = x[example].reshape(-1, x.shape[-1]), dy[example].reshape(-1, dy.shape[-1])
        each, total = grad.T @ one, grad.sum(0)
        norms.append(torch.stack([each.square().sum(), total.square().sum()]))
        gain, shift = gain + each, shift + total
    columns = 1 if bias is None else 2
    stacked = torch.stack(norms)[:, :columns] if norms else x.new_zeros(0, columns)
    return {"dweight": gain, "dbias": shift, "norms": stacked}


def check_algorithm(algorithm: str) -> None:
    """Reject an algorithm of another name."""
    if algorithm not in ALGORITHMS:
        raise RuntimeError(f"algorithm must be one of {ALGORITHMS}, not {algorithm!r}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> None:
    check_algorithm(algorithm)
    require(
        x.dim() >= 2 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"x must be (B, ..., K) and weight (L, K), not {tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    check_bias(bias, weight)
    require(
        x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype),
        lambda: (
            f"weight and bias must have the dtype of x, {x.dtype}, "
            f"not {[t.dtype for t in (weight, bias) if t is not None]}"
        ),
    )
    check_probe(probe, x.shape[0], 1 if bias is None else 2, x)


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> Tensor:
    _check(x, weight, bias, probe, algorithm)
    return functional.linear(x, weight, bias).contiguous()


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, algorithm: str
) -> Tensor:
    _check(x, weight, bias, probe, algorithm)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def backward(
    norms_of: Norms, dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias and the norms; results not requested have no elements."""
    rows = math.prod(x.shape[1:-1])
    one, grad = (t.reshape(t.shape[0], rows, t.shape[-1]) for t in (x, dy))
    dx, dbias = absent(x), absent(x)
    flat = grad.flatten(0, 1)
    if mask[0]:
        dx = torch.mm(flat, weight).view(x.shape)
    columns: list[Tensor] = []
    dweight: Tensor | None = None
    if with_norms:
        dweight, norms = norms_of(one, grad, algorithm, weight.dtype)
        columns.append(norms)
    if not mask[1]:
        dweight = absent(x)
    elif dweight is None:
        dweight = torch.mm(flat.t(), one.flatten(0, 1))
    if has_bias and (with_norms or mask[2]):
        each = grad.sum(1, dtype=accumulation_dtype(x.dtype))
        columns.append(torch.linalg.vecdot(each, each))
        dbias = each.sum(0).to(weight.dtype) if mask[2] else dbias
    return dx, dweight, dbias, torch.stack(columns, 1) if with_norms else absent(x)


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same on any device, by ATen's calls."""
    return backward(norms_and_gradient, dy, x, weight, has_bias, algorithm, mask, with_norms)


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool, algorithm: str,
    mask: Sequence[bool], with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if mask[0] else absent(x)
    dweight = weight.new_empty(weight.shape) if mask[1] else absent(x)
    dbias = weight.new_empty(weight.shape[:1]) if has_bias and mask[2] else absent(x)
    shape = (x.shape[0], 2 if has_bias else 1)
    norms = x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) if with_norms else absent(x)
    return dx, dweight, dbias, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, algorithm = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.algorithm = bias is not None, algorithm


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    found = torch.ops.trainc.linear_backward(
        dy, x, weight, ctx.has_bias, ctx.algorithm, list(wants[:3]), wants[3]
    )
    return *(g if wanted else None for g, wanted in zip(found, wants, strict=False)), None


register(
    "linear",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "linear_backward",
    cpu=eager_backward,
    cuda=lazy("layer.triton_linear_launch", "linear_backward"),
    fake=fake_backward,
)

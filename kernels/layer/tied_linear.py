"""The output head of a tied weight; `tied_embedding` says how the norms of both are made."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import linear  # noqa: F401  its backward operator is a part of ours
from trainc.kernels.layer.embedding import check_ids
from trainc.kernels.library.contracts import (
    absent,
    accumulation_dtype,
    autocast,
    check_bias,
    check_probe,
    require,
)
from trainc.kernels.library.register import register

__all__ = ["tied_linear"]

# Numbers of gathered dlogits held at once: within a cache, or what keeps a device busy.
HELD_CPU = 1 << 19
HELD_DEVICE = 1 << 26


def tied_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    rows: Tensor,
    ids: Tensor,
) -> Tensor:
    """Compute x @ weight.T + bias with the weight of `tied_embedding`.

    `x` is (B, ..., D), `weight` (V, D) and `bias` (V,) or None, of one floating dtype; an example is dim 0, as in the
    embedding. `rows`, (*ids.shape, D), and `ids` are what tied_embedding returned and what it looked up. `probe` is
    None, or zeros (B, 2), (B, 1) without bias, in float32 (float64 for float64 x) that require grad. It is not read:
    column 0 of its gradient is, per example, the squared norm of what the head alone contributes to the shared
    weight.grad, to which the embedding's probe has the rest; column 1 that of its contribution to bias.grad; in the
    units of those gradients. Take a new probe for each backward pass.

    Returns (B, ..., V) in x's dtype, under autocast in its 16-bit one (float64 stays). Without a probe this is
    F.linear. Raises ValueError without a probe where the embedding had one, whose norms would lack what the two share,
    and RuntimeError for other shapes and dtypes. With a probe, second derivatives raise RuntimeError and forward-mode
    ones NotImplementedError.
    """
    if probe is None:
        if rows.requires_grad:
            raise ValueError(
                "tied_embedding had a probe, but tied_linear has none, so the norms would lack the "
                "cross term of the two: give a probe to each, or to neither"
            )
        return functional.linear(x, weight, bias)
    cast = autocast(x, weight, bias)
    y: Tensor = torch.ops.trainc.tied_linear(*cast, probe, rows, ids)
    return y


def reference(
    weight: Tensor, ids: Tensor, padding_idx: int | None, dy: Tensor, x: Tensor, dlogits: Tensor
) -> Tensor:
    """(B,) squared norms by definition, one example at a time, in the dtype of weight."""
    norms = []
    for example in range(ids.shape[0]):
        each = torch.zeros_like(weight)
        each.index_add_(0, ids[example].flatten(), dy[example].reshape(-1, dy.shape[-1]))
        if padding_idx is not None:
            each[padding_idx] = 0
        logits, inputs = dlogits[example].flatten(0, -2), x[example].flatten(0, -2)
        norms.append((each + logits.T @ inputs).square().sum())
    return torch.stack(norms)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> None:
    check_ids(weight, ids)
    require(
        x.dim() >= 2 and x.shape[-1] == weight.shape[1] and x.shape[0] == ids.shape[0],
        lambda: (
            f"x must be (B, ..., D) for a weight (V, D) and ids (B, ...), not {tuple(x.shape)} "
            f"for {tuple(weight.shape)} and {tuple(ids.shape)}"
        ),
    )
    check_bias(bias, weight)
    require(
        tuple(rows.shape) == (*ids.shape, weight.shape[1]),
        lambda: (
            f"rows must be the second result of tied_embedding for these ids, of the shape "
            f"{(*ids.shape, weight.shape[1])}, not {tuple(rows.shape)}"
        ),
    )
    check_probe(probe, x.shape[0], 1 if bias is None else 2, x)


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> Tensor:
    _check(x, weight, bias, probe, rows, ids)
    return functional.linear(x, weight, bias).contiguous()


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> Tensor:
    _check(x, weight, bias, probe, rows, ids)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ids: Tensor, has_bias: bool,
    mask: Sequence[bool], with_norms: bool, with_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, the norms and drows; results not requested have no elements."""
    found = torch.ops.trainc.linear_backward(dy, x, weight, has_bias, "auto", mask, with_norms)
    return *found, _rows_of_head(dy, x, ids) if with_rows else absent(x)


def _rows_of_head(dy: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """(*ids.shape, D) rows of every example's gradient of the head, for the ids it holds."""
    examples, positions = x.shape[0], math.prod(x.shape[1:-1])
    dtype, count = accumulation_dtype(x.dtype), math.prod(ids.shape[1:])
    one, grad = (t.reshape(examples, positions, t.shape[-1]) for t in (x, dy))
    wanted = ids.long().reshape(examples, 1, count)
    drows = x.new_empty((examples, count, x.shape[-1]), dtype=dtype)
    held = HELD_CPU if x.device.type == "cpu" else HELD_DEVICE
    step = max(1, held // max(1, positions * count))
    for start in range(0, examples, step):
        here = slice(start, start + step)
        index = wanted[here].expand(-1, positions, -1)
        picked = grad[here].gather(2, index).to(dtype)
        torch.bmm(picked.mT, one[here].to(dtype), out=drows[here])
    return drows.view(*ids.shape, x.shape[-1])


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ids: Tensor, has_bias: bool,
    mask: Sequence[bool], with_norms: bool, with_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = torch.ops.trainc.linear_backward(dy, x, weight, has_bias, "auto", mask, with_norms)
    shape, dtype = (*ids.shape, x.shape[-1]), accumulation_dtype(x.dtype)
    return *found, x.new_empty(shape, dtype=dtype) if with_rows else absent(x)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, _, ids = inputs
    ctx.save_for_backward(x, weight, ids)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    found = torch.ops.trainc.tied_linear_backward(
        dy, *ctx.saved_tensors, ctx.has_bias, list(wants[:3]), wants[3], wants[4]
    )
    return *(g if wanted else None for g, wanted in zip(found, wants, strict=False)), None


register(
    "tied_linear",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "tied_linear_backward",
    cpu=eager_backward,
    cuda=eager_backward,
    fake=fake_backward,
)

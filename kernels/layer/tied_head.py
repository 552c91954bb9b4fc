"""The head of a tied weight: trainc::tied_linear and its backward. `tied` has the contract."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import linear  # noqa: F401  its backward operator is a part of ours
from trainc.kernels.layer.tied_rows import check_ids, check_probe
from trainc.kernels.library.contracts import absent, accumulation_dtype, require
from trainc.kernels.library.register import register

# Numbers of gathered dlogits held at once: within a cache, or what keeps a device busy.
HELD_CPU = 1 << 19
HELD_DEVICE = 1 << 26


def _check_head(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> None:
    check_ids(weight, ids)
    require(
        x.dim() >= 2 and x.shape[-1] == weight.shape[1] and x.shape[0] == ids.shape[0],
        lambda: (
            f"x {tuple(x.shape)} is not (B, ..., D) for a weight {tuple(weight.shape)} "
            f"and ids {tuple(ids.shape)}"
        ),
    )
    require(
        bias is None or tuple(bias.shape) == tuple(weight.shape[:1]),
        lambda: f"bias must have the shape {tuple(weight.shape[:1])}",
    )
    require(
        tuple(rows.shape) == (*ids.shape, weight.shape[1]),
        lambda: (
            f"rows must be what tied_embedding made for ids {tuple(ids.shape)}, "
            f"{(*ids.shape, weight.shape[1])}, not {tuple(rows.shape)}"
        ),
    )
    check_probe(probe, x.shape[0], 1 if bias is None else 2, x)


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> Tensor:
    _check_head(x, weight, bias, probe, rows, ids)
    return functional.linear(x, weight, bias).contiguous()


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, rows: Tensor, ids: Tensor
) -> Tensor:
    _check_head(x, weight, bias, probe, rows, ids)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ids: Tensor, has_bias: bool,
    mask: Sequence[bool], with_norms: bool, with_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, the norms and drows; results not asked for have no elements."""
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

"""The embedding of a tied weight: trainc::tied_embedding and its backward. `tied` has the contract."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import embedding  # noqa: F401  its backward operator is a part of ours
from trainc.kernels.library.contracts import absent, accumulation_dtype, require
from trainc.kernels.library.register import register


def zeros(weight: Tensor, ids: Tensor) -> Tensor:
    """One zero seen as (B, ..., D), in the dtype sums are carried in."""
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_zeros((1,), dtype=dtype).expand(*ids.shape, weight.shape[1])


def check_probe(probe: Tensor | None, examples: int, columns: int, like: Tensor) -> None:
    expected = accumulation_dtype(like.dtype)
    require(
        probe is None or (tuple(probe.shape) == (examples, columns) and probe.dtype == expected),
        lambda: (
            f"probe must be ({examples}, {columns}) {expected}, "
            f"not {tuple(probe.shape)} {probe.dtype}"  # type: ignore[union-attr]
        ),
    )


def check_ids(weight: Tensor, ids: Tensor) -> None:
    require(
        ids.dim() >= 1 and weight.dim() == 2 and ids.dtype in (torch.int32, torch.int64),
        lambda: (
            f"ids are (B, ..) int32 or int64 and weight (V, D), not {tuple(ids.shape)} "
            f"{ids.dtype} and {tuple(weight.shape)}"
        ),
    )


def _check_embedding(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> None:
    check_ids(weight, ids)
    require(
        padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0],
        lambda: f"padding_idx {padding_idx} is not a row of {tuple(weight.shape)}",
    )
    check_probe(probe, ids.shape[0], 1, weight)


def eager_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_embedding(weight, ids, padding_idx, probe)
    return functional.embedding(ids, weight), zeros(weight, ids)


def fake_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_embedding(weight, ids, padding_idx, probe)
    return weight.new_empty((*ids.shape, weight.shape[1])), zeros(weight, ids)


def eager_backward(
    dy: Tensor, drows: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dweight (rows, D) and the (B, 1) norms; results not asked for have no elements."""
    dweight, norms = torch.ops.trainc.embedding_backward(dy, ids, rows, padding_idx, mask)
    if mask[1] and ids.numel():
        shared = torch.linalg.vecdot(dy.to(drows.dtype), drows)
        norms = norms.flatten() + 2 * shared.where(ids != padding_idx, 0).view(
            ids.shape[0], -1
        ).sum(1)
        norms = norms.unsqueeze(1)
    return dweight, norms


def fake_backward(
    dy: Tensor, drows: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dweight = dy.new_empty((rows, dy.shape[-1])) if mask[0] else absent(dy)
    shape = (ids.shape[0], 1)
    norms = dy.new_empty(shape, dtype=accumulation_dtype(dy.dtype)) if mask[1] else absent(dy)
    return dweight, norms


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight, ids, padding_idx, _ = inputs
    ctx.save_for_backward(ids)
    count = weight.shape[0]
    ctx.place = (count, -1 if padding_idx is None else padding_idx % count)


def _backward(ctx, dy, drows):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    dweight, norms = torch.ops.trainc.tied_embedding_backward(dy, drows, ids, *ctx.place, mask)
    return dweight if mask[0] else None, None, None, norms if mask[1] else None


register(
    "tied_embedding",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "tied_embedding_backward",
    cpu=eager_backward,
    cuda=eager_backward,
    fake=fake_backward,
)

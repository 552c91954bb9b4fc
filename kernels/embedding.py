"""Embedding whose backward also returns per-example squared gradient norms.

Contract. `ids` is (B, ...) int32 or int64, `weight` (V, D) floating; `padding_idx` is a row (negative
counts from the end) that gets no gradient; `probe` is (B, 1) zeros in float32 (float64 for float64
weights). An example is dim 0 of ids. The gradient of `probe` is, per example, the squared norm of
its contribution to weight.grad, in the units of that gradient: rows of an id the example repeats
are added before they are squared, and padding adds nothing. Without a probe this is F.embedding.

weight.grad is dense and ATen's own. The norms sort B * T keys (example, id) and add runs of equal
ones, so memory is that of dy whatever V is; on CUDA nothing waits for the device.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.support import absent, accumulation_dtype, require


def embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, probe: Tensor | None = None
) -> Tensor:
    """Rows of weight for ids, (B, ..., D); see the module for `probe`."""
    if probe is None:
        return functional.embedding(ids, weight, padding_idx)
    y: Tensor = torch.ops.trainc.embedding(weight, ids, padding_idx, probe)
    return y


def reference(
    ids: Tensor, weight: Tensor, dy: Tensor, padding_idx: int | None = None
) -> dict[str, Tensor]:
    """dweight and the (B, 1) norms by definition, one example at a time, in the dtype of dy."""
    norms, total = [], torch.zeros_like(weight)
    for example in range(ids.shape[0]):
        each = torch.zeros_like(weight)
        each.index_add_(0, ids[example].flatten(), dy[example].reshape(-1, dy.shape[-1]))
        if padding_idx is not None:
            each[padding_idx] = 0
        norms.append(each.square().sum())
        total += each
    return {"dweight": total, "norms": torch.stack(norms).unsqueeze(1)}


def _check(weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None) -> None:
    require(
        ids.dim() >= 1 and weight.dim() == 2 and ids.dtype in (torch.int32, torch.int64),
        lambda: (
            f"ids are (B, ..) int32 or int64 and weight (V, D), not {tuple(ids.shape)} "
            f"{ids.dtype} and {tuple(weight.shape)}"
        ),
    )
    require(
        padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0],
        lambda: f"padding_idx {padding_idx} is not a row of {tuple(weight.shape)}",
    )
    if probe is None:
        return
    expected = accumulation_dtype(weight.dtype)
    require(
        probe.dim() == 2
        and probe.shape[0] == ids.shape[0]
        and probe.shape[1] == 1
        and probe.dtype == expected,
        lambda: (
            f"probe must be ({ids.shape[0]}, 1) {expected}, not {tuple(probe.shape)} {probe.dtype}"
        ),
    )


@torch.library.custom_op("trainc::embedding", mutates_args=())
def _forward(weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None) -> Tensor:
    _check(weight, ids, padding_idx, probe)
    return functional.embedding(ids, weight)


@_forward.register_fake
def _(weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None) -> Tensor:
    _check(weight, ids, padding_idx, probe)
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.custom_op("trainc::embedding_backward", mutates_args=())
def _backward(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """dweight (rows, D) and the (B, 1) norms; results not asked for have no elements."""
    dweight = norms = absent(dy)
    if mask[0]:
        dweight = torch.ops.aten.embedding_dense_backward(dy, ids, rows, padding_idx, False)
    if mask[1]:
        norms = _norms(dy, ids, rows, padding_idx)
    return dweight, norms


def _norms(dy: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The (B, 1) squared norms: keys (example, id) sorted, runs added, squared, added."""
    dtype, examples, width = accumulation_dtype(dy.dtype), ids.shape[0], dy.shape[-1]
    norms = dy.new_zeros((examples, 1), dtype=dtype)
    if ids.numel() == 0:
        return norms
    count = ids.numel()
    example = torch.arange(examples, device=ids.device).view(-1, 1)
    keys = (ids.long().view(examples, -1) + rows * example).view(-1)
    keys, order = keys.sort()
    run = torch.zeros_like(keys)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=run[1:])
    sums = dy.new_zeros((count, width), dtype=dtype)
    sums.index_add_(0, run, dy.reshape(count, width).index_select(0, order).to(dtype))
    # A run's square counts once, at its first key.
    first = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=first[1:])
    squares = torch.linalg.vecdot(sums, sums).index_select(0, run)
    counted = first & (keys % rows != padding_idx)
    return norms.view(-1).index_add_(0, keys // rows, squares.where(counted, 0)).view(-1, 1)


@_backward.register_fake
def _(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    dweight = dy.new_empty((rows, dy.shape[-1])) if mask[0] else absent(dy)
    shape = (ids.shape[0], 1)
    norms = dy.new_empty(shape, dtype=accumulation_dtype(dy.dtype)) if mask[1] else absent(dy)
    return dweight, norms


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight, ids, padding_idx, _ = inputs
    ctx.save_for_backward(ids)
    rows = weight.shape[0]
    ctx.place = (rows, -1 if padding_idx is None else padding_idx % rows)


def _differentiate(ctx, dy):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    wants = ctx.needs_input_grad
    mask = [wants[0], wants[3]]
    dweight, norms = torch.ops.trainc.embedding_backward(dy, ids, *ctx.place, mask)
    return dweight if mask[0] else None, None, None, norms if mask[1] else None


_forward.register_autograd(_differentiate, setup_context=_save)

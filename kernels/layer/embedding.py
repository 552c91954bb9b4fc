"""Embedding whose backward also returns per-example squared gradient norms.

weight.grad is dense and ATen's own. The norms sort the ids of each example and add the rows of equal
ones, so memory is at most that of dy whatever V is. Every sum has a fixed order, on CUDA as well,
where nothing waits for the device except in float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import absent, accumulation_dtype, check_probe, lazy, require
from trainc.kernels.library.register import register

__all__ = ["embedding"]

# From dy, ids and padding_idx: the (B, 1) norms.
Norms = Callable[[Tensor, Tensor, int], Tensor]


def embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, probe: Tensor | None = None
) -> Tensor:
    """Look up the rows of `weight` for `ids`.

    `ids` is (B, ...) int32 or int64 in [0, V), an example being dim 0; `weight` is (V, D), floating. `padding_idx` is a
    row (negative counts from the end) that gets no gradient, or None. `probe` is None, or zeros (B, 1) in float32
    (float64 for float64 weights) that require grad. It is not read: its gradient is, per example, the squared norm of
    its contribution to weight.grad, in the units of that gradient: rows of an id that the example repeats are added
    before they are squared, and padding adds nothing. Like any gradient it accumulates: take a new probe for each
    backward pass.

    Returns (B, ..., D) in weight's dtype. Without a probe this is F.embedding. Raises RuntimeError for other shapes and
    dtypes and for a `padding_idx` that is no row (AssertionError, F.embedding's, without a probe), and IndexError for
    ids outside of weight; CUDA fails with a device assertion on those. With a probe, second derivatives raise
    RuntimeError and forward-mode ones NotImplementedError.

    Source of the norms: Gray et al. 2024, arXiv:2411.00999.
    """
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


def check(weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None) -> None:
    """Reject arguments outside the contract."""
    check_ids(weight, ids)
    require(
        padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0],
        lambda: f"padding_idx must be a row of weight {tuple(weight.shape)}, not {padding_idx}",
    )
    check_probe(probe, ids.shape[0], 1, weight)


def check_ids(weight: Tensor, ids: Tensor) -> None:
    """Reject ids that are not integers of examples, and a weight that is not a table."""
    require(
        ids.dim() >= 1 and weight.dim() == 2 and ids.dtype in (torch.int32, torch.int64),
        lambda: (
            f"ids must be (B, ...) int32 or int64 and weight (V, D), not {tuple(ids.shape)} "
            f"{ids.dtype} and {tuple(weight.shape)}"
        ),
    )


def eager_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> Tensor:
    check(weight, ids, padding_idx, probe)
    return functional.embedding(ids, weight)


def fake_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> Tensor:
    check(weight, ids, padding_idx, probe)
    return weight.new_empty((*ids.shape, weight.shape[1]))


def backward(
    norms_of: Norms, dy: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dweight (rows, D) and the (B, 1) norms; results not requested have no elements."""
    norms = norms_of(dy, ids, padding_idx) if mask[1] else absent(dy)
    if not mask[0]:
        return absent(dy), norms
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, padding_idx, False), norms


def eager_backward(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The same on any device, by ATen's calls."""
    return backward(eager_norms, dy, ids, rows, padding_idx, mask)


def eager_norms(dy: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    """The (B, 1) squared norms: rows of ids that an example repeats are added, then squared."""
    dtype, examples, width = accumulation_dtype(dy.dtype), ids.shape[0], dy.shape[-1]
    if ids.numel() == 0:
        return dy.new_zeros((examples, 1), dtype=dtype)
    rows = dy.reshape(-1, width)
    squares: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square_()
    # Most rows stand alone; only those of ids that their example repeats are gathered.
    chosen, begins = _repeated(ids.reshape(examples, -1))
    if chosen.numel():
        runs = torch.linalg.vector_norm(_run_sums(rows, chosen, begins), dim=1).square_()
        squares.index_fill_(0, chosen, 0).index_copy_(0, chosen[begins], runs)
    if padding_idx >= 0:
        squares.masked_fill_(ids.reshape(-1) == padding_idx, 0)
    return squares.view(examples, -1).sum(1, keepdim=True)


def _repeated(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places of ids (B, T) that their example repeats, equal ones together, and where each run begins."""
    examples, count = ids.shape
    keys, order = ids.sort(dim=1, stable=True)
    same = torch.zeros((examples, count + 1), dtype=torch.bool, device=ids.device)
    torch.eq(keys[:, 1:], keys[:, :-1], out=same[:, 1:-1])  # as the one before
    places = torch.bitwise_or(same[:, 1:], same[:, :-1]).view(-1).nonzero().view(-1)
    begins = same[:, :-1].reshape(-1)[places].logical_not_().nonzero().view(-1)
    return order.reshape(-1)[places].add_(places - places % count), begins


def _run_sums(rows: Tensor, chosen: Tensor, begins: Tensor) -> Tensor:
    """Sums of runs of the chosen rows, each from one of `begins` to the next, not in 16 bits."""
    dtype = accumulation_dtype(rows.dtype)
    if rows.dtype != dtype:
        rows, chosen = rows.index_select(0, chosen).to(dtype), torch.arange(
            chosen.numel(), device=rows.device
        )  # fmt: skip
    sums: Tensor = functional.embedding_bag(chosen, rows, begins, mode="sum")
    return sums


def fake_backward(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dweight = dy.new_empty((rows, dy.shape[-1])) if mask[0] else absent(dy)
    shape = (ids.shape[0], 1)
    norms = dy.new_empty(shape, dtype=accumulation_dtype(dy.dtype)) if mask[1] else absent(dy)
    return dweight, norms


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight, ids, padding_idx, _ = inputs
    ctx.save_for_backward(ids)
    rows = weight.shape[0]
    ctx.place = (rows, -1 if padding_idx is None else padding_idx % rows)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    wants = ctx.needs_input_grad
    mask = [wants[0], wants[3]]
    dweight, norms = torch.ops.trainc.embedding_backward(dy, ids, *ctx.place, mask)
    return dweight if mask[0] else None, None, None, norms if mask[1] else None


register(
    "embedding",
    cpu=eager_forward,
    cuda=eager_forward,
    fake=fake_forward,
    setup_context=setup_context,
    backward=_backward,
)
register(
    "embedding_backward",
    cpu=eager_backward,
    cuda=lazy("layer.triton_embedding", "embedding_backward"),
    fake=fake_backward,
)

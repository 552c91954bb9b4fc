"""Per-example squared gradient norms of a weight that is word embedding and output head at once.

An example contributes c = c_emb + c_head to the shared weight.grad, and

  ||c||^2 = ||c_emb||^2 + ||c_head||^2 + 2 <c_emb, c_head>

whose last term neither layer knows alone (two probes that leave it out are wrong by it). c_emb has
rows only for the ids the example holds, so the embedding needs the head's rows for those ids alone. It
receives them as the gradient of `rows`, zeros (B, ..., D) that both functions take:

  drows[b, t] = c_head_b[ids[b, t]] = sum over t' of dlogits[b, t', ids[b, t]] * x[b, t']

The embedding's backward receives dy and drows and adds 2 sum over t of <dy[b, t], drows[b, t]>.

With T ids and T' positions an example, this costs 2 T T' D multiplications and additions an example
beyond the two layers' own, and holds (T', T) numbers of as many examples as fit a cache, at least
one: B T T' numbers at most, never V D an example.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import embedding
from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.library.register import register

__all__ = ["tied_embedding"]


def tied_embedding(
    weight: Tensor, ids: Tensor, padding_idx: int | None = None, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Look up the rows of `weight` for `ids`, where `tied_linear` uses the same weight for the output head.

    `weight` is (V, D), floating; `ids` is (B, ...) int32 or int64 in [0, V), an example being dim 0. `padding_idx` is a
    row (negative counts from the end) that gets no gradient from the embedding, and one from the head as any other row,
    or None. `probe` is None, or zeros (B, 1) in float32 (float64 for float64 weights) that require grad. It is not
    read: its gradient *added to column 0 of the head's probe's* is, per example, the squared norm of its contribution
    to the shared weight.grad, in the units of that gradient. Alone it is what the embedding's part adds to the head's,
    and may be negative. Take a new probe for each backward pass, in which one embedding and one head take part: a head
    that takes its rows from two embeddings, or the other way round, has cross terms between the two that nobody adds.

    Returns (y, rows): y (B, ..., D) in weight's dtype, and zeros (B, ..., D) to give to `tied_linear`. Without a probe
    y is F.embedding's, and the zeros want no gradient. Raises RuntimeError for other shapes and dtypes and for a
    `padding_idx` that is no row (AssertionError, F.embedding's, without a probe), and IndexError for ids outside of
    weight; CUDA fails with a device assertion on those. With a probe, second derivatives raise RuntimeError and
    forward-mode ones NotImplementedError.
    """
    if probe is None:
        return functional.embedding(ids, weight, padding_idx), zeros(weight, ids)
    found: tuple[Tensor, Tensor] = torch.ops.trainc.tied_embedding(weight, ids, padding_idx, probe)
    return found


def zeros(weight: Tensor, ids: Tensor) -> Tensor:
    """Zeros (B, ..., D) in the dtype sums are carried in, which take the memory of one."""
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_zeros((1,), dtype=dtype).expand(*ids.shape, weight.shape[1])


def eager_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    embedding.check(weight, ids, padding_idx, probe)
    return functional.embedding(ids, weight), zeros(weight, ids)


def fake_forward(
    weight: Tensor, ids: Tensor, padding_idx: int | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    embedding.check(weight, ids, padding_idx, probe)
    return weight.new_empty((*ids.shape, weight.shape[1])), zeros(weight, ids)


def eager_backward(
    dy: Tensor, drows: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dweight (rows, D) and the (B, 1) norms; results not requested have no elements."""
    dweight, norms = torch.ops.trainc.embedding_backward(dy, ids, rows, padding_idx, mask)
    if mask[1] and ids.numel():
        shared = torch.linalg.vecdot(dy.to(drows.dtype), drows)
        norms = norms.flatten() + 2 * shared.where(ids != padding_idx, 0).reshape(
            ids.shape[0], -1
        ).sum(1)
        norms = norms.unsqueeze(1)
    return dweight, norms


def fake_backward(
    dy: Tensor, drows: Tensor, ids: Tensor, rows: int, padding_idx: int, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return embedding.fake_backward(dy, ids, rows, padding_idx, mask)


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
    setup_context=embedding.setup_context,
    backward=_backward,
)
register(
    "tied_embedding_backward",
    cpu=eager_backward,
    cuda=eager_backward,
    fake=fake_backward,
)

"""Losses and gradients of rows of logits on the CPU; `triton_cross_entropy_consistency` has both for CUDA."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype

# Elements of a block's buffers, 1 MB in float32. The twenty calls of ATen that a block takes cost as
# much as 20000 elements, so smaller is slower; more leaves the cache and is fresh memory every call.
BLOCK_ELEMENTS = 1 << 18


def blocks(
    rows: Tensor, count: int, buffers: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Sequence[Tensor]]]:
    """Yield rows a cache's worth at a time: their slices in both views, both in the accumulation dtype, and buffers.

    Buffers are the same for every block, since fresh memory costs more than what is written to it.
    """
    dtype, classes = accumulation_dtype(rows.dtype), rows.shape[1]
    size = min(count, max(1, BLOCK_ELEMENTS // max(buffers * classes, 1)))
    scratch = rows.new_empty((buffers, size, classes), dtype=dtype)
    for start in range(0, count, max(size, 1)):
        stop = min(start + size, count)
        here, there = slice(start, stop), slice(count + start, count + stop)
        held = scratch[:, : stop - start].unbind(0)
        yield here, there, rows[here].to(dtype), rows[there].to(dtype), held


def row_losses(
    rows: Tensor,
    labels: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and distances, both 0 where ignored, (n,) each, of logits (2n, C).

    `statistics` stay as they are.
    """
    dtype = accumulation_dtype(rows.dtype)
    count = labels.shape[0]
    kept = labels != ignore_index
    safe = labels.where(kept, 0).unsqueeze(1)
    cross_entropies = rows.new_empty((count,), dtype=dtype)
    distances = torch.empty_like(cross_entropies)
    for here, _, first, second, held in blocks(rows, count, 2 if distance == "mse" else 3):
        log_p = torch.log_softmax(first, 1, out=held[0])
        torch.mul(
            log_p.gather(1, safe[here]).squeeze(1), label_smoothing - 1, out=cross_entropies[here]
        )
        if label_smoothing:
            cross_entropies[here].sub_(log_p.mean(1), alpha=label_smoothing)
        if distance == "mse":
            gap = torch.sub(first, second, out=held[1])
            torch.linalg.vecdot(gap, gap, out=distances[here])
        else:
            log_q = torch.log_softmax(second, 1, out=held[1])
            gap = torch.sub(log_p, log_q, out=held[2])
            torch.linalg.vecdot(log_p.exp_().sub_(log_q.exp_()), gap, out=distances[here])
    if distance == "kl":
        distances.mul_(0.5)
    return cross_entropies.masked_fill_(~kept, 0), distances.masked_fill_(~kept, 0)


def write_gradients(
    rows: Tensor,
    labels: Tensor,
    on_cross_entropy: Tensor,
    on_distance: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of on_cross_entropy * cross_entropies.sum() + on_distance * distances.sum() for (2n, C) rows.

    It is 0 in rows that are ignored. `out` may be `rows` itself: a block is read before it is written.
    """
    dtype, count, classes = accumulation_dtype(rows.dtype), labels.shape[0], rows.shape[1]
    kept = labels != ignore_index
    scale = on_distance.to(dtype)
    each = kept.to(dtype).mul_(on_cross_entropy).unsqueeze_(1)
    safe = labels.where(kept, 0).unsqueeze(1)
    counts = bool(scale != 0)  # else the difference of two -inf, which mask classes, would count
    ignored = not bool(kept.all())
    for here, there, first, second, held in blocks(rows, count, 2 if distance == "mse" else 5):
        if not counts:
            p, pull = torch.softmax(first, 1, out=held[0]), held[1].zero_()
            out[there] = 0
        elif distance == "mse":
            p, pull = torch.softmax(first, 1, out=held[0]), torch.sub(first, second, out=held[1])
            torch.mul(pull.mul_(2 * scale), -1.0, out=out[there])
            if out.dtype != dtype:
                # Opposites after rounding too: the gradient of a bias of the logits is their sum, which must be zero.
                pull.copy_(out[there]).neg_()
        else:
            p, pull, push = _divergence_gradients(first, second, *held)
            pull.mul_(0.5 * scale)
            torch.mul(push, 0.5 * scale, out=out[there])
        if ignored:  # whatever such rows hold
            out[there][~kept[here]] = 0
            p[~kept[here]] = pull[~kept[here]] = 0
        if label_smoothing:
            p.sub_(label_smoothing / classes)
        reward = p.new_full((1, 1), label_smoothing - 1.0).expand(safe[here].shape)
        p.scatter_add_(1, safe[here], reward)
        torch.addcmul(pull, p, each[here], out=out[here])


def means(
    cross_entropies: Tensor, distances: Tensor, labels: Tensor, weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross_entropy, consistency) from the cross-entropies and distances of the rows."""
    kept = (labels != ignore_index).sum()
    cross_entropy, consistency = cross_entropies.sum() / kept, distances.sum() / kept
    loss = torch.add(cross_entropy, consistency * weight.to(cross_entropy.dtype))
    return loss, cross_entropy, consistency


def row_factors(
    cross_entropy_factor: Tensor, consistency_factor: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Each row's factors in the two means over rows that are not ignored."""
    kept = (labels != ignore_index).sum().clamp_(min=1)
    return cross_entropy_factor / kept, consistency_factor / kept


def _divergence_gradients(
    first: Tensor,
    second: Tensor,
    p: Tensor,
    q: Tensor,
    gap: Tensor,
    spare: Tensor,
    difference: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """p, and the gradients of KL(p || q) + KL(q || p) for both logits, in the five buffers.

    With u = log p - log q they are p (u - <p, u>) + p - q and q (<q, u> - u) + q - p.
    """
    torch.log_softmax(first, 1, out=p)
    torch.log_softmax(second, 1, out=q)
    torch.sub(p, q, out=gap)
    torch.neg(gap, out=spare)
    torch.sub(p.exp_(), q.exp_(), out=difference)
    pull = _through_softmax(gap, p, difference)
    return p, pull, _through_softmax(spare, q, difference.neg_())


def _through_softmax(values: Tensor, weights: Tensor, difference: Tensor) -> Tensor:
    """weights * (values - <weights, values>) + difference, whose sum over a row is zero, in `values`.

    A mean far from zero is taken off before `difference`, which would not survive beside it. What rounding
    leaves of the sum is taken off last: where one weight is nearly all it may be all there is.
    """
    values.sub_(torch.linalg.vecdot(weights, values).unsqueeze_(1))
    torch.addcmul(difference, values, weights, out=values)
    return values.addcmul_(weights, values.sum(1, keepdim=True), value=-1)

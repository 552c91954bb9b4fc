"""Cross-entropy and consistency of two views of a batch; one backward pass writes the gradient of both."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainc.kernels.registration import register
from trainc.kernels.support import accumulation_dtype, on_demand, require

DISTANCES = ("mse", "kl")
# What CUDA's backward keeps of a row: largest logit and log sum exp of the rest, for "kl" of both
# views, each with the other view's logit there and the mean of the log ratio counted from there.
STATISTICS = {"mse": 2, "kl": 8}

# Elements of a block's buffers, 1 MB in float32. The twenty calls of ATen that a block takes cost as
# much as 20000 elements, so smaller is slower; more leaves the cache and is fresh memory every call.
BLOCK_ELEMENTS = 1 << 18


def task_consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross-entropy on one view plus a weighted distance between two views of the same batch.

    `logits` is (2B, ..., C), floating, with view one in the first half; `targets` is (B, ...), int64 class indices in
    [0, C) or `ignore_index`; `weight` is 0-d. `distance` is "mse" or "kl"; `label_smoothing`, in [0, 1], is
    F.cross_entropy's. Returns (loss, task, consistency), 0-d in float32 (float64 for float64 logits):

      task          mean cross-entropy of view one over targets that are not `ignore_index`
      consistency   mean over a view's leading dims, ignored targets included, of the distance:
                    "mse"  sum over classes of (l1 - l2)^2, raw logits (PACE, Ni et al. 2024, arXiv:2409.17137, eq. 12)
                    "kl"   (KL(p || q) + KL(q || p)) / 2 of the softmaxes (R-Drop, Liang et al. 2021, arXiv:2106.14448)
      loss          task + weight * consistency

    Each of the three can be differentiated; both views get gradient (nothing is detached), and so does weight. As with
    F.cross_entropy, no target to average over makes task (and loss) nan, and its gradient zero. Classes masked by -inf
    in both views leave task as F.cross_entropy has it and make consistency (and loss) nan.

    Raises RuntimeError for arguments outside of this, for a target outside of [0, C) on a CPU (on CUDA task becomes
    nan, or in float64 a device assertion fails) and for second derivatives, and NotImplementedError for forward-mode
    ones.
    """
    loss, task, consistency, _ = _forward(
        logits, targets, weight, distance, ignore_index, label_smoothing
    )
    return loss, task, consistency


def reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in differentiable PyTorch, in the dtype of the logits."""
    first, second = (half.flatten(0, -2) for half in logits.chunk(2))
    kept = targets.flatten() != ignore_index
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    chosen = log_p.gather(1, targets.flatten().where(kept, 0).unsqueeze(1)).squeeze(1)
    each = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(1)
    task = each.where(kept, 0).sum() / kept.sum()
    if distance == "mse":
        consistency = (first - second).square().sum(1).mean()
    else:
        consistency = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).mean() / 2
    return task + weight * consistency, task, consistency


def check(
    shape: Sequence[int],
    targets: Tensor,
    weight: Tensor,
    distance: str,
    label_smoothing: float,
) -> None:
    """Reject arguments outside the contract, given the shape of two views of rows."""
    require(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"label_smoothing is in [0, 1], not {label_smoothing}",
    )
    require(distance in DISTANCES, lambda: f"distance is one of {DISTANCES}, not {distance!r}")
    require(
        len(shape) >= 2
        and len(shape) == targets.dim() + 1
        and shape[0] == 2 * targets.shape[0]
        and tuple(shape[1:-1]) == tuple(targets.shape[1:]),
        lambda: f"{tuple(shape)} are not two views of targets {tuple(targets.shape)}",
    )
    require(shape[-1] > 0, lambda: f"{tuple(shape)} has no class")
    require(weight.dim() == 0, lambda: "weight is a 0-d tensor")


def blocks(
    rows: Tensor, count: int, buffers: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Sequence[Tensor]]]:
    """A cache's worth of rows at a time: where they are in the two views, both in the accumulation
    dtype, and buffers of their shape.

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


def no_statistics(rows: Tensor, distance: str) -> Tensor:
    """Zeros (n, STATISTICS) for logits (2n, C): a CPU's backward makes all it needs of the logits."""
    shape = (rows.shape[0] // 2, STATISTICS[distance])
    return rows.new_zeros(shape, dtype=accumulation_dtype(rows.dtype))


def row_losses(
    rows: Tensor,
    labels: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies, 0 where ignored, and distances, (n,) each, of logits (2n, C).

    `statistics` stay as they are.
    """
    dtype = accumulation_dtype(rows.dtype)
    count = labels.shape[0]
    kept = labels != ignore_index
    safe = labels.where(kept, 0).unsqueeze(1)
    tasks = rows.new_empty((count,), dtype=dtype)
    distances = torch.empty_like(tasks)
    for here, _, first, second, held in blocks(rows, count, 2 if distance == "mse" else 3):
        log_p = torch.log_softmax(first, 1, out=held[0])
        torch.mul(log_p.gather(1, safe[here]).squeeze(1), label_smoothing - 1, out=tasks[here])
        if label_smoothing:
            tasks[here].sub_(log_p.mean(1), alpha=label_smoothing)
        if distance == "mse":
            gap = torch.sub(first, second, out=held[1])
            torch.linalg.vecdot(gap, gap, out=distances[here])
        else:
            log_q = torch.log_softmax(second, 1, out=held[1])
            gap = torch.sub(log_p, log_q, out=held[2])
            torch.linalg.vecdot(log_p.exp_().sub_(log_q.exp_()), gap, out=distances[here])
    if distance == "kl":
        distances.mul_(0.5)
    return tasks.masked_fill_(~kept, 0), distances


def total(
    tasks: Tensor, distances: Tensor, labels: Tensor, weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, task, consistency) from what each row adds."""
    task = tasks.sum() / (labels != ignore_index).sum()
    consistency = distances.sum() / labels.shape[0]
    return torch.add(task, consistency * weight.to(tasks.dtype)), task, consistency


def eager_forward(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, task and consistency, and what CUDA's backward keeps of the rows."""
    check(logits.shape, targets, weight, distance, label_smoothing)
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    found = row_losses(rows, labels, distance, ignore_index, label_smoothing)
    return *total(*found, labels, weight, ignore_index), no_statistics(rows, distance)


def imagined_forward(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(logits.shape, targets, weight, distance, label_smoothing)
    dtype = accumulation_dtype(logits.dtype)
    loss, task, consistency = (logits.new_empty((), dtype=dtype) for _ in range(3))
    kept = logits.new_empty((targets.numel(), STATISTICS[distance]), dtype=dtype)
    return loss, task, consistency, kept


def write_gradients(
    rows: Tensor,
    labels: Tensor,
    on_task: Tensor,
    on_distance: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of on_task * tasks.sum() + on_distance * distances.sum() for (2n, C) rows.

    `out` may be `rows` itself: a block is read before it is written.
    """
    dtype, count, classes = accumulation_dtype(rows.dtype), labels.shape[0], rows.shape[1]
    kept = labels != ignore_index
    scale = on_distance.to(dtype)
    each = kept.to(dtype).mul_(on_task).unsqueeze_(1)
    safe = labels.where(kept, 0).unsqueeze(1)
    apart = bool(scale != 0)  # else the difference of two -inf, which mask classes, would count
    ignored = not bool(kept.all())
    for here, there, first, second, held in blocks(rows, count, 2 if distance == "mse" else 5):
        if not apart:
            p, pull = torch.softmax(first, 1, out=held[0]), held[1].zero_()
            out[there] = 0
        elif distance == "mse":
            p, pull = torch.softmax(first, 1, out=held[0]), torch.sub(first, second, out=held[1])
            torch.mul(pull.mul_(2 * scale), -1.0, out=out[there])
            if out.dtype != dtype:
                # Opposites once rounded, too: a bias before the logits gets their difference, nothing.
                pull.copy_(out[there]).neg_()
        else:
            p, pull, push = _divergence_gradients(first, second, *held)
            pull.mul_(0.5 * scale)
            torch.mul(push, 0.5 * scale, out=out[there])
        if ignored:  # whatever such rows hold
            p[~kept[here]] = 0
        if label_smoothing:
            p.sub_(label_smoothing / classes)
        reward = p.new_full((1, 1), label_smoothing - 1.0).expand(safe[here].shape)
        p.scatter_add_(1, safe[here], reward)
        torch.addcmul(pull, p, each[here], out=out[here])


def eager_backward(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    task_scale: Tensor,
    consistency_scale: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """task_scale * dtask + consistency_scale * dconsistency for the logits, like the logits."""
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    result = rows.new_empty(rows.shape)
    on_task, on_distance = shares(task_scale, consistency_scale, labels, ignore_index)
    write_gradients(
        rows, labels, on_task, on_distance, distance, ignore_index, label_smoothing, out=result
    )
    return result.view(logits.shape)


def shares(
    task_scale: Tensor, consistency_scale: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """What one kept row adds to the task and what one row adds to the consistency, scaled."""
    kept = (labels != ignore_index).sum().clamp_(min=1)
    return task_scale / kept, consistency_scale / max(labels.shape[0], 1)


def _divergence_gradients(
    first: Tensor, second: Tensor, p: Tensor, q: Tensor, gap: Tensor, spare: Tensor, apart: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p, and the gradients of KL(p || q) + KL(q || p) for both logits, in the five buffers.

    With u = log p - log q they are p (u - <p, u>) + p - q and q (<q, u> - u) + q - p.
    """
    torch.log_softmax(first, 1, out=p)
    torch.log_softmax(second, 1, out=q)
    torch.sub(p, q, out=gap)
    torch.neg(gap, out=spare)
    torch.sub(p.exp_(), q.exp_(), out=apart)
    pull = _through_softmax(gap, p, apart)
    return p, pull, _through_softmax(spare, q, apart.neg_())


def _through_softmax(values: Tensor, weights: Tensor, apart: Tensor) -> Tensor:
    """weights * (values - <weights, values>) + apart, which adds up to nothing, in `values`.

    A mean far from zero is taken off before `apart`, which would not survive beside it. What rounding
    leaves of the sum is taken off last: where one weight is nearly all it may be all there is.
    """
    values.sub_(torch.linalg.vecdot(weights, values).unsqueeze_(1))
    torch.addcmul(apart, values, weights, out=values)
    return values.addcmul_(weights, values.sum(1, keepdim=True), value=-1)


def imagined_backward(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    task_scale: Tensor,
    consistency_scale: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, targets, weight, distance, ignore_index, label_smoothing = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(logits, targets, weight, output[2], output[3])
    ctx.options = (distance, ignore_index, label_smoothing)


def _differentiate(ctx, dloss, dtask, dconsistency, _):  # type: ignore[no-untyped-def]
    logits, targets, weight, consistency, statistics = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dlogits = None
    if wants[0]:
        dlogits = _backward(
            logits, targets, statistics, dloss + dtask, dloss * weight + dconsistency, *ctx.options
        )
    dweight = (dloss * consistency).to(weight.dtype) if wants[2] else None
    return dlogits, None, dweight, None, None, None


# No autocast rule: 16-bit logits are read as they are, and every sum is float32 already.
_forward = register(
    "task_consistency_loss",
    cpu=eager_forward,
    cuda=on_demand("triton_loss", "task_consistency_loss"),
    fake=imagined_forward,
    save=_save,
    differentiate=_differentiate,
)
_backward = register(
    "task_consistency_loss_backward",
    cpu=eager_backward,
    cuda=on_demand("triton_loss", "task_consistency_loss_backward"),
    fake=imagined_backward,
)

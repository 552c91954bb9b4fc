"""Cross-entropy on one view plus a consistency term between two views of the same batch.

Contract. `logits` is (2B, ..., C) with view one in the first half; `targets` is (B, ...) int64
class indices; `weight` is 0-d. Returns 0-d tensors in float32 (float64 for float64 logits):

  task          mean cross-entropy of view one over targets that are not `ignore_index`
  consistency   mean over a view's leading dims, ignored targets included, of the distance:
                "mse"  sum over classes of (l1 - l2)^2, raw logits (PACE, arXiv 2409.17137, eq. 12)
                "kl"   (KL(p || q) + KL(q || p)) / 2 of the softmaxes (R-Drop, arXiv 2106.14448)
  loss          task + weight * consistency

Both views get gradient: nothing is detached. One backward pass writes the gradient of both. As with
F.cross_entropy, no target to average over makes task (and loss) nan, and its gradient zero.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.support import accumulation_dtype, on_demand, require

DISTANCES = ("mse", "kl")

# Elements of a row block of backward: its float32 temporaries should stay in a core's cache.
BLOCK_ELEMENTS = 1 << 16


def task_consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str = "mse",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, task, consistency), 0-d each; see the module for the arguments."""
    loss, task, consistency = torch.ops.trainc.task_consistency_loss(
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


def check(logits: Tensor, targets: Tensor, weight: Tensor, distance: str) -> None:
    """Reject arguments outside the contract."""
    require(distance in DISTANCES, lambda: f"distance is one of {DISTANCES}, not {distance!r}")
    require(
        logits.dim() >= 2
        and logits.dim() == targets.dim() + 1
        and logits.shape[0] == 2 * targets.shape[0]
        and tuple(logits.shape[1:-1]) == tuple(targets.shape[1:]),
        lambda: f"logits {tuple(logits.shape)} are not two views of targets {tuple(targets.shape)}",
    )
    require(weight.dim() == 0, lambda: "weight is a 0-d tensor")


def eager_forward(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(logits, targets, weight, distance)
    dtype = accumulation_dtype(logits.dtype)
    rows = logits.reshape(-1, logits.shape[-1])
    first, second = rows.chunk(2) if rows.shape[0] else (rows, rows)
    wide = first.to(dtype)
    task = functional.cross_entropy(
        wide, targets.reshape(-1), ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if distance == "mse":
        total = functional.mse_loss(wide, second.to(dtype), reduction="sum")
    else:
        log_p, log_q = wide.log_softmax(1), second.log_softmax(1, dtype=dtype)
        total = torch.dot((log_p - log_q).view(-1), log_p.exp_().sub_(log_q.exp_()).view(-1)) / 2
    consistency = total / first.shape[0]
    return torch.add(task, consistency * weight.to(dtype)), task, consistency


_forward = torch.library.custom_op(
    "trainc::task_consistency_loss", eager_forward, mutates_args=(), device_types="cpu"
)


@_forward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(logits, targets, weight, distance)
    scalar = logits.new_empty((), dtype=accumulation_dtype(logits.dtype))
    return scalar, torch.empty_like(scalar), torch.empty_like(scalar)


def eager_backward(
    logits: Tensor,
    targets: Tensor,
    task_scale: Tensor,
    consistency_scale: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """task_scale * dtask + consistency_scale * dconsistency for the logits, like the logits."""
    dtype = accumulation_dtype(logits.dtype)
    classes = logits.shape[-1]
    rows, labels = logits.reshape(-1, classes), targets.reshape(-1)
    count = labels.shape[0]
    result = rows.new_empty(rows.shape)
    kept = labels != ignore_index
    on_task = kept.to(dtype).mul_(task_scale / kept.sum().clamp_(min=1)).unsqueeze_(1)
    on_distance = consistency_scale.to(dtype) / max(count, 1)
    safe = labels.where(kept, 0).unsqueeze(1)
    block = max(1, BLOCK_ELEMENTS // max(classes, 1))
    for start in range(0, count, block):
        here = slice(start, min(start + block, count))
        there = slice(start + count, here.stop + count)
        first, second = rows[here].to(dtype), rows[there].to(dtype)
        if distance == "mse":
            pull = torch.sub(first, second).mul_(2 * on_distance)
            torch.mul(pull, -1.0, out=result[there])
            probability = first.softmax(1)
        else:
            probability, pull, result[there] = _kl_gradients(first, second, on_distance / 2)
        if label_smoothing:
            probability.sub_(label_smoothing / classes)
        reward = probability.new_full((1, 1), label_smoothing - 1.0).expand(safe[here].shape)
        probability.scatter_add_(1, safe[here], reward)
        torch.addcmul(pull, probability, on_task[here], out=result[here])
    return result.view(logits.shape)


def _kl_gradients(first: Tensor, second: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(first), and the gradients of scale * (KL(p || q) + KL(q || p)) for both logits.

    With u = log p - log q: d/dl1 = p (u - <p, u>) + p - q and d/dl2 = -q (u - <q, u>) + q - p.
    """
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    u = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    gap = p - q
    along_p = torch.linalg.vecdot(p, u).unsqueeze_(1)
    along_q = torch.linalg.vecdot(q, u).unsqueeze_(1)
    pull = torch.sub(u, along_p).mul_(p).add_(gap).mul_(scale)
    push = torch.sub(along_q, u).mul_(q).sub_(gap).mul_(scale)
    return p, pull, push


_backward = torch.library.custom_op(
    "trainc::task_consistency_loss_backward", eager_backward, mutates_args=(), device_types="cpu"
)


@_backward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    task_scale: Tensor,
    consistency_scale: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, targets, weight, distance, ignore_index, label_smoothing = inputs
    ctx.save_for_backward(logits, targets, weight, output[2])
    ctx.options = (distance, ignore_index, label_smoothing)


def _differentiate(ctx, dloss, dtask, dconsistency):  # type: ignore[no-untyped-def]
    logits, targets, weight, consistency = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dlogits = None
    if wants[0]:
        dlogits = torch.ops.trainc.task_consistency_loss_backward(
            logits, targets, dloss + dtask, dloss * weight + dconsistency, *ctx.options
        )
    dweight = (dloss * consistency).to(weight.dtype) if wants[2] else None
    return dlogits, None, dweight, None, None, None


# No autocast rule: 16-bit logits are read as they are, and every sum is float32 already.
_forward.register_autograd(_differentiate, setup_context=_save)
_forward.register_kernel("cuda")(on_demand("triton_loss", "task_consistency_loss"))
_backward.register_kernel("cuda")(on_demand("triton_loss", "task_consistency_loss_backward"))

"""Triton kernels for the task and consistency loss, with launchers; imported by first use.

One program owns one row of both views. Forward reads both rows once for "mse" (twice for "kl": the
divergence needs both normalisers first); backward reads them again, from cache the second time, and
writes both gradients in the same pass. Per-row sums are added by PyTorch, so results are
deterministic.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels import task_consistency_loss as operators
from trainc.kernels.support import REDUCED

BLOCK = 4096


@triton.jit
def _normaliser(L, base, classes, BLOCK_V: tl.constexpr):
    """log sum exp and plain sum of one row."""
    top = tl.full((), float("-inf"), tl.float32)
    scaled = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + base + column, mask=mask, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        scaled = scaled * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        plain += tl.sum(tl.where(mask, x, 0.0), 0)
        top = higher
    return top + tl.log(scaled), plain


@triton.jit
def _divergences(L, one, two, lse_one, lse_two, classes, BLOCK_V: tl.constexpr):
    """<p, u> and <q, u> with u = log p - log q."""
    along_p = tl.full((), 0.0, tl.float32)
    along_q = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        log_p = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32) - lse_one
        log_q = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32) - lse_two
        u = tl.where(mask, log_p - log_q, 0.0)
        along_p += tl.sum(tl.exp(log_p) * u, 0)
        along_q += tl.sum(tl.exp(log_q) * u, 0)
    return along_p, along_q


@triton.jit
def loss_forward(
    L, TARGETS, TASK, DISTANCE, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the row's cross-entropy (0 when ignored) and distance."""
    row = tl.program_id(0).to(tl.int64)
    one, two = row * classes, (row + rows) * classes
    target = tl.load(TARGETS + row)
    kept = target != ignore_index
    lse, plain = _normaliser(L, one, classes, BLOCK_V)
    chosen = tl.load(L + one + target, mask=kept, other=0.0).to(tl.float32)
    task = lse - (1.0 - smoothing) * chosen - smoothing * plain / classes
    tl.store(TASK + row, tl.where(kept, task, 0.0))
    if KL:
        other, _ = _normaliser(L, two, classes, BLOCK_V)
        along_p, along_q = _divergences(L, one, two, lse, other, classes, BLOCK_V)
        distance = 0.5 * (along_p - along_q)
    else:
        distance = tl.full((), 0.0, tl.float32)
        for start in range(0, classes, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            mask = column < classes
            x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
            gap = x - tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
            distance += tl.sum(gap * gap, 0)
    tl.store(DISTANCE + row, distance)


@triton.jit
def loss_backward(
    L, TARGETS, D, ON_TASK, ON_DISTANCE, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the gradient of both views' rows."""
    row = tl.program_id(0).to(tl.int64)
    one, two = row * classes, (row + rows) * classes
    target = tl.load(TARGETS + row)
    kept = target != ignore_index
    on_task = tl.where(kept, tl.load(ON_TASK).to(tl.float32), 0.0)
    on_distance = tl.load(ON_DISTANCE).to(tl.float32)
    lse, _ = _normaliser(L, one, classes, BLOCK_V)
    if KL:
        other, _ = _normaliser(L, two, classes, BLOCK_V)
        along_p, along_q = _divergences(L, one, two, lse, other, classes, BLOCK_V)
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp(x - lse)
        if KL:
            q = tl.exp(y - other)
            u = (x - lse) - (y - other)
            pull = 0.5 * on_distance * (p * (u - along_p) + p - q)
            push = 0.5 * on_distance * (q * (along_q - u) + q - p)
        else:
            pull = 2.0 * on_distance * (x - y)
            push = -pull
        hit = tl.where(column == target, 1.0 - smoothing, 0.0)
        pull += on_task * (p - hit - smoothing / classes)
        tl.store(D + one + column, pull.to(D.dtype.element_ty), mask=mask)
        tl.store(D + two + column, push.to(D.dtype.element_ty), mask=mask)


def block(classes: int) -> int:
    """Classes a program holds at once."""
    return min(BLOCK, int(triton.next_power_of_2(classes)))


def supported(logits: Tensor) -> bool:
    """Whether the kernels take these logits, or PyTorch does."""
    return logits.dtype in (torch.float32, *REDUCED) and logits.numel() > 0


def task_consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::task_consistency_loss."""
    if not supported(logits):
        return operators.eager_forward(
            logits, targets, weight, distance, ignore_index, label_smoothing
        )
    operators.check(logits, targets, weight, distance)
    logits, labels = logits.contiguous(), targets.contiguous()
    rows, classes = labels.numel(), logits.shape[-1]
    tasks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    distances = torch.empty_like(tasks)
    loss_forward[(rows,)](
        logits, labels, tasks, distances, rows, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=8,
    )  # fmt: skip
    task = tasks.sum() / (labels != ignore_index).sum()
    consistency = distances.sum() / rows
    return task + weight.float() * consistency, task, consistency


def task_consistency_loss_backward(
    logits: Tensor,
    targets: Tensor,
    task_scale: Tensor,
    consistency_scale: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The CUDA kernel of trainc::task_consistency_loss_backward."""
    if not supported(logits):
        return operators.eager_backward(
            logits, targets, task_scale, consistency_scale, distance, ignore_index, label_smoothing
        )
    logits, labels = logits.contiguous(), targets.contiguous()
    rows, classes = labels.numel(), logits.shape[-1]
    on_task = task_scale.float() / (labels != ignore_index).sum().clamp(min=1)
    gradient = torch.empty_like(logits)
    loss_backward[(rows,)](
        logits, labels, gradient, on_task, consistency_scale.float() / rows,
        rows, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=8,
    )  # fmt: skip
    return gradient

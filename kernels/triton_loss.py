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
    """One row's largest entry and its place, the log of sum exp(x - largest), and the mean of x - largest.

    Kept apart: their sum would be rounded at the size of the logits, and every probability with it.
    """
    anchor = tl.load(L + base).to(tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    place = tl.full((), 0, tl.int32)
    scaled = tl.full((), 0.0, tl.float32)
    above = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + base + column, mask=mask, other=float("-inf")).to(tl.float32)
        highest, where = tl.max(x, 0, return_indices=True)
        place = tl.where(highest > top, start + where, place)
        higher = tl.maximum(top, highest)
        scaled = scaled * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        above += tl.sum(tl.where(mask, x - anchor, 0.0), 0)
        top = higher
    return top, place, tl.log(scaled), (anchor - top) + above / classes


@triton.jit
def _levels(L, one, two, top, place, other_top, other_place):
    """u = (x - top) - (y - other_top) at the likeliest class of each view.

    u is log p - log q up to a constant of the row. Counted from these, <p, u> and <q, u> are small
    where p or q is all but certain; far from zero they would be rounded, and p - q beside them lost.
    """
    beside = tl.load(L + two + place).to(tl.float32)
    other_beside = tl.load(L + one + other_place).to(tl.float32)
    return other_top - beside, other_beside - top


@triton.jit
def _means(
    L, one, two, top, log_sum, level, other_top, other_log_sum, other_level, classes, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """<p, u - level> and <q, u - other_level>."""
    along_p = tl.full((), 0.0, tl.float32)
    along_q = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
        u = (x - top) - (y - other_top)
        p, q = tl.exp((x - top) - log_sum), tl.exp((y - other_top) - other_log_sum)
        along_p += tl.sum(tl.where(mask, p * (u - level), 0.0), 0)
        along_q += tl.sum(tl.where(mask, q * (u - other_level), 0.0), 0)
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
    top, place, log_sum, mean = _normaliser(L, one, classes, BLOCK_V)
    chosen = tl.load(L + one + target, mask=kept, other=0.0).to(tl.float32)
    task = log_sum + (1.0 - smoothing) * (top - chosen) - smoothing * mean
    tl.store(TASK + row, tl.where(kept, task, 0.0))
    if KL:
        other_top, other_place, other_log_sum, _ = _normaliser(L, two, classes, BLOCK_V)
        level, other_level = _levels(L, one, two, top, place, other_top, other_place)
        along_p, along_q = _means(
            L,
            one,
            two,
            top,
            log_sum,
            level,
            other_top,
            other_log_sum,
            other_level,
            classes,
            BLOCK_V,
        )
        distance = 0.5 * ((level - other_level) + (along_p - along_q))
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
    top, place, log_sum, _ = _normaliser(L, one, classes, BLOCK_V)
    if KL:
        other_top, other_place, other_log_sum, _ = _normaliser(L, two, classes, BLOCK_V)
        level, other_level = _levels(L, one, two, top, place, other_top, other_place)
        along_p, along_q = _means(
            L,
            one,
            two,
            top,
            log_sum,
            level,
            other_top,
            other_log_sum,
            other_level,
            classes,
            BLOCK_V,
        )
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp((x - top) - log_sum)
        if KL:
            q = tl.exp((y - other_top) - other_log_sum)
            u = (x - top) - (y - other_top)
            pull = 0.5 * on_distance * (p * ((u - level) - along_p) + (p - q))
            push = 0.5 * on_distance * (q * (along_q - (u - other_level)) - (p - q))
        else:
            # Opposites once rounded, too: a bias before the logits gets their difference, nothing.
            pull = (2.0 * on_distance * (x - y)).to(D.dtype.element_ty).to(tl.float32)
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


def row_losses(
    rows: Tensor, labels: Tensor, distance: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropies, 0 where ignored, and distances, (n,) each, of contiguous logits (2n, C)."""
    count, classes = labels.shape[0], rows.shape[1]
    tasks = torch.empty(count, dtype=torch.float32, device=rows.device)
    distances = torch.empty_like(tasks)
    loss_forward[(count,)](
        rows, labels, tasks, distances, count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=8,
    )  # fmt: skip
    return tasks, distances


def write_gradients(
    rows: Tensor,
    labels: Tensor,
    on_task: Tensor,
    on_distance: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    out: Tensor,
) -> None:
    """Write the gradient of on_task * tasks.sum() + on_distance * distances.sum() for (2n, C) rows.

    `out` may be `rows` itself: a program is alone with its rows, its sums over them are complete
    before it writes, and what it writes to a column is from that column.
    """
    count, classes = labels.shape[0], rows.shape[1]
    loss_backward[(count,)](
        rows, labels, out, on_task, on_distance, count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=8,
    )  # fmt: skip


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
    operators.check(logits.shape, targets, weight, distance)
    rows, labels = logits.contiguous().view(-1, logits.shape[-1]), targets.contiguous().view(-1)
    found = row_losses(rows, labels, distance, ignore_index, label_smoothing)
    return operators.total(*found, labels, weight, ignore_index)


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
    rows, labels = logits.contiguous().view(-1, logits.shape[-1]), targets.contiguous().view(-1)
    gradient = torch.empty_like(rows)
    on_task, on_distance = operators.shares(task_scale, consistency_scale, labels, ignore_index)
    write_gradients(
        rows, labels, on_task, on_distance, distance, ignore_index, label_smoothing, out=gradient
    )
    return gradient.view(logits.shape)

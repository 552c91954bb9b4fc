"""Triton kernels for cross-entropy with a consistency term, and their launchers; imported by first use.

Forward: one program owns one row of both views and reads each logit once. A block of classes adds to sums that every
thread keeps for itself, measured from the largest entry so far; only where a larger one turns up, a few times a row,
are they measured anew. What backward needs of a row it keeps: 2 or 8 numbers. Backward is then elementwise, reads both
views once and writes both gradients. Per-row sums are added by PyTorch: deterministic.

Classes may be masked by -inf, wherever they stand: nothing that is carried is measured from a -inf.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.grid import resident_programs, supported
from trainc.kernels.library.launch import launch
from trainc.kernels.loss import cross_entropy_consistency as operators
from trainc.kernels.loss.triton_means import means, row_factors
from trainc.kernels.loss.triton_rows import (
    WORD,
    both_views,
    entries_of,
    is_whole,
    lay,
    lay_to_read,
    vectors,
    vectors_of_row,
)
from trainc.kernels.loss.triton_sums import (
    added,
    adds_up,
    log_sum,
    measured_anew,
    no_sums,
    powers,
    settled,
)

# Classes a program takes at once, by its warps. A warp that has a row to itself waits for no other; where rows are too
# few to fill a device with them, each gets more.
BLOCKS = {1: 512, 4: 2048}
RESIDENT = 16
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _masked(L, one, two, classes, BLOCK: tl.constexpr):
    """What entries of -inf make of a divergence: inf where one view alone has them, nan where both do, else 0."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(L + one + column, mask=column < classes, other=0.0).to(tl.float32)
        y = tl.load(L + two + column, mask=column < classes, other=0.0).to(tl.float32)
        either = (x == float("-inf")) | (y == float("-inf"))
        found += tl.where(either, tl.abs(x - y), 0.0)
    return tl.sum(found, 0)


@triton.jit
def _divergence(L, KEPT, row, rows, classes, first, second, BLOCK: tl.constexpr):
    """The row's divergence; keeps what backward needs beside the first view's largest entry and sum."""
    _, _, beside, own, _, _ = first
    other_top, _, other_beside, other_own, _, _ = second
    rest, mean = settled(first)
    other_rest, other_along = settled(second)
    # Along is counted from the first view's entry, and this from the second's own.
    other_mean = -(other_along + other_rest * (beside - other_beside))
    if ~((tl.abs(mean) < float("inf")) & (tl.abs(other_mean) < float("inf"))):
        masked = _masked(L, row * classes, (row + rows) * classes, classes, BLOCK)
        mean = tl.where(masked != 0.0, masked, mean)
        other_mean = tl.where(masked != 0.0, masked, other_mean)
    mean, other_mean = mean / (own + rest), other_mean / (other_own + other_rest)
    distance = 0.5 * ((beside - other_beside) + (mean + other_mean))
    tl.store(KEPT + row * 8 + 2, beside)
    tl.store(KEPT + row * 8 + 3, mean)
    tl.store(KEPT + row * 8 + 4, other_top)
    tl.store(KEPT + row * 8 + 5, log_sum(other_own, other_rest))
    tl.store(KEPT + row * 8 + 6, other_beside)
    tl.store(KEPT + row * 8 + 7, other_mean)
    return distance


@triton.jit
def _below_another(below, met, top, new_top, x, valid):
    """What the mean needs, measured from the largest entry too: of `met` entries so far and of a block."""
    moved = tl.where(met > 0, met * (top - new_top), 0.0)
    below += tl.where(tl.arange(0, below.shape[0]) == 0, moved, 0.0)
    return below + tl.sum(tl.where(valid, x - new_top, 0.0), 1)


@triton.jit
def loss_forward(
    L, TARGETS, CROSS_ENTROPY, DISTANCE, KEPT, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, SMOOTHED: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, OTHER: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the row's cross-entropy and distance, 0 when ignored, and what backward needs."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    kept = target != ignore_index
    one, two, before = vectors_of_row(row, rows, classes, W, OTHER)
    first, second = no_sums(V), no_sums(V)
    apart, below = tl.zeros((V, W), tl.float32), tl.zeros((V,), tl.float32)
    for block in range(tl.cdiv(before + classes, V * W)):
        whole = is_whole(block, before, classes, V * W)
        x, y = both_views(L, one, two, block, before, classes, whole, W, OTHER, V, True)
        gap = x - y
        power = powers(x, first)
        most = power
        if KL:
            other_power = powers(y, second)
            most = tl.maximum(power, other_power, propagate_nan=tl.PropagateNan.ALL)
        if whole & adds_up(most):
            if SMOOTHED:
                below += tl.sum(x - first[0], 1)
            if KL:
                from_base = gap - first[2]
                first = added(first, power, from_base, KL)
                second = added(second, other_power, from_base, KL)
            else:
                first = added(first, power, gap, KL)
                apart = tl.fma(gap, gap, apart)
        else:
            place, valid = entries_of(block, before, classes, W, EVEN, V)
            top, base = first[0], first[2]
            first = measured_anew(first, (base, base), x, gap, place, valid, KL, True)
            if SMOOTHED:
                met = tl.maximum(block * V * W - before, 0)
                below = _below_another(below, met, top, first[0], x, valid)
            if KL:
                second = measured_anew(second, (base, first[2]), y, gap, place, valid, KL, False)
            else:
                kept_gap = tl.where(valid, gap, 0.0)
                apart += kept_gap * kept_gap
    top, own = first[0], first[3]
    log_total = log_sum(own, settled(first)[0])
    # No class of this number: nan, for a device cannot raise, and another row's logit would pass.
    known = (target >= 0) & (target < classes)
    chosen = tl.load(L + row * classes + target, mask=kept & known, other=float("nan"))
    cross_entropy = log_total + (1.0 - smoothing) * (top - chosen.to(tl.float32))
    if SMOOTHED:
        cross_entropy -= smoothing * (tl.sum(below, 0) / classes)
    tl.store(CROSS_ENTROPY + row, tl.where(kept, cross_entropy, 0.0))
    if KL:
        distance = _divergence(L, KEPT, row, rows, classes, first, second, V * W)
        tl.store(KEPT + row * 8, top)
        tl.store(KEPT + row * 8 + 1, log_total)
    else:
        distance = tl.sum(apart)
        tl.store(KEPT + row * 2, top)
        tl.store(KEPT + row * 2 + 1, log_total)
    tl.store(DISTANCE + row, tl.where(kept, distance, 0.0))


@triton.jit
def _difference(p, q, w):
    """p - q for q = p exp(w), by a series where they are close."""
    close = w * (1.0 + w * (0.5 + w * (1 / 6 + w * (1 / 24 + w * (1 / 120 + w * (1 / 720))))))
    return tl.where(tl.abs(w) < 0.25, -p * close, p - q)


@triton.jit
def _pull_and_push(row, KEPT, x, y, p, on_distance, KL: tl.constexpr, D: tl.constexpr):
    """The distance's gradient of the first view, and of the second."""
    gap = x - y
    if KL:
        top, log_sum = tl.load(KEPT + row * 8), tl.load(KEPT + row * 8 + 1)
        beside, mean = tl.load(KEPT + row * 8 + 2), tl.load(KEPT + row * 8 + 3)
        other_top, other_log_sum = tl.load(KEPT + row * 8 + 4), tl.load(KEPT + row * 8 + 5)
        other_beside, other_mean = tl.load(KEPT + row * 8 + 6), tl.load(KEPT + row * 8 + 7)
        q = tl.exp2((y - other_top) * _LOG2E - other_log_sum * _LOG2E)
        apart = _difference(p, q, ((top - other_top) + (log_sum - other_log_sum)) - gap)
        half = 0.5 * on_distance
        pull = half * (p * ((gap - beside) - mean) + apart)
        return pull, half * (q * ((other_beside - gap) - other_mean) - apart)
    # Opposites after rounding too: the gradient of a bias of the logits is their sum, which must be zero.
    pull = ((2.0 * on_distance) * gap).to(D).to(tl.float32)
    return pull, -pull


@triton.jit
def loss_backward(
    L, TARGETS, D, KEPT, ON_CROSS_ENTROPY, ON_DISTANCE, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, SMOOTHED: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of vectors): the gradient of both views' rows."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one, two, before = vectors_of_row(row, rows, classes, W, W)
    place, valid = entries_of(block, before, classes, W, EVEN, V)
    whole = is_whole(block, before, classes, V * W)
    target = tl.load(TARGETS + row)
    pull = tl.zeros((V, W), tl.float32)
    push = pull
    if target != ignore_index:
        x, y = both_views(L, one, two, block, before, classes, whole, W, W, V, False)
        on_cross_entropy = tl.load(ON_CROSS_ENTROPY).to(tl.float32)
        on_distance = tl.load(ON_DISTANCE).to(tl.float32)
        width: tl.constexpr = 8 if KL else 2
        top, log_sum = tl.load(KEPT + row * width), tl.load(KEPT + row * width + 1)
        p = tl.exp2((x - top) * _LOG2E - log_sum * _LOG2E)
        # Without a distance the difference of two -inf, which mask classes, does not count.
        if on_distance != 0.0:
            pull, push = _pull_and_push(row, KEPT, x, y, p, on_distance, KL, D.dtype.element_ty)
        hit = target + before - block * V * W
        if (hit >= 0) & (hit < V * W):
            p -= tl.where(place == target + before, 1.0 - smoothing, 0.0)
        if SMOOTHED:
            p -= smoothing / classes
        pull += on_cross_entropy * p
    if whole:
        tl.store(D + one + place, pull.to(D.dtype.element_ty))
        tl.store(D + two + place, push.to(D.dtype.element_ty))
    else:
        tl.store(D + one + place, pull.to(D.dtype.element_ty), mask=valid)
        tl.store(D + two + place, push.to(D.dtype.element_ty), mask=valid)


def row_losses(
    rows: Tensor,
    labels: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and distances, both 0 where ignored, (n,) each, of contiguous logits (2n, C).

    What backward needs of the rows goes to `statistics`, contiguous.
    """
    count, classes = labels.shape[0], rows.shape[1]
    cross_entropies = torch.empty(count, dtype=torch.float32, device=rows.device)
    distances = torch.empty_like(cross_entropies)
    warps = 1 if count >= resident_programs(rows.device, RESIDENT) else max(BLOCKS)
    lies = lay_to_read(count, classes, odd=rows.data_ptr() % WORD != 0)
    launch(
        loss_forward, (count,),
        rows, labels, cross_entropies, distances, statistics,
        count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", SMOOTHED=label_smoothing != 0.0, **lies,
        V=vectors(BLOCKS[warps], classes, lies["W"]), num_warps=warps,
    )  # fmt: skip
    return cross_entropies, distances


def write_gradients(
    rows: Tensor,
    labels: Tensor,
    on_cross_entropy: Tensor,
    on_distance: Tensor,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    statistics: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of on_cross_entropy * cross_entropies.sum() + on_distance * distances.sum() for (2n, C) rows.

    `statistics` are `row_losses`'s. `out` may be `rows` itself: an entry is read before it is written.
    """
    count, classes = labels.shape[0], rows.shape[1]
    lies = lay(count, classes)
    width = lies["W"]
    each = vectors(BACKWARD_BLOCK, classes, width)
    most = classes if lies["EVEN"] else classes + width - 1  # from a row's first vector on
    launch(
        loss_backward, (count, triton.cdiv(most, each * width)),
        rows, labels, out, statistics, on_cross_entropy, on_distance,
        count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", SMOOTHED=label_smoothing != 0.0, **lies,
        V=each, num_warps=BACKWARD_WARPS,
    )  # fmt: skip


def forward(
    logits: Tensor, targets: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::cross_entropy_consistency."""
    distance, ignore_index, label_smoothing = options
    if not supported(logits):
        return operators.eager_forward(logits, targets, weight, *options)
    operators.check(logits.shape, targets, weight, distance, label_smoothing)
    rows, labels = logits.contiguous().view(-1, logits.shape[-1]), targets.contiguous().view(-1)
    shape = (len(labels), operators.STATISTICS[distance])
    statistics = torch.empty(shape, dtype=torch.float32, device=rows.device)
    found = row_losses(rows, labels, distance, ignore_index, label_smoothing, statistics)
    return *means(*found, labels, weight, ignore_index), statistics


def backward(
    logits: Tensor, targets: Tensor, statistics: Tensor, cross_entropy_factor: Tensor,
    consistency_factor: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    """The CUDA kernel of trainc::cross_entropy_consistency_backward."""
    given = (cross_entropy_factor, consistency_factor)
    if not supported(logits):
        return operators.eager_backward(logits, targets, statistics, *given, *options)
    rows, labels = logits.contiguous().view(-1, logits.shape[-1]), targets.contiguous().view(-1)
    gradient = torch.empty_like(rows)
    distance, ignore_index, label_smoothing = options
    factors = row_factors(*given, labels, ignore_index)
    write_gradients(
        rows, labels, *factors, distance, ignore_index, label_smoothing, statistics, out=gradient
    )
    return gradient.view(logits.shape)

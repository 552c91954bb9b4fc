"""Triton kernels for cross-entropy with a consistency term, and their launchers; imported by first use.

Forward: one program owns one row of both views and reads each logit once. A softmax's sum, and for
"kl" the means of log p - log q under both softmaxes, are carried along while the largest entry is
still being found. What backward needs of a row it keeps: 2 or 8 numbers. Backward is then elementwise,
reads both views once and writes both gradients. Per-row sums are added by PyTorch: deterministic.

Classes may be masked by -inf, wherever they stand: nothing that is carried is measured from a -inf.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.grid import supported
from trainc.kernels.library.launch import launch
from trainc.kernels.loss import cross_entropy_consistency as operators

# Four warps: their reductions are short, and 4 to 8 programs a processor have 32 to 64 KB in flight.
BLOCK, WARPS = 2048, 4


@triton.jit
def _level(x):
    """x, or 0 for a -inf: what other entries are measured from."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _carried(
    L, across, x, y, column, mask, start, top, beside, place, own, rest, along, KL: tl.constexpr
):
    """Add a block of one view to its running sums; `across` is the other view's row.

    top is the largest entry, at `place`, where the other view has `beside`. With weights exp(x - top),
    rest is the sum of all but that entry's own, and along the sum of weights times v, where
    v = (x - top) - (y - beside) is log p - log q counted from that entry. Counted from there, and with
    the entry's 1 apart, neither loses anything where one class is all but certain. An entry that is -inf in
    either view adds nothing to along: `_masked` has what it does to a distance.
    """
    highest, where = tl.max(tl.where(mask, x, float("-inf")), 0, return_indices=True)
    higher = highest > top
    place = tl.where(higher, start + where, place)
    new_top = tl.where(higher, highest, top)
    level = _level(new_top)
    shrunk = tl.exp(top - level)
    weight = tl.where(mask & (column != place), tl.exp(x - level), 0.0)
    if KL:
        new_beside = tl.load(L + across + place).to(tl.float32)
        met = top != float("-inf")  # else every entry so far was -inf, and nothing is carried
        moved = (top - level) - (_level(beside) - _level(new_beside))
        along = tl.where(higher & met, shrunk * (along + (rest + own) * moved), along)
        counts = (x != float("-inf")) & (y != float("-inf"))
        ratio = (x - level) - (y - _level(new_beside))
        along += tl.sum(tl.where(counts, weight * ratio, 0.0), 0)
        beside = new_beside
    rest = tl.where(higher, shrunk * (rest + own), rest) + tl.sum(weight, 0)
    return new_top, beside, place, rest, along


@triton.jit
def _masked(x, y):
    """What entries of -inf make of a divergence: inf where one view alone has them, nan where both do."""
    either = (x == float("-inf")) | (y == float("-inf"))
    return tl.sum(tl.where(either, tl.abs(x - y), 0.0), 0)


@triton.jit
def _log1p(x):
    """log(1 + x), also where 1 + x is 1."""
    above = 1.0 + x
    rounded = tl.where(above == 1.0, 1.0, above - 1.0)
    return tl.where(above == 1.0, x, tl.log(above) * (x / rounded))


@triton.jit
def _difference(p, q, w):
    """p - q for q = p exp(w), by a series where they are close."""
    close = w * (1.0 + w / 2 * (1.0 + w / 3 * (1.0 + w / 4 * (1.0 + w / 5 * (1.0 + w / 6)))))
    return tl.where(tl.abs(w) < 0.25, -p * close, p - q)


@triton.jit
def loss_forward(
    L, TARGETS, CROSS_ENTROPY, DISTANCE, KEPT, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the row's cross-entropy and distance, 0 when ignored, and what backward needs."""
    row = tl.program_id(0).to(tl.int64)
    one, two = row * classes, (row + rows) * classes
    target = tl.load(TARGETS + row)
    kept = target != ignore_index
    top = tl.load(L + one).to(tl.float32)
    anchor, other_beside = _level(top), top
    beside = tl.load(L + two).to(tl.float32)
    other_top = beside
    place, other_place = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    own = tl.full((), 0.0, tl.float32)  # an entry's own weight counts once it has been met
    rest, along, other_rest, other_along, above, distance = own, own, own, own, own, own
    masked = own
    for start in range(0, classes, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < classes
        x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
        top, beside, place, rest, along = _carried(
            L, two, x, y, column, mask, start, top, beside, place, own, rest, along, KL
        )
        above += tl.sum(tl.where(mask, x - anchor, 0.0), 0)
        if KL:
            other_top, other_beside, other_place, other_rest, other_along = _carried(
                L, one, y, x, column, mask, start,
                other_top, other_beside, other_place, own, other_rest, other_along, KL,
            )  # fmt: skip
            masked += _masked(x, y)
        else:
            distance += tl.sum((x - y) * (x - y), 0)
        own = tl.full((), 1.0, tl.float32)
    log_sum = _log1p(rest)
    # No class of this number: nan, for a device cannot raise, and another row's logit would pass.
    known = (target >= 0) & (target < classes)
    chosen = tl.load(L + one + target, mask=kept & known, other=float("nan")).to(tl.float32)
    mean = (anchor - top) + above / classes
    spread = tl.where(smoothing != 0.0, smoothing * mean, 0.0)  # -inf masks classes
    cross_entropy = log_sum + (1.0 - smoothing) * (top - chosen) - spread
    tl.store(CROSS_ENTROPY + row, tl.where(kept, cross_entropy, 0.0))
    if KL:
        along = along / (1.0 + rest) + masked
        other_along = other_along / (1.0 + other_rest) + masked
        apart = (other_top - beside) + (top - other_beside)
        distance = 0.5 * (apart + (along + other_along))
        tl.store(KEPT + row * 8, top)
        tl.store(KEPT + row * 8 + 1, log_sum)
        tl.store(KEPT + row * 8 + 2, beside)
        tl.store(KEPT + row * 8 + 3, along)
        tl.store(KEPT + row * 8 + 4, other_top)
        tl.store(KEPT + row * 8 + 5, _log1p(other_rest))
        tl.store(KEPT + row * 8 + 6, other_beside)
        tl.store(KEPT + row * 8 + 7, other_along)
    else:
        tl.store(KEPT + row * 2, top)
        tl.store(KEPT + row * 2 + 1, log_sum)
    tl.store(DISTANCE + row, tl.where(kept, distance, 0.0))


@triton.jit
def loss_backward(
    L, TARGETS, D, KEPT, ON_CROSS_ENTROPY, ON_DISTANCE, rows, classes, ignore_index, smoothing,
    KL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of classes): the gradient of both views' rows."""
    row = tl.program_id(0).to(tl.int64)
    one, two = row * classes, (row + rows) * classes
    target = tl.load(TARGETS + row)
    kept = target != ignore_index
    on_cross_entropy = tl.where(kept, tl.load(ON_CROSS_ENTROPY).to(tl.float32), 0.0)
    on_distance = tl.where(kept, tl.load(ON_DISTANCE).to(tl.float32), 0.0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = column < classes
    x = tl.load(L + one + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(L + two + column, mask=mask, other=0.0).to(tl.float32)
    width: tl.constexpr = 8 if KL else 2
    top = tl.load(KEPT + row * width)
    log_p = (x - top) - tl.load(KEPT + row * width + 1)
    p = tl.exp(log_p)
    if KL:
        beside, along = tl.load(KEPT + row * 8 + 2), tl.load(KEPT + row * 8 + 3)
        other_top, other_log_sum = tl.load(KEPT + row * 8 + 4), tl.load(KEPT + row * 8 + 5)
        other_beside, other_along = tl.load(KEPT + row * 8 + 6), tl.load(KEPT + row * 8 + 7)
        log_q = (y - other_top) - other_log_sum
        q = tl.exp(log_q)
        apart = _difference(p, q, log_q - log_p)
        pull = 0.5 * on_distance * (p * (((x - top) - (y - beside)) - along) + apart)
        push = (
            0.5 * on_distance * (q * (((y - other_top) - (x - other_beside)) - other_along) - apart)
        )
    else:
        # Opposites after rounding too: the gradient of a bias of the logits is their sum, which must be zero.
        pull = (2.0 * on_distance * (x - y)).to(D.dtype.element_ty).to(tl.float32)
        push = -pull
    # Without a distance the difference of two -inf, which mask classes, does not count.
    pull, push = tl.where(on_distance != 0.0, pull, 0.0), tl.where(on_distance != 0.0, push, 0.0)
    hit = tl.where(column == target, 1.0 - smoothing, 0.0)
    pull += tl.where(kept, on_cross_entropy * (p - hit - smoothing / classes), 0.0)
    tl.store(D + one + column, pull.to(D.dtype.element_ty), mask=mask)
    tl.store(D + two + column, push.to(D.dtype.element_ty), mask=mask)


def block(classes: int) -> int:
    """Classes a program holds at once."""
    return min(BLOCK, int(triton.next_power_of_2(classes)))


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
    launch(
        loss_forward, (count,),
        rows, labels, cross_entropies, distances, statistics,
        count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=WARPS,
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
    launch(
        loss_backward, (count, triton.cdiv(classes, block(classes))),
        rows, labels, out, statistics, on_cross_entropy, on_distance,
        count, classes, ignore_index, label_smoothing,
        KL=distance == "kl", BLOCK_V=block(classes), num_warps=WARPS,
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
    statistics = operators.no_statistics(rows, distance)
    found = row_losses(rows, labels, distance, ignore_index, label_smoothing, statistics)
    return *operators.means(*found, labels, weight, ignore_index), statistics


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
    factors = operators.row_factors(*given, labels, ignore_index)
    write_gradients(
        rows, labels, *factors, distance, ignore_index, label_smoothing, statistics, out=gradient
    )
    return gradient.view(logits.shape)

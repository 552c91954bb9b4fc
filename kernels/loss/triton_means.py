"""Triton kernels for the means of a loss over its rows, and for what backward multiplies a row by; one launch each.

One program adds all rows, each thread its own in a fixed order: deterministic. A row has two numbers here and thousands
of logits elsewhere.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.launch import launch

# Rows that the program takes at once, and its warps.
ROWS, WARPS = 2048, 8


@triton.jit
def _added(N, rows, start, values, BLOCK: tl.constexpr):
    """`values` with a block of N (rows,) added."""
    row = start + tl.arange(0, BLOCK)
    return values + tl.load(N + row, mask=row < rows, other=0.0)


@triton.jit
def _counted(TARGETS, rows, start, counts, ignore_index, BLOCK: tl.constexpr):
    """`counts` with the targets of a block added that are not ignored."""
    row = start + tl.arange(0, BLOCK)
    target = tl.load(TARGETS + row, mask=row < rows, other=0)
    return counts + ((row < rows) & (target != ignore_index)).to(tl.int32)


@triton.jit
def loss_means(
    CROSS_ENTROPY, DISTANCE, TARGETS, WEIGHT, LOSS, MEAN_CROSS_ENTROPY, MEAN_DISTANCE, rows, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (1,): the means over rows that are not ignored, nan without any, and the loss that they make."""
    cross_entropies = tl.zeros((BLOCK,), tl.float32)
    distances = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        cross_entropies = _added(CROSS_ENTROPY, rows, start, cross_entropies, BLOCK)
        distances = _added(DISTANCE, rows, start, distances, BLOCK)
        counts = _counted(TARGETS, rows, start, counts, ignore_index, BLOCK)
    count = tl.sum(counts, 0)
    by = tl.where(count > 0, tl.maximum(count, 1).to(tl.float32), float("nan"))
    cross_entropy, distance = tl.sum(cross_entropies, 0) / by, tl.sum(distances, 0) / by
    tl.store(LOSS, cross_entropy + distance * tl.load(WEIGHT).to(tl.float32))
    tl.store(MEAN_CROSS_ENTROPY, cross_entropy)
    tl.store(MEAN_DISTANCE, distance)


@triton.jit
def loss_factors(
    TARGETS, ON_CROSS_ENTROPY, ON_DISTANCE, ROW_CROSS_ENTROPY, ROW_DISTANCE, rows, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (1,): the factors of two means, divided by the number of rows that are not ignored, at least 1."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        counts = _counted(TARGETS, rows, start, counts, ignore_index, BLOCK)
    count = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    tl.store(ROW_CROSS_ENTROPY, tl.load(ON_CROSS_ENTROPY).to(tl.float32) / count)
    tl.store(ROW_DISTANCE, tl.load(ON_DISTANCE).to(tl.float32) / count)


def means(
    cross_entropies: Tensor, distances: Tensor, labels: Tensor, weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross_entropy, consistency), float32, from the cross-entropies and distances (n,) of the rows, float32."""
    loss, cross_entropy, consistency = (cross_entropies.new_empty(()) for _ in range(3))
    launch(
        loss_means, (1,),
        cross_entropies, distances, labels.contiguous(), _beside(weight, labels),
        loss, cross_entropy, consistency, labels.numel(), ignore_index, BLOCK=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return loss, cross_entropy, consistency


def row_factors(
    cross_entropy_factor: Tensor, consistency_factor: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Each row's factors in the two means over rows that are not ignored, float32."""
    on_cross_entropy, on_distance = (labels.new_empty((), dtype=torch.float32) for _ in range(2))
    given = (_beside(one, labels) for one in (cross_entropy_factor, consistency_factor))
    launch(
        loss_factors, (1,),
        labels.contiguous(), *given, on_cross_entropy, on_distance, labels.numel(), ignore_index,
        BLOCK=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return on_cross_entropy, on_distance


def _beside(number: Tensor, labels: Tensor) -> Tensor:
    """A number on the device of the labels; one on the CPU becomes part of what a captured graph does."""
    if number.device == labels.device:
        return number
    if number.device.type == "cpu":
        return torch.full((), float(number), dtype=torch.float32, device=labels.device)
    return number.to(labels.device)

"""The Triton norm kernels for rows too wide for a program's registers.

Forward walks over a row twice: once for its statistics, once to write y; the second reading finds
most of the row in cache. Backward is two kernels instead of one: the first reduces each row to the
two means its dx needs, the second walks down a block of columns, writing dx and adding up the
weight's and the bias's sums. The inputs are read twice, as ATen reads them at every width: 10 bytes
an element in 16 bits instead of 6.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.grid import power_of_2, resident_programs
from trainc.kernels.library.launch import launch
from trainc.kernels.norm import tiles
from trainc.kernels.norm.rows import Folded

ROW_COLUMNS, ROW_WARPS = 4096, 8
# 32 elements a thread; nothing is reduced across threads, so programs need no barrier.
TILE = tiles.Tile(rows=4, columns=1024, warps=4, stages=2, resident=4)


@triton.jit
def _block(
    X, RESIDUAL, TOTAL, at, mask, ADD: tl.constexpr,
):  # fmt: skip
    """A block of the input in float32: of x, or of the sum as rounded to its dtype."""
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(TOTAL.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def wide_forward(
    X, RESIDUAL, TOTAL, W, B, Y, MEAN, RSTD, width, eps,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): y and the float32 statistics of a row of x, or with ADD of x + residual."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = column < width
        at = row * width + column
        x = _block(X, RESIDUAL, TOTAL, at, mask, ADD)
        if ADD:
            tl.store(TOTAL + at, x.to(TOTAL.dtype.element_ty), mask=mask)
        if RMS:
            spread += tl.sum(x * x, 0)
        else:
            # Blocks' means and squares about them, merged: a plain sum of squares would cancel.
            count = tl.minimum(width - start, BLOCK_C) * 1.0
            level = tl.sum(x, 0) / count
            x = tl.where(mask, x - level, 0.0)
            step = level - mean
            share = count / (start + count)
            spread += tl.sum(x * x, 0) + step * step * share * start
            mean += step * share
    rstd = tl.rsqrt(spread / width + eps)
    tl.store(RSTD + row, rstd)
    if not RMS:
        tl.store(MEAN + row, mean)
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = column < width
        at = row * width + column
        # The sum is made again: what this program stored, its other threads may not see yet.
        y = (_block(X, RESIDUAL, TOTAL, at, mask, ADD) - mean) * rstd
        if LLAMA:
            y = y.to(TOTAL.dtype.element_ty).to(tl.float32)
        if HAS_W:
            w = tl.load(W + column, mask=mask, other=0.0).to(tl.float32)
            if OFFSET:
                w += 1.0
            y = y * w
        if HAS_B:
            y = y + tl.load(B + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def wide_rows(
    X, W, DY, MEAN, RSTD, ALONG, LEVEL, width,
    RMS: tl.constexpr, OFFSET: tl.constexpr, HAS_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): means over the row of dy * weight * unit and of dy * weight."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(RSTD + row).to(tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if not RMS:
        mean = tl.load(MEAN + row).to(tl.float32)
    along = tl.zeros((BLOCK_C,), tl.float32)
    level = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, width, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = column < width
        x = tl.load(X + row * width + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(DY + row * width + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_W:
            w = tl.load(W + column, mask=mask, other=0.0).to(tl.float32)
            if OFFSET:
                w += 1.0
            g = g * w
        along += g * ((x - mean) * rstd)
        level += g
    tl.store(ALONG + row, tl.sum(along, 0) / width)
    if not RMS:
        tl.store(LEVEL + row, tl.sum(level, 0) / width)


@triton.jit
def wide_columns(
    X, W, DY, DTOTAL, DX, MEAN, RSTD, ALONG, LEVEL, PW, PB, rows, width, chunks, chunk_rows,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, WRITE_DX: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * chunks * column blocks,): dx, and partials (examples, chunks, width)."""
    parts = tl.num_programs(0) // tl.cdiv(width, BLOCK_C)
    pid, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    example, chunk = pid // chunks, pid % chunks
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_column = column < width
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
    sum_w = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    low = chunk * chunk_rows
    high = tl.minimum(low + chunk_rows, rows)
    for start in tl.range(low, high, BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        in_row = row < high
        absolute = example.to(tl.int64) * rows + row
        mask = in_row[:, None] & in_column[None, :]
        at = absolute[:, None] * width + column[None, :]
        unit = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + absolute, mask=in_row, other=0.0).to(tl.float32)
        if not RMS:
            unit -= tl.load(MEAN + absolute, mask=in_row, other=0.0).to(tl.float32)[:, None]
        unit *= rstd[:, None]
        if WRITE_DX:
            dx = dy * w[None, :] - unit * tl.load(ALONG + absolute, mask=in_row, other=0.0)[:, None]
            if not RMS:
                dx -= tl.load(LEVEL + absolute, mask=in_row, other=0.0)[:, None]
            dx *= rstd[:, None]
            if ADD:
                dx += tl.load(DTOTAL + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        if LLAMA:
            unit = unit.to(X.dtype.element_ty).to(tl.float32)
        sum_w += tl.sum(dy * unit, 0)
        if HAS_B:
            sum_b += tl.sum(dy, 0)
    out = pid.to(tl.int64) * width + column
    if HAS_W:
        tl.store(PW + out, sum_w, mask=in_column)
    if HAS_B:
        tl.store(PB + out, sum_b, mask=in_column)


def forward(pointers: tuple[Tensor, ...], width: int, eps: float, flags: dict[str, Any]) -> None:
    """Fill y and the statistics, and with ADD the total, of rows of any width."""
    rows = pointers[-1].numel()
    launch(
        wide_forward, (rows,),
        *pointers, width, eps, BLOCK_C=ROW_COLUMNS, num_warps=ROW_WARPS, **flags,
    )  # fmt: skip


def backward(
    inputs: tuple[Tensor, ...],
    folded: Folded,
    columns: int,
    flags: dict[str, Any],
    programs: int | None,
) -> tuple[Tensor, int]:
    """Write dx; return partial rows (columns, examples * chunks, width) and chunks an example."""
    x, weight, dy, _, _, mean, rstd = inputs
    examples, rows, width = folded.shape
    along, level = torch.empty_like(rstd), torch.empty_like(rstd)
    if flags["WRITE_DX"]:
        launch(
            wide_rows, (examples * rows,),
            x, weight, dy, mean, rstd, along, level, width,
            RMS=flags["RMS"], OFFSET=flags["OFFSET"], HAS_W=flags["HAS_W"],
            BLOCK_C=ROW_COLUMNS, num_warps=ROW_WARPS,
        )  # fmt: skip
    blocks = triton.cdiv(width, TILE.columns)
    slots = resident_programs(x.device, TILE.resident) if programs is None else programs
    block = min(TILE.rows, power_of_2(rows))
    chunks = min(triton.cdiv(rows, block), max(1, slots // (examples * blocks)))
    chunk_rows = triton.cdiv(rows, chunks)
    chunks = triton.cdiv(rows, chunk_rows)
    partials = x.new_empty((columns, examples * chunks, width), dtype=torch.float32)
    launch(
        wide_columns, (examples * chunks * blocks,),
        *inputs, along, level, partials[0], partials[-1], rows, width, chunks, chunk_rows,
        STAGES=TILE.stages, BLOCK_R=block, BLOCK_C=TILE.columns,
        num_warps=TILE.warps, **flags,
    )  # fmt: skip
    return partials, chunks

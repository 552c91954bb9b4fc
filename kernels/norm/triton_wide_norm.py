"""The Triton norm kernels for rows too wide for a program's registers.

Forward walks over a row twice: once for its statistics, once to write y; the second reading finds
most of the row in cache. Backward is two launches, as for narrower rows. The first goes by blocks of columns, and
leaves partial rows of the weight's and the bias's sums, and of every row what its block adds to the two means that
dx needs. The second has programs that finish the sums and programs that write dx. The inputs are read twice, as ATen
reads them at every width: 10 bytes an element in 16 bits instead of 6.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.grid import cdiv, power_of_2, resident_programs
from trainc.kernels.library.launch import launch
from trainc.kernels.library.occupancy import fitted
from trainc.kernels.norm import tiles
from trainc.kernels.norm.partial_sums import Sums
from trainc.kernels.norm.rows import Folded
from trainc.kernels.norm.triton_norm import HEAD, add_norms, finish_columns, gain, leave_sums

ROW_COLUMNS, ROW_WARPS = 4096, 8
# 32 elements a thread.
TILE = tiles.Tile(rows=4, columns=1024, warps=4, stages=2)
# Programs of a row that write dx, at most: each adds up the row's means again.
ROW_PROGRAMS = 128


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


@triton.jit(do_not_specialize=["rows", "chunks", "chunk_rows"])
def wide_sums(
    X, W, DY, MEAN, RSTD, MEANS, SCRATCH, rows, width, chunks, chunk_rows,
    RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr, HAS_W: tl.constexpr,
    SUM_W: tl.constexpr, SUM_B: tl.constexpr, WRITE_DX: tl.constexpr, ROW_NORMS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * chunks * column blocks,): partial rows, and MEANS (all rows, 2, blocks).

    MEANS are sums along a block of dy * weight * unit and of dy * weight. With ROW_NORMS there is one example in name,
    and every row leaves the squares (rows, COLUMNS, blocks) of its block behind the partial rows.
    """
    blocks = tl.cdiv(width, BLOCK_C)
    lines = tl.num_programs(0) // blocks
    pid, block = tl.program_id(0) % lines, tl.program_id(0) // lines
    example, chunk = pid // chunks, pid % chunks
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_column = column < width
    w = gain(W, column, in_column, HAS_W, OFFSET, BLOCK_C)
    sum_w = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    squares = SCRATCH + HEAD + tl.full((), COLUMNS, tl.int64) * lines * width
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
            g = dy * w[None, :]
            means = MEANS + absolute * 2 * blocks + block
            tl.store(means, tl.sum(g * unit, 1), mask=in_row)
            if not RMS:
                tl.store(means + blocks, tl.sum(g, 1), mask=in_row)
        if LLAMA:
            unit = unit.to(X.dtype.element_ty).to(tl.float32)
        part = dy * unit
        if SUM_W:
            sum_w += tl.sum(part, 0)
        if SUM_B:
            sum_b += tl.sum(dy, 0)
        if ROW_NORMS:
            square = squares + absolute * COLUMNS * blocks + block
            if SUM_W:
                tl.store(square, tl.sum(part * part, 1), mask=in_row)
            if SUM_B:
                tl.store(square + blocks, tl.sum(dy * dy, 1), mask=in_row)
    leave_sums(SCRATCH, pid, lines, width, sum_w, sum_b, column, in_column, SUM_W, SUM_B)


@triton.jit
def _row_gradient(
    X, W, DY, DTOTAL, DX, MEAN, RSTD, MEANS, row, low, width, span, blocks,
    ADD: tl.constexpr, RMS: tl.constexpr, OFFSET: tl.constexpr, HAS_W: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Write dx of a row's columns from `low` on, `span` of them."""
    along = tl.zeros((BLOCK_X,), tl.float32)
    level = tl.zeros((BLOCK_X,), tl.float32)
    means = MEANS + row * 2 * blocks
    for start in range(0, blocks, BLOCK_X):
        block = start + tl.arange(0, BLOCK_X)
        along += tl.load(means + block, mask=block < blocks, other=0.0)
        if not RMS:
            level += tl.load(means + blocks + block, mask=block < blocks, other=0.0)
    rstd = tl.load(RSTD + row).to(tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if not RMS:
        mean = tl.load(MEAN + row).to(tl.float32)
    along_row, level_row = tl.sum(along, 0) / width, tl.sum(level, 0) / width
    for start in range(low, tl.minimum(low + span, width), BLOCK_X):
        column = start + tl.arange(0, BLOCK_X)
        mask = column < width
        at = row * width + column
        unit = (tl.load(X + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        g *= gain(W, column, mask, HAS_W, OFFSET, BLOCK_X)
        dx = (g - unit * along_row - level_row) * rstd
        if ADD:
            dx += tl.load(DTOTAL + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["normed", "examples", "chunks", "finishing", "norming", "blocks"])
def wide_finish(
    X, W, DY, DTOTAL, DX, MEAN, RSTD, MEANS, SCRATCH, DW, DB, NORMS,
    normed, examples, chunks, width, blocks, finishing, norming, span,
    ADD: tl.constexpr, RMS: tl.constexpr, OFFSET: tl.constexpr, HAS_W: tl.constexpr,
    SUM_W: tl.constexpr, SUM_B: tl.constexpr, STORE_W: tl.constexpr, STORE_B: tl.constexpr,
    WRITE_DX: tl.constexpr, SQUARED: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Grid (finishing + norming + rows * spans,): programs that add sums, those that add norms, those that write dx.

    The sums are of (examples, chunks) lines, as in `norm_finish`. The `normed` norms are of rows, which have `blocks`
    squares each of every sum; they are zero where there is no sum.
    """
    pid = tl.program_id(0)
    if pid < finishing:
        if SUM_W or SUM_B:
            across = finishing // (SUM_W + SUM_B)
            kind = pid // across
            if not SUM_W:
                kind += 1
            finish_columns(
                SCRATCH, DW, DB, NORMS, pid % across, across, kind, examples, chunks, width,
                SUM_W, SUM_B, STORE_W, STORE_B, SQUARED, COLUMNS, UNROLL, BLOCK_E, BLOCK_S, BLOCK_C, BLOCK_L, BLOCK_K,
            )  # fmt: skip
    elif pid < finishing + norming:
        squares = SCRATCH + HEAD + tl.full((), COLUMNS, tl.int64) * chunks * width
        first = (pid - finishing) * BLOCK_L
        last = tl.minimum(first + BLOCK_L, normed)
        add_norms(squares, NORMS, first, last, blocks, SUM_W, SUM_B, COLUMNS, BLOCK_L, BLOCK_K)
    elif WRITE_DX:
        rest = pid - finishing - norming
        spans = tl.cdiv(width, span)
        _row_gradient(
            X, W, DY, DTOTAL, DX, MEAN, RSTD, MEANS, (rest // spans).to(tl.int64), rest % spans * span, width,
            span, blocks, ADD, RMS, OFFSET, HAS_W, BLOCK_X,
        )  # fmt: skip


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
    sums: Sums,
    norms: Tensor,
    flags: dict[str, Any],
    programs: int | None,
) -> None:
    """Write dx, the sums' gradients and norms."""
    x, weight, dy, dtotal, dx, mean, rstd = inputs
    examples, rows, width = folded.shape
    by_rows = sums.squared and rows == 1
    if by_rows:  # one example in name
        examples, rows = 1, examples
    add = {"ADD": flags["ADD"]}
    shared = {name: flags[name] for name in ("RMS", "OFFSET", "HAS_W", "WRITE_DX")}
    shared |= {"COLUMNS": sums.columns, **sums.flags}
    blocks, block = cdiv(width, TILE.columns), min(TILE.rows, power_of_2(rows))
    options = shared | {
        "LLAMA": flags["LLAMA"], "ROW_NORMS": by_rows, "STAGES": TILE.stages, "BLOCK_R": block, "BLOCK_C": TILE.columns,
        "num_warps": TILE.warps,
    }  # fmt: skip
    means = torch.empty((examples * rows, 2, blocks), dtype=torch.float32, device=x.device)
    read = (x, weight, dy, mean, rstd, means)
    fit = fitted(wide_sums, (*read, means, 16, width, 16, 16), options)
    slots = resident_programs(x.device, fit.programs) if programs is None else programs
    chunks = min(cdiv(rows, block), max(1, slots // (examples * blocks)))
    chunk_rows = cdiv(rows, chunks)
    chunks = cdiv(rows, chunk_rows)
    squared = sums.squared and not by_rows
    lines = (examples, chunks) if squared else (1, examples * chunks)
    across, step = sums.step(*lines, width, squared, x.device)
    squares = rows * blocks if by_rows else examples * across if squared else 0
    scratch = sums.scratch(examples * chunks, squares, width, x)
    launch(
        wide_sums, (examples * chunks * blocks,), *read, scratch, rows, width, chunks, chunk_rows,
        **options, **fit.options,
    )  # fmt: skip
    normed = 0 if squared else norms.numel()
    if normed:
        step["BLOCK_K"] = min(power_of_2(blocks), tiles.FINISH_ELEMENTS // 2)
        step["BLOCK_L"] = tiles.FINISH_ELEMENTS // 2 // step["BLOCK_K"]
    finishing, norming = across * sums.count, cdiv(normed, step["BLOCK_L"])
    span = ROW_COLUMNS * cdiv(cdiv(width, ROW_COLUMNS), ROW_PROGRAMS)
    writing = examples * rows * cdiv(width, span) if flags["WRITE_DX"] else 0
    launch(
        wide_finish, (finishing + norming + writing,),
        x, weight, dy, dtotal, dx, mean, rstd, means, scratch, *sums.gradients, norms,
        normed, *lines, width, blocks, finishing, norming, span, BLOCK_X=ROW_COLUMNS,
        **(shared | add | step | {"num_warps": ROW_WARPS}),
    )  # fmt: skip

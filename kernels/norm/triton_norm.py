"""Triton kernels for LayerNorm and RMSNorm; imported by the first CUDA call of either.

DY2 and DY3 are further gradients of y where TERMS is 2 or 3, one from each part of the model that read it; their sum is
rounded as autograd rounds it.

With ADD the input is a residual sum: forward adds and stores it, and backward adds to dx the
gradient that reached the sum (DTOTAL) before writing it. OFFSET adds one to the weight.

Backward reads x and dy once and writes dx once, whatever is measured. Rows of one example never
share a program with rows of another, so a program's weight sum belongs to one example and its
square is that example's. Three regimes:

  rows    one row an example: its square is a sum along the row, and programs walk over many rows
  whole   many examples: a program walks over whole examples, squares each example's sum in
          registers, and leaves one partial row for the batch's gradient
  split   few examples: (example, chunk) programs leave partial rows that `norm_finish` adds per
          example and squares

All of them end with `norm_finish`: two launches a backward pass, and one where no sum is asked for. SUM_W and SUM_B are
the sums asked for. STAGES 2 copies the next tile to shared memory while this one is reduced.

SCRATCH is float32: HEAD numbers, of which the first counts programs; COLUMNS x lines x width of partial rows, a line
a program; and the squares of `norm_finish`. Results are deterministic: what is added is added in a fixed order, and
the only atomic operation counts programs.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

# Numbers before the partial rows, which so start at a cache line.
HEAD = tl.constexpr(32)


@triton.jit
def norm_forward(
    X, RESIDUAL, TOTAL, W, B, Y, MEAN, RSTD, rows, width, eps,
    ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y and the float32 statistics of BLOCK_R rows of x, or with ADD of x + residual, stored."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    in_row, in_column = row < rows, column < width
    mask = in_row[:, None] & in_column[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=mask)
        x = total.to(tl.float32)  # backward sees the rounded sum, so the statistics must be its
    if not RMS:
        mean = tl.sum(x, 1) / width
        tl.store(MEAN + row, mean, mask=in_row)
        x = tl.where(in_column[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(RSTD + row, rstd, mask=in_row)
    y = x * rstd[:, None]
    if LLAMA:
        y = y.to(TOTAL.dtype.element_ty).to(tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
        y = y * w[None, :]
    if HAS_B:
        y = y + tl.load(B + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    X, DY, DY2, DY3, DTOTAL, DX, MEAN, RSTD, w, first, row, last, column, width,
    TERMS: tl.constexpr, ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """Write dx for rows [row, last) of the example at `first`; return dy * unit and dy."""
    in_row, in_column = row < last, column < width
    mask = in_row[:, None] & in_column[None, :]
    absolute = first + row
    at = absolute[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 1:
        dy += tl.load(DY2 + at, mask=mask, other=0.0).to(tl.float32)
        dy = dy.to(DY.dtype.element_ty).to(tl.float32)  # as sums of tensors are rounded
    if TERMS > 2:
        dy += tl.load(DY3 + at, mask=mask, other=0.0).to(tl.float32)
        dy = dy.to(DY.dtype.element_ty).to(tl.float32)
    rstd = tl.load(RSTD + absolute, mask=in_row, other=0.0).to(tl.float32)
    if not RMS:
        mean = tl.load(MEAN + absolute, mask=in_row, other=0.0).to(tl.float32)
        x = tl.where(in_column[None, :], x - mean[:, None], 0.0)
    unit = x * rstd[:, None]
    if WRITE_DX:
        g = dy * w[None, :]
        along = tl.sum(g * unit, 1) / width
        dx = g - unit * along[:, None]
        if not RMS:
            dx = dx - (tl.sum(g, 1) / width)[:, None]
        dx = dx * rstd[:, None]
        if ADD:
            dx += tl.load(DTOTAL + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
    if LLAMA:
        unit = unit.to(X.dtype.element_ty).to(tl.float32)
    return dy * unit, dy


@triton.jit
def gain(
    W, column, in_column, HAS_W: tl.constexpr, OFFSET: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the normalised value is multiplied by."""
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + column, mask=in_column, other=0.0).to(tl.float32)
        if OFFSET:
            w += 1.0
    return w


@triton.jit
def leave_sums(
    SCRATCH, line, lines, width, sum_w, sum_b, column, in_column,
    SUM_W: tl.constexpr, SUM_B: tl.constexpr,
):  # fmt: skip
    """Store partial rows, the bias's behind all lines of the weight's; the first program sets `norm_finish`'s count."""
    line = line.to(tl.int64)
    if SUM_W:
        tl.store(SCRATCH + HEAD + line * width + column, sum_w, mask=in_column)
    if SUM_B:
        tl.store(SCRATCH + HEAD + (lines + line) * width + column, sum_b, mask=in_column)
    if SUM_W or SUM_B:
        first = tl.program_id(0) == 0
        if first:
            tl.store(SCRATCH, 0.0)


@triton.jit(do_not_specialize=["examples", "rows"])
def norm_backward_whole(
    X, W, DY, DY2, DY3, DTOTAL, DX, MEAN, RSTD, SCRATCH, NORMS, examples, rows, width,
    TERMS: tl.constexpr, ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, SUM_W: tl.constexpr, SUM_B: tl.constexpr, WRITE_DX: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): whole examples pid, pid + programs, .. in one loop over their tiles."""
    example, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_C)
    in_column = column < width
    w = gain(W, column, in_column, HAS_W, OFFSET, BLOCK_C)
    sum_w = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    total_w = tl.zeros((BLOCK_C,), tl.float32)
    total_b = tl.zeros((BLOCK_C,), tl.float32)
    start = 0
    steps = tl.cdiv(examples - example, programs) * tl.cdiv(rows, BLOCK_R)
    for _ in tl.range(0, steps, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        part_w, part_b = _tile(
            X, DY, DY2, DY3, DTOTAL, DX, MEAN, RSTD, w, example.to(tl.int64) * rows, row, rows, column, width,
            TERMS, ADD, RMS, LLAMA, WRITE_DX,
        )  # fmt: skip
        if SUM_W:
            sum_w += tl.sum(part_w, 0)
        if SUM_B:
            sum_b += tl.sum(part_b, 0)
        start += BLOCK_R
        if start >= rows:
            norms = NORMS + example.to(tl.int64) * COLUMNS
            tl.store(norms, tl.sum(sum_w * sum_w, 0))
            if COLUMNS == 2:
                tl.store(norms + 1, tl.sum(sum_b * sum_b, 0))
            total_w += sum_w
            total_b += sum_b
            sum_w = tl.zeros((BLOCK_C,), tl.float32)
            sum_b = tl.zeros((BLOCK_C,), tl.float32)
            start = 0
            example += programs
    line = tl.program_id(0)
    leave_sums(SCRATCH, line, programs, width, total_w, total_b, column, in_column, SUM_W, SUM_B)


@triton.jit(do_not_specialize=["rows", "chunks", "chunk_rows"])
def norm_backward_split(
    X, W, DY, DY2, DY3, DTOTAL, DX, MEAN, RSTD, SCRATCH, NORMS, rows, width, chunks, chunk_rows,
    TERMS: tl.constexpr, ADD: tl.constexpr, RMS: tl.constexpr, LLAMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_W: tl.constexpr, SUM_W: tl.constexpr, SUM_B: tl.constexpr, WRITE_DX: tl.constexpr,
    ROW_NORMS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (examples * chunks,): a chunk of an example a program.

    With ROW_NORMS there is one example in name, and each of its rows stores norms of its own.
    """
    pid = tl.program_id(0)
    example, chunk = pid // chunks, pid % chunks
    column = tl.arange(0, BLOCK_C)
    in_column = column < width
    w = gain(W, column, in_column, HAS_W, OFFSET, BLOCK_C)
    sum_w = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    first = example.to(tl.int64) * rows
    low = chunk * chunk_rows
    high = tl.minimum(low + chunk_rows, rows)
    for start in tl.range(low, high, BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        part_w, part_b = _tile(
            X, DY, DY2, DY3, DTOTAL, DX, MEAN, RSTD, w, first, row, high, column, width,
            TERMS, ADD, RMS, LLAMA, WRITE_DX,
        )  # fmt: skip
        if SUM_W:
            sum_w += tl.sum(part_w, 0)
        if SUM_B:
            sum_b += tl.sum(part_b, 0)
        if ROW_NORMS:
            norms = NORMS + (first + row) * COLUMNS
            square = tl.zeros((BLOCK_R,), tl.float32)
            if SUM_W:
                square = tl.sum(part_w * part_w, 1)
            tl.store(norms, square, mask=row < high)
            if COLUMNS == 2:
                square = tl.zeros((BLOCK_R,), tl.float32)
                if SUM_B:
                    square = tl.sum(part_b * part_b, 1)
                tl.store(norms + 1, square, mask=row < high)
    lines = tl.num_programs(0)
    leave_sums(SCRATCH, pid, lines, width, sum_w, sum_b, column, in_column, SUM_W, SUM_B)


@triton.jit
def add_norms(
    SQUARES, NORMS, low, lines, blocks, SUM_W: tl.constexpr, SUM_B: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lines [low, lines) of NORMS (examples, COLUMNS), from SQUARES of as many lines and a column for each block."""
    for first in range(low, lines, BLOCK_L):
        line = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
        parts = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
        given = line < lines
        if not SUM_W:  # a sum that was not asked for left no squares
            given = given & (line % COLUMNS == 1)
        if COLUMNS == 2 and not SUM_B:
            given = given & (line % COLUMNS == 0)
        for start in range(0, blocks, BLOCK_K):
            block = start + tl.arange(0, BLOCK_K)
            mask = given[:, None] & (block < blocks)[None, :]
            at = line[:, None] * blocks + block[None, :]
            # Other programs wrote them: past the first cache.
            parts += tl.load(SQUARES + at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(NORMS + line, tl.sum(parts, 1), mask=line < lines)


@triton.jit
def finish_columns(
    SCRATCH, DW, DB, NORMS, block, blocks, kind, examples, chunks, width,
    SUM_W: tl.constexpr, SUM_B: tl.constexpr, STORE_W: tl.constexpr, STORE_B: tl.constexpr,
    SQUARED: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add a block of columns of one kind's partial rows, 0 weight and 1 bias, of which lines are (examples, chunks)."""
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_column = column < width
    lines = examples * chunks
    partial = SCRATCH + HEAD + kind.to(tl.int64) * lines * width
    squares = SCRATCH + HEAD + tl.full((), COLUMNS, tl.int64) * lines * width
    total = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for first in range(0, examples, BLOCK_E):
        example = first + tl.arange(0, BLOCK_E)
        parts = tl.zeros((BLOCK_E, BLOCK_S, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_S * UNROLL):
            for part in tl.static_range(UNROLL):
                chunk = start + part * BLOCK_S + tl.arange(0, BLOCK_S)
                line = (example[:, None] * chunks + chunk[None, :]).to(tl.int64)
                mask = (example < examples)[:, None] & (chunk < chunks)[None, :]
                mask = mask[:, :, None] & in_column[None, None, :]
                at = line[:, :, None] * width + column[None, None, :]
                parts += tl.load(partial + at, mask=mask, other=0.0)
        each = tl.sum(parts, 1)
        if SQUARED:
            at = (example.to(tl.int64) * COLUMNS + kind) * blocks + block
            tl.store(squares + at, tl.sum(each * each, 1), mask=example < examples)
        total += each
    found = tl.sum(total, 0)
    if STORE_W:
        tl.store(
            DW + column, found.to(DW.dtype.element_ty), mask=column < tl.where(kind == 0, width, 0)
        )
    if STORE_B:
        tl.store(
            DB + column, found.to(DB.dtype.element_ty), mask=column < tl.where(kind == 1, width, 0)
        )
    if SQUARED:
        # All threads have stored before the program is counted, and none reads before it was.
        tl.debug_barrier()
        before = tl.atomic_add(SCRATCH, 1.0, sem="acq_rel")
        if before == blocks * (SUM_W + SUM_B) - 1.0:
            tl.debug_barrier()
            add_norms(
                squares,
                NORMS,
                0,
                examples * COLUMNS,
                blocks,
                SUM_W,
                SUM_B,
                COLUMNS,
                BLOCK_L,
                BLOCK_K,
            )


@triton.jit(do_not_specialize=["examples", "chunks"])
def norm_finish(
    SCRATCH, DW, DB, NORMS, examples, chunks, width,
    SUM_W: tl.constexpr, SUM_B: tl.constexpr, STORE_W: tl.constexpr, STORE_B: tl.constexpr,
    SQUARED: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, sums): gradients in their final dtypes; with SQUARED the examples' norms.

    The program that is counted last adds the squares of all blocks, always in the same order.
    """
    kind = tl.program_id(1)
    if not SUM_W:
        kind += 1
    finish_columns(
        SCRATCH, DW, DB, NORMS, tl.program_id(0), tl.num_programs(0), kind, examples, chunks, width,
        SUM_W, SUM_B, STORE_W, STORE_B, SQUARED, COLUMNS, UNROLL, BLOCK_E, BLOCK_S, BLOCK_C, BLOCK_L, BLOCK_K,
    )  # fmt: skip
